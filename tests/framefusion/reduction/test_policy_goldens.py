"""The policy against the recorded decisions of the reference (thu-nics/FrameFusion fbec1d2, see tests/goldens).

Every recorded case is either replayed call by call and must give the same tokens, or is one where we correct the
reference: then its test asserts our outcome and says why. The two lists together are checked to be complete.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from framefusion.errors import BudgetError
from framefusion.reduction import budget
from framefusion.reduction.plan import Plan, apply_plan
from framefusion.reduction.policy import Reduction, ReductionSettings
from framefusion.reduction.tracks import TEXT, track_similarity
from tests.wheel import ROOT

FOLDER = ROOT / "tests" / "goldens" / "algorithm"
RECORDED_LAYERS = 28  # the reference's constant, whatever the model
CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in json.loads((FOLDER / "goldens.json").read_text())["cases"]
}

EQUAL = [
    "01_multi_merge_then_prune",
    "02_topk_at_first_call",
    "06_all_identical_threshold",
    "07_one_frame",
    "13_newline_grid",
    "14_ratio_zero_never_finishes",  # its five calls; what follows them is corrected below
    "16_vl_attention_4_rows_mrope_list",
    "17_list3_and_4d_mask",
    "20_threshold_equality",
    "21_round_half_even_down",
    "23_zero_tokens_threshold",
    "27_bf16",
    "31_negative_bound",
    "34_q_len_1_decode",
]
EQUAL_COUNTS = ["05_all_identical_topk_ties", "19_attention_ties"]  # which of the equals stay is arbitrary there
CORRECTED = [
    "08_cost_too_small_error_at_merge",
    "09_cost_too_small_error_at_prune",
    "12_text_between_frames",
    "24_zero_tokens_topk",
    "28_bf16_run_longer_than_256",
    "30_fp16_overflow",
]

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Call:
    """One recorded call: what went in, what came out."""

    record: dict[str, Any]
    hidden: Floats  # [L, D]
    labels: npt.NDArray[np.int64]
    similarity: Floats | None
    importance: Floats | None
    kept: npt.NDArray[np.int64]
    hidden_out: Floats | None


def widened(array: npt.NDArray[Any]) -> Floats:
    """Raw bfloat16 bits to fp32; anything else as it is."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


def recorded_calls(name: str) -> list[Call]:
    arrays = np.load(FOLDER / f"{name}.npz")

    def array(call: int, key: str) -> Floats | None:
        return widened(arrays[f"c{call}_{key}"]) if f"c{call}_{key}" in arrays else None

    calls = []
    for record in CASES[name]["calls_detail"]:
        i = record["call"]
        if f"c{i}_keep_local" not in arrays:
            continue  # the reference raised here
        attention, hidden_out = array(i, "attn"), array(i, "hidden_out")
        calls.append(
            Call(
                record,
                widened(arrays[f"c{i}_hidden_in"])[0],
                arrays[f"c{i}_patch_type_in"].astype(np.int64),
                array(i, "sim_by_token"),
                None if attention is None else attention[0].mean((0, 1)),  # [H, n, L] -> [L]
                arrays[f"c{i}_keep_local"].astype(np.int64),
                None if hidden_out is None else hidden_out[0],
            )
        )
    return calls


def settings_of(name: str, **changed: Any) -> ReductionSettings:
    case = CASES[name]
    values = {"cost": case["cost"], "similarity_lower_bound": case["sim"], "ratio_lower_bound": case["ratio"]}
    return ReductionSettings(**{**values, "num_layers": RECORDED_LAYERS, "depth": RECORDED_LAYERS - 2, **changed})


def similarity_of(call: Call, name: str) -> Floats | None:
    """Our own similarity; bf16 cases were decided on cosines computed in bf16, so there the recorded one."""
    if CASES[name].get("dtype") == "bfloat16":
        assert call.similarity is None or np.nanmax(np.abs(our_similarity(call) - call.similarity)) < 0.02
        return call.similarity
    return our_similarity(call)


def our_similarity(call: Call) -> Floats:
    return track_similarity(call.hidden, call.labels)


def expected_kind(call: Call) -> str:
    if call.record["q_len_in"] == call.record["q_len_out"]:
        return "none"
    return "prune" if call.record["branch"] == "prune" else "merge"


