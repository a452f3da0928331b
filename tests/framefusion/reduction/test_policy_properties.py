"""What holds of every reduction, whatever the labels, the thresholds, the reachable budget and the scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framefusion.errors import BudgetError
from framefusion.reducers import load_reducer
from framefusion.reducers.reducer import ReductionRequest
from framefusion.reduction import budget, tracks
from framefusion.reduction.plan import Plan, Scores, apply_plan, top
from framefusion.reduction.policy import FixedReduction, Reduction, ReductionSettings, ReductionState
from framefusion.reduction.tracks import TEXT, IntArray

modest = settings(max_examples=120)


@dataclass(frozen=True)
class Request:
    """Labels, and for each call the scores of all original tokens, of which a call sees those present."""

    labels: IntArray
    similarity: list[Scores]
    importance: list[Scores]


@st.composite
def labels_of_requests(draw: st.DrawFn) -> IntArray:
    kind = draw(st.sampled_from(["frames", "any", "one frame", "text"]))
    if kind == "text":
        return np.full(draw(st.integers(1, 8)), TEXT)
    if kind == "any":
        return np.array(draw(st.lists(st.integers(-1, 6), max_size=50)), dtype=np.int64)
    frames, patches = (1 if kind == "one frame" else draw(st.integers(2, 12))), draw(st.integers(1, 12))
    between = [TEXT] * draw(st.integers(0, 2))
    body = [label for _ in range(frames) for label in [*range(patches), *between]]
    return np.array([TEXT, *body, TEXT, TEXT], dtype=np.int64)


@st.composite
def requests(draw: st.DrawFn, calls: int = 12) -> Request:
    labels, random = draw(labels_of_requests()), np.random.default_rng(draw(st.integers(0, 2**20)))
    steps = draw(st.sampled_from([0, 3]))  # coarse scores have ties
    spread = draw(st.floats(0, 2))

    def scores(low: float) -> Scores:
        raw = np.clip(random.normal(0.5, spread, labels.size), low, 1)
        return np.round(raw * steps) / steps if steps else raw

    return Request(labels, [scores(-1) for _ in range(calls)], [scores(0) for _ in range(calls)])


@st.composite
def adaptive_settings(draw: st.DrawFn) -> ReductionSettings:
    layers = draw(st.integers(2, 11))
    return ReductionSettings(
        cost=draw(st.floats(1 / layers, 1)),
        similarity_lower_bound=draw(st.floats(-1, 1)),
        ratio_lower_bound=draw(st.sampled_from([0.0, 0.1, 0.5, 0.9])),
        num_layers=layers,
        depth=draw(st.integers(0, layers - 2)),
    )


def run(reduction: ReductionState, request: Request, calls: int) -> list[Plan]:
    """Drive all calls; a vector is handed over only where it is wanted."""
    present, plans = np.arange(request.labels.size), []
    for call in range(calls):
        similarity = request.similarity[call][present] if reduction.wants_similarity else None
        importance = request.importance[call][present] if reduction.wants_importance else None
        plans.append(reduction.step(similarity, importance))
        present = present[plans[-1].kept]
    return plans


def survivors(plans: list[Plan], size: int) -> IntArray:
    present = np.arange(size)
    for plan in plans:
        present = present[plan.kept]
    return present


def check_plans(plans: list[Plan], labels: IntArray) -> None:
    labels = tracks.request_labels(labels)
    for plan in plans:
        assert (np.diff(plan.kept) > 0).all()
        dropped = np.delete(np.arange(labels.size), plan.kept)
        assert (labels[dropped] != TEXT).all()
        assert (plan.kind == "none") == (dropped.size == 0)
        assert (plan.kind == "merge") == (plan.heads.size > 0)
        runs = np.split(plan.members, plan.run_starts[1:]) if plan.heads.size else []
        assert [run[0] for run in runs] == plan.heads.tolist()
        assert np.isin(plan.heads, plan.kept).all()
        for run_members in runs:
            assert run_members.size > 1
            assert (np.diff(run_members) > 0).all()  # a merge goes to an earlier token
            assert np.unique(labels[run_members]).size == 1
        if plan.kind == "merge":
            assert sorted(np.setdiff1d(plan.members, plan.heads)) == dropped.tolist()
        labels = labels[plan.kept]


def check_history(reduction: ReductionState, plans: list[Plan], labels: IntArray) -> None:
    tokens, visual = labels.size, tracks.count_visual(tracks.request_labels(labels))
    for call, (record, plan) in enumerate(zip(reduction.history, plans, strict=True)):
        assert (record.call, record.kind, record.tokens_before, record.visual_before) == (
            call,
            plan.kind,
            tokens,
            visual,
        )
        assert record.tokens_before - record.tokens_after == record.visual_before - record.visual_after
        tokens, visual = record.tokens_after, record.visual_after
    assert (reduction.call, reduction.labels.size, reduction.num_visual) == (len(plans), tokens, visual)


def mean_entering(reduction: ReductionState, layers: int) -> float:
    entering = [record.visual_after for record in reduction.history]
    entering += [entering[-1]] * (layers - len(entering))
    return sum(entering) / layers


@modest
@given(requests(), adaptive_settings())
def test_adaptive_keeps_order_and_text_and_meets_the_budget(request: Request, settings: ReductionSettings) -> None:
    reduction = Reduction(settings, request.labels)
    start = reduction.num_visual
    plans = run(reduction, request, settings.num_layers)
    check_plans(plans, request.labels)
    check_history(reduction, plans, request.labels)
    assert reduction.finished
    assert all(plan.kind == "none" for plan in plans[settings.depth + 2 :])
    assert abs(mean_entering(reduction, settings.num_layers) - settings.cost * start) <= 1


@modest
@given(requests(), adaptive_settings(), st.integers(0, 10))
def test_adaptive_never_reads_the_future(request: Request, settings: ReductionSettings, now: int) -> None:
    other = [np.flip(scores) for scores in request.similarity], [1 - scores for scores in request.importance]
    changed = Request(
        request.labels,
        [*request.similarity[:now], *other[0][now:]],
        [*request.importance[:now], *other[1][now:]],
    )
    calls = min(now, settings.num_layers)
    first = run(Reduction(settings, request.labels), request, calls)
    second = run(Reduction(settings, request.labels), changed, calls)
    assert [plan.kept.tolist() for plan in first] == [plan.kept.tolist() for plan in second]
    assert [plan.members.tolist() for plan in first] == [plan.members.tolist() for plan in second]


@modest
@given(requests(), adaptive_settings())
def test_vectors_that_are_not_wanted_change_nothing(request: Request, settings: ReductionSettings) -> None:
    sparing, generous = Reduction(settings, request.labels), Reduction(settings, request.labels)
    present = np.arange(request.labels.size)
    for plan in run(sparing, request, settings.num_layers):
        given_anyway = generous.step(
            request.similarity[generous.call][present], request.importance[generous.call][present]
        )
        assert given_anyway.kept.tolist() == plan.kept.tolist()
        present = present[plan.kept]


@modest
@given(requests(), adaptive_settings(), st.integers(0, 9))
def test_random_meets_the_same_budget_at_call_0(request: Request, settings: ReductionSettings, seed: int) -> None:
    given = ReductionRequest(settings, request.labels, seed)
    reduction, again = (load_reducer("random").start(given) for _ in range(2))
    start = reduction.num_visual
    plans = run(reduction, request, settings.num_layers)
    check_plans(plans, request.labels)
    check_history(reduction, plans, request.labels)
    assert abs(mean_entering(reduction, settings.num_layers) - settings.cost * start) <= 1
    assert run(again, request, 1)[0].kept.tolist() == plans[0].kept.tolist()


@modest
@given(requests(), st.lists(st.floats(0, 0.6), max_size=4), st.integers(0, 3), st.floats(0, 1))
def test_fixed_drops_the_counted_tokens(request: Request, merges: list[float], later: int, prune: float) -> None:
    schedule = budget.FixedSchedule(tuple(merges), max(len(merges) - 1, 0) + later, prune)
    reduction = FixedReduction(schedule, request.labels)
    labels = tracks.request_labels(request.labels)
    counts = budget.drop_counts(schedule, tracks.count_visual(labels), tracks.count_tracks(labels))
    plans = run(reduction, request, 10)
    check_plans(plans, request.labels)
    check_history(reduction, plans, request.labels)
    dropped = [record.tokens_before - record.tokens_after for record in reduction.history]
    idle = [0] * (schedule.prune_layer + 1 - len(merges))
    assert dropped == [*counts[:-1], *idle, counts[-1], *[0] * (8 - schedule.prune_layer)]


@modest
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, float("nan")]), max_size=30), st.integers(0, 30))
def test_top_takes_the_lower_index_of_equals_and_nan_last(values: list[float], count: int) -> None:
    scores = np.array(values)
    ranked = sorted(range(len(values)), key=lambda i: -np.inf if np.isnan(values[i]) else values[i], reverse=True)
    assert np.flatnonzero(top(scores, count, np.full(len(values), True))).tolist() == sorted(ranked[:count])


@modest
@given(labels_of_requests(), st.integers(0, 99), st.floats(0, 1))
def test_apply_plan_is_the_mean_of_each_run(labels: IntArray, seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(labels.size, 5)).astype(np.float32)
    before = hidden.copy()
    plan = FixedReduction(budget.FixedSchedule((share * 0.9,), 0, 0), labels).step(random.random(labels.size), None)
    expected = hidden.astype(np.float64)
    for run_members in np.split(plan.members, plan.run_starts[1:]) if plan.heads.size else []:
        expected[run_members[0]] = hidden[run_members].astype(np.float64).mean(0)
    np.testing.assert_allclose(apply_plan(hidden, plan), expected[plan.kept], atol=1e-6)
    np.testing.assert_array_equal(hidden, before)


def test_a_plan_for_no_visual_token_is_none_and_wants_nothing() -> None:
    reduction = Reduction(ReductionSettings(0.3, 0.6, 0.1, 28, 4), [TEXT] * 5)
    assert reduction.finished
    assert not reduction.wants_similarity
    assert not reduction.wants_importance
    assert reduction.step(None, None).kind == "none"
    assert reduction.shares == [0.0]


def test_a_missing_or_misshapen_vector_is_named() -> None:
    reduction = Reduction(ReductionSettings(0.3, 0.6, 0.1, 28, 4), [0, 0, 0, TEXT])
    with pytest.raises(ValueError, match="similarity is missing at call 0; give it wherever wants_similarity"):
        reduction.step(None, None)
    with pytest.raises(ValueError, match=r"similarity has shape \(3,\) at call 0; give \(4,\)"):
        reduction.step(np.zeros(3), None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.03, 0.6, 0.1, 28, 4), "smallest cost is 0.035715"),
        ((30, 0.6, 0.1, 28, 4), r"outside \(0, 1\]"),
        ((0.3, 0.6, 1.0, 28, 4), "ratio_lower_bound 1.0"),
        ((0.3, 0.6, 0.1, 28, 27), r"depth 27 is outside 0 \.\. 26"),
        ((0.9, 0.6, 0.1, 1, 0), "num_layers 1"),
    ],
)
def test_settings_out_of_range_are_refused(values: tuple[float, float, float, int, int], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        ReductionSettings(*values)


@pytest.mark.parametrize("layers", [3, 7, 28, 49])
def test_the_smallest_cost_itself_is_reached(layers: int) -> None:
    settings = ReductionSettings(1 / layers, 0.9, 0.1, layers, 1)
    reduction = Reduction(settings, np.r_[np.tile(np.arange(9), 5), TEXT])
    reduction.step(np.zeros(46), None)
    assert reduction.wants_importance
    reduction.step(np.zeros(46), np.ones(46))
    assert mean_entering(reduction, layers) == pytest.approx(45 / layers)


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_repeat_tie_whatever_the_last_bit_says(seed: int) -> None:
    """Two machines sum in another order: of identical separators the same ones must merge on both."""
    labels = np.array([*np.tile(np.arange(4), 6), -1])
    noise = np.random.default_rng(seed).uniform(-3e-7, 3e-7, labels.size)
    similarity = np.where(labels == 3, 1 + noise, 0.8).astype(np.float32)
    fixed = FixedReduction(budget.FixedSchedule((0.1,), 0, 0.5), labels).step(similarity, None)
    settings = ReductionSettings(0.6, 0.6, 0.1, 4, 2)
    adaptive = Reduction(settings, labels)
    plan = adaptive.step(similarity, None)
    dropped = np.setdiff1d(np.arange(labels.size), fixed.kept)
    assert dropped.tolist() == [7, 11]  # the first of the separators that have one before them
    again = Reduction(settings, labels).step(np.where(labels == 3, 1.0, 0.8).astype(np.float32), None)
    np.testing.assert_array_equal(plan.kept, again.kept)