def step(reduction: Reduction, call: Call, name: str) -> Plan:
    similarity = similarity_of(call, name) if reduction.wants_similarity else None
    return reduction.step(similarity, call.importance)


def check_state(reduction: Reduction, call: Call) -> None:
    recorded = call.record.get("sparsity_upper_bound", call.record.get("pruning_ratio"))
    if recorded is not None:
        needed = budget.required_drop(reduction.shares, reduction.settings.cost, RECORDED_LAYERS)
        assert needed == pytest.approx(recorded, abs=1e-12)
    assert not (call.record["branch"] == "prune" and not reduction.wants_importance)


@pytest.mark.parametrize("name", EQUAL)
def test_equal_tokens_and_values(name: str) -> None:
    calls = recorded_calls(name)
    reduction = Reduction(settings_of(name), calls[0].labels)
    tolerance = 2**-7 if CASES[name].get("dtype") == "bfloat16" else 1e-6
    for call in calls:
        check_state(reduction, call)
        plan = step(reduction, call, name)
        np.testing.assert_array_equal(plan.kept, call.kept)
        assert plan.kind == expected_kind(call)
        assert reduction.finished == call.record["finish_pruning_out"] or name == "34_q_len_1_decode"
        if call.hidden_out is not None:
            np.testing.assert_allclose(apply_plan(call.hidden, plan), call.hidden_out, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", EQUAL_COUNTS)
def test_equal_counts_where_the_choice_is_arbitrary(name: str) -> None:
    calls = recorded_calls(name)
    reduction = Reduction(settings_of(name), calls[0].labels)
    for call in calls:
        if call.record["branch"] == "noop":
            assert reduction.finished
            continue
        plan = step(reduction, call, name)
        assert (plan.kept.size, plan.kind) == (call.kept.size, expected_kind(call))


@pytest.mark.parametrize("name", [name for name in EQUAL if CASES[name].get("dtype") is None])
def test_our_similarity_is_the_recorded_one(name: str) -> None:
    for call in recorded_calls(name):
        if call.similarity is not None:
            recorded = np.where(np.isnan(call.similarity), -2.0, call.similarity)  # NaN: text, or a zero token
            np.testing.assert_allclose(our_similarity(call), recorded, atol=2e-6)


def test_every_recorded_case_is_held_to_something() -> None:
    assert sorted([*EQUAL, *EQUAL_COUNTS, *CORRECTED]) == sorted(CASES)


@pytest.mark.parametrize("name", [name for name in CORRECTED if "cost_too_small" in name])
def test_a_cost_too_small_is_refused_before_the_first_layer(name: str) -> None:
    # the reference raises in the middle of a prefill; with the early prune any cost of 1 / L or more is met instead
    with pytest.raises(BudgetError, match=r"smallest cost is 0\.035715 \(keeps 3\.571 %, drops 96\.43 %\)"):
        settings_of(name)


def test_a_merge_that_would_overdraw_the_budget_gives_way_to_the_prune() -> None:
    # golden 08's tokens and a budget of 1.02 layers, of which the merges of calls 0 and 1 spend 0.53 + 0.45
    name = "08_cost_too_small_error_at_merge"
    calls = recorded_calls(name)
    reduction = Reduction(settings_of(name, cost=1.02 / 28), calls[0].labels)
    importance = np.linspace(0, 1, calls[1].labels.size)
    assert not reduction.wants_importance
    assert step(reduction, calls[0], name).kind == "merge"
    assert reduction.wants_importance  # 0.53 spent of 1.02, and layer 1 alone costs another 0.53
    assert reduction.wants_similarity
    plan = reduction.step(our_similarity(calls[1]), importance)
    assert plan.kind == "merge"  # 0.98 of 1.02: the next call can still meet the budget
    plan = reduction.step(np.full(plan.kept.size, -1.0), np.linspace(0, 1, plan.kept.size))
    assert plan.kind == "prune"
    assert reduction.finished
    assert budget.cost_of_shares(reduction.shares, RECORDED_LAYERS) == pytest.approx(1.02 / 28, abs=0.5 / 96)


def test_text_between_frames_is_never_dropped() -> None:
    # the reference's prune window runs from the first to the last visual token and takes the text between with it
    name = "12_text_between_frames"
    calls = recorded_calls(name)
    reduction = Reduction(settings_of(name), calls[0].labels)
    for call in calls[:2]:
        np.testing.assert_array_equal(step(reduction, call, name).kept, call.kept)
    prune = calls[2]
    assert np.count_nonzero(prune.labels == TEXT) > np.count_nonzero(prune.labels[prune.kept] == TEXT)
    share = budget.required_drop(reduction.shares, 0.3, RECORDED_LAYERS)
    plan = step(reduction, prune, name)
    visual = np.flatnonzero(prune.labels != TEXT)
    assert prune.importance is not None
    best = visual[np.argsort(-prune.importance[visual])][: round(visual.size * (1 - share))]
    np.testing.assert_array_equal(plan.kept, np.sort([*best, *np.flatnonzero(prune.labels == TEXT)]))


def test_merging_ends_at_the_depth_even_if_no_share_is_too_small() -> None:
    # with ratio_lower_bound 0 the reference never stops trying to merge and so never prunes
    name = "14_ratio_zero_never_finishes"
    calls = recorded_calls(name)
    reduction = Reduction(settings_of(name, depth=2), calls[0].labels)
    kinds = [reduction.step(our_similarity(calls[i]), np.linspace(0, 1, 104)).kind for i in range(4)]
    assert kinds == ["none", "none", "none", "prune"]
    assert budget.cost_of_shares(reduction.shares, RECORDED_LAYERS) == pytest.approx(0.3, abs=0.5 / 96)


def test_zero_tokens_never_merge() -> None:
    # torch.topk ranks their NaN first, so the reference merges them before anything that is truly alike
    name = "24_zero_tokens_topk"
    call = recorded_calls(name)[0]
    zero = np.flatnonzero(~call.hidden.any(1))
    recorded_sim = call.similarity
    assert recorded_sim is not None
    assert not np.isin(zero, call.kept).any()
    reduction = Reduction(settings_of(name), call.labels)
    plan = step(reduction, call, name)
    assert np.isin(zero, plan.kept).all()
    assert plan.kept.size == call.kept.size
    assert not np.isin(zero, plan.members).any()
    real = np.where(np.isnan(recorded_sim), -3, recorded_sim)
    np.testing.assert_array_equal(np.delete(np.arange(54), plan.kept), np.sort(np.argsort(-real)[:24]))


def test_runs_longer_than_256_are_counted_in_integers() -> None:
    # the reference counts runs in bf16, where 299 is 300: the mean then lands on a token that is dropped
    name = "28_bf16_run_longer_than_256"
    call = recorded_calls(name)[0]
    reduction = Reduction(settings_of(name, num_layers=400), call.labels)  # its cost of 0.003 needs that many layers
    plan = step(reduction, call, name)
    np.testing.assert_array_equal(plan.kept, call.kept)
    np.testing.assert_array_equal(np.diff([*plan.run_starts, plan.members.size]), [300, 300])
    reduced = apply_plan(call.hidden, plan)
    for head in (1, 2):
        np.testing.assert_allclose(reduced[head], call.hidden[head:601:2].mean(0, dtype=np.float64), rtol=1e-5)
    assert call.hidden_out is not None
    assert np.abs(reduced - call.hidden_out).max() > 0.01  # theirs: the first token left as it was


def test_similarity_of_large_fp16_values_is_finite() -> None:
    # fp16 products overflow in the reference: the cosine is NaN and merging is off without a word
    name = "30_fp16_overflow"
    call = recorded_calls(name)[0]
    assert call.kept.size == call.labels.size
    assert call.hidden.dtype == np.float16
    similarity = our_similarity(call)
    wide = track_similarity(call.hidden.astype(np.float64), call.labels)
    np.testing.assert_allclose(similarity, wide, atol=1e-5)
    plan = Reduction(settings_of(name), call.labels).step(similarity, None)
    assert plan.kind == "merge"
    reduced = apply_plan(call.hidden, plan)
    assert reduced.dtype == np.float16
    assert np.isfinite(reduced).all()


@pytest.mark.parametrize("bound", [-2.0, -1.5, 1.1, float("nan")])
def test_a_bound_that_is_no_cosine_is_refused(bound: float) -> None:
    # a bound of -2 merges the first tokens of a track into nothing in the reference
    with pytest.raises(BudgetError, match=r"similarity_lower_bound .* is outside \[-1, 1\]"):
        settings_of("01_multi_merge_then_prune", similarity_lower_bound=bound)
