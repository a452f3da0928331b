"""One method, three places: the live model, the torch graphs and the compiled bundle keep the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from framefusion.errors import PromptError, ReducerError
from framefusion.export.build import build, check_again
from framefusion.export.check.verify import truncated
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.backend import EagerBackend
from framefusion.export.eager.pipeline import eager_loaders
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.report.inspection import PromptSize, render, report
from framefusion.interface import apply_framefusion, remove_framefusion
from framefusion.reducers import REDUCERS, load_reducer
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.generation.prefill import Prefilled
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.media.sources import as_image, as_video
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Prompt, Turn, Visual
from framefusion.storage.records import from_json
from tests.commands import assert_refused, export, run
from tests.families.case import clip, picture
from tests.families.qwen2_vl import QwenVLReference, processed
from tools.tiny import clips

TRAINED = Path(__file__).parent / "models" / "tiny_qwen2_vl"
COST = 0.4
SEED = 5
ASK = "What happens?"

Kept = list[NDArray[np.int64]]


def by_layer(prefilled: Prefilled) -> Kept:
    """Places in the prompt of the tokens that entered each layer."""
    pairs = zip(prefilled.kept, prefilled.caches, strict=True)
    return [kept for kept, cache in pairs for _ in cache.keys]


def same(first: Kept, second: Kept) -> bool:
    return all(np.array_equal(*pair) for pair in zip(first, second, strict=True))


def prefill(pipeline: Pipeline, prompt: Prompt, rows: TokenRows, name: str, cost: float) -> Prefilled:
    return pipeline.prefill(prompt, rows, Request(1, cost=cost, reducer=name, seed=SEED), Stopwatch())


def live_reference(folder: Path, manifest: Manifest) -> QwenVLReference:
    rule: Any = manifest.preprocessing
    limits = {"min_pixels": rule.min_pixels, "max_pixels": rule.max_pixels}

    def process(media: Any) -> Any:
        return processed(media.frames if hasattr(media, "frames") else np.stack([media, media]), **limits)

    return QwenVLReference(folder, "Qwen2VLForConditionalGeneration", process)


def live(reference: QwenVLReference, prompt: Prompt, visuals: Any, name: str, cost: float, bundle: Manifest) -> Any:
    """The record of the one row."""
    record = bundle.reduction
    bounds = record.similarity_lower_bound, record.ratio_lower_bound
    handle = apply_framefusion(reference.model, cost, *bounds, reducer=name, depth=record.depth, seed=SEED)
    try:
        reference.logits(prompt, visuals, [])
    finally:
        remove_framefusion(reference.model)
    return handle.last[0]


@pytest.fixture(scope="module")
def eager(checkpoint: Path, pipeline: Pipeline) -> Pipeline:
    plan = BuildPlan(Checkpoint(checkpoint), from_json(BuildOptions, pipeline.manifest.options))
    return Pipeline(pipeline.bundle, EagerBackend(eager_loaders(plan)))


@pytest.fixture(scope="module")
def reference(checkpoint: Path, pipeline: Pipeline) -> QwenVLReference:
    return live_reference(checkpoint, pipeline.manifest)


@pytest.fixture(scope="module")
def read(pipeline: Pipeline) -> tuple[Prompt, TokenRows, list[Any]]:
    frames, image, sampling = clip(), picture(), pipeline.manifest.sampling
    prompt, rows = pipeline.read([Turn("user", (Visual.IMAGE, Visual.VIDEO, ASK))], [image, frames])
    return prompt, rows, [as_image(image), as_video(frames, sampling)]


@pytest.mark.parametrize("name", REDUCERS)
def test_the_three_keep_the_same_tokens(
    name: str,
    pipeline: Pipeline,
    eager: Pipeline,
    reference: QwenVLReference,
    read: tuple[Prompt, TokenRows, list[Any]],
) -> None:
    prompt, rows, visuals = read
    compiled = prefill(pipeline, prompt, rows, name, COST)
    torch = prefill(eager, prompt, rows, name, COST)
    record = live(reference, prompt, visuals, name, COST, pipeline.manifest)
    assert same(by_layer(compiled), by_layer(torch))
    assert same(by_layer(compiled), list(record.kept))
    assert record.calls == tuple(compiled.history) == tuple(torch.history)
    over = any(call.outcome for call in record.calls)
    assert record.cost == 1 if name == "none" else over or record.cost == pytest.approx(COST, abs=1 / prompt.num_visual)


def test_the_random_reducer_draws_anew_with_another_seed(
    pipeline: Pipeline, read: tuple[Prompt, TokenRows, list[Any]]
) -> None:
    prompt, rows, _ = read
    requests = [Request(1, cost=0.4, reducer="random", seed=seed) for seed in (1, 1, 2)]
    first, again, other = (by_layer(pipeline.prefill(prompt, rows, request, Stopwatch())) for request in requests)
    assert same(first, again)
    assert not same(first, other)


# --- Plans and refusals ---------------------------------------------------------------------------------------------


def plan_of(checkpoint: Path, **options: Any) -> BuildPlan:
    return BuildPlan(Checkpoint(checkpoint), BuildOptions(max_input_len=512, **options))


@pytest.mark.parametrize(
    ("options", "segments", "depth"),
    [
        ({"reducer": "framefusion", "depth": 1}, ["layer00", "layer01", "rest"], 1),
        ({"reducer": "fastv", "cost": 0.6}, ["layer01", "rest"], 1),
        ({"reducer": "fastv", "cost": 0.4}, ["layer00", "rest"], 0),
        ({"reducer": "fastv", "depth": 0, "cost": 0.6}, ["layer00", "rest"], 0),
        *(({"reducer": name}, ["decoder"], None) for name in ("none", "random", "uniform", "evs", "vidcom2")),
    ],
)
def test_the_decoder_is_cut_only_where_the_reducer_acts(
    checkpoint: Path, options: dict[str, Any], segments: list[str], depth: int | None
) -> None:
    plan = plan_of(checkpoint, **options)
    assert [segment.name for segment in plan.segments] == segments
    assert plan.reduction.depth == depth
    assert plan.reduction.reducer == options["reducer"]
    layers = [layer for segment in plan.segments for layer in segment.attention_layers]
    assert layers == list(range(plan.config.num_layers))


def test_an_exact_count_before_the_llm_has_a_size_of_its_own(checkpoint: Path) -> None:
    options = {"dialect": "portable", "cost": 0.3, "max_text_len": 90}
    exact = set(plan_of(checkpoint, reducer="evs", **options).buckets() or ())
    assert exact - set(plan_of(checkpoint, reducer="framefusion", **options).buckets() or ()) == {90 + round(0.3 * 422)}


def test_a_truncated_model_is_cut_at_the_same_calls() -> None:
    plan = BuildPlan(Checkpoint(TRAINED), BuildOptions(reducer="fastv", cost=0.3))
    smaller = truncated(plan, plan.options)
    assert smaller is not None
    assert smaller.num_decoder_layer == 7  # 2 / 0.3 is below 7
    again = BuildPlan(plan.checkpoint, smaller)
    assert [segment.name for segment in again.segments] == [segment.name for segment in plan.segments]
    assert truncated(plan, replace(plan.options, cost=0.05)) is not None


def test_a_reducer_that_acts_elsewhere_is_refused_with_both_calls(checkpoint: Path, pipeline: Pipeline) -> None:
    plan = plan_of(checkpoint, reducer="evs", cost=0.6)
    manifest = replace(pipeline.manifest, reduction=plan.reduction, segments=plan.segment_records)
    whole = Pipeline(pipeline.bundle.with_manifest(segments=pipeline.manifest.segments), pipeline.backend)
    whole.manifest = manifest
    labels = np.array([-1, *range(9), *range(9), -1])
    prompt: Any = type("Labels", (), {"labels": labels})
    for name, calls in (("framefusion", "0, 1"), ("fastv", "1")):
        message = (
            f"reducer {name} acts at calls {calls} at cost 0.6, this bundle was cut for evs at calls 0: build it with"
        )
        with pytest.raises(ReducerError, match=message):
            whole.reduction(prompt, Request(reducer=name))
    state = whole.reduction(prompt, Request(reducer="random"))
    assert state is not None
    with pytest.raises(ReducerError, match="'fast' is unknown; known are framefusion"):
        whole.reduction(prompt, Request(reducer="fast"))


@pytest.mark.parametrize("mode", ["none", "fixed"])
def test_a_reducer_that_is_built_in_cannot_be_exchanged(mode: Any, pipeline: Pipeline) -> None:
    builtin = "none" if mode == "none" else "framefusion"
    reduction = replace(pipeline.manifest.reduction, mode=mode, reducer=builtin)
    bundle = Pipeline(pipeline.bundle.with_manifest(reduction=reduction), pipeline.backend)
    prompt: Any = type("Labels", (), {"labels": np.array([-1, 0, 0, -1])})
    assert bundle.reduction(prompt, Request(reducer=builtin)) is None
    with pytest.raises(PromptError, match=f"reduction is {mode}, its reducer {builtin} .* built in, evs was asked"):
        bundle.reduction(prompt, Request(reducer="evs"))


def test_options_that_contradict_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for flags in (("--reduction", "none", "--reducer", "evs"), ("--reduction", "fixed", "--reducer", "none")):
        result = export("plan", checkpoint, "-o", tmp_path / "bundle", *flags)
        assert_refused(result, ReducerError, f"{flags[3]} belongs to --reduction adaptive, not {flags[1]}")
    result = export("build", checkpoint, "-o", tmp_path / "bundle", "--reducer", "fast")
    assert_refused(result, ReducerError, "'fast' is unknown; known are framefusion, none, random")
    assert not (tmp_path / "bundle").exists()


def test_the_commands_know_the_reducers(bundle: Path, film: Path, checkpoint: Path, tmp_path: Path) -> None:
    listed = run("reducers").stdout
    assert all(name in listed for name in REDUCERS)
    answer = run("generate", bundle, "--video", film, "--prompt", ASK, "--reducer", "none", "--max-new-tokens", 1)
    assert "call 0: none keeps 64 of 64, the cost pays for 26: this reducer drops nothing" in answer.stderr
    assert_refused(run("generate", bundle, "--video", film, "--prompt", ASK, "--reducer", "x"), ReducerError, "'x' is")
    assert "reducer: framefusion; cut for calls 0, 1, 2" in export("inspect", bundle).stdout
    plan = export("plan", checkpoint, "-o", tmp_path / "b", "--reducer", "evs", "--cost", 0.5).stdout
    assert "reduction: adaptive by evs, keeps 50 %" in plan


# --- Bundles of their own -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Bundles of the trained model, each cut for one reducer, built and checked once."""
    bundles: dict[str, Bundle] = {}

    def of(name: str) -> Bundle:
        if name not in bundles:
            folder = tmp_path_factory.mktemp("own") / name
            options = BuildOptions(reducer=name, cost=0.3, max_input_len=512)
            bundles[name] = Bundle(build(Checkpoint(TRAINED), folder, options).folder)
        return bundles[name]

    return of


@pytest.fixture(scope="module")
def trained_reference(own_bundle: Callable[[str], Bundle]) -> QwenVLReference:
    return live_reference(TRAINED, own_bundle("framefusion").manifest)


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCERS)
def test_a_bundle_of_its_own_keeps_what_any_other_keeps(
    name: str, own_bundle: Callable[[str], Bundle], trained_reference: QwenVLReference
) -> None:
    """The trained model: own bundle, checked against the eager model; FrameFusion's bundle; the live model."""
    special, general = Pipeline(own_bundle(name), threads=1), Pipeline(own_bundle("framefusion"), threads=1)
    check = special.manifest.check
    assert check["passed"]
    assert any(line["what"] == "reduced decoded logits" for line in check["lines"]) == (name != "none")
    assert check["kept_tokens"] < check["prompt_tokens"] or name == "none"
    if name == "fastv":
        assert check_again(special.bundle.folder, Checkpoint(TRAINED))["passed"]
    if name not in ("none", "framefusion"):
        assert f"adaptive by {name}, keeps 30 %" in render(report(special.bundle.folder, PromptSize()))
    assert general.manifest.reduction.depth == 7
    for seed in range(clips.HELD_OUT + 800_000, clips.HELD_OUT + 800_003):
        drawn = clips.draw_clip(seed)
        prompt, rows = general.read([Turn("user", (Visual.VIDEO, drawn.question))], [drawn.frames])
        visuals = [as_video(drawn.frames, general.manifest.sampling)]
        for cost in (0.5, 0.3):
            anywhere = prefill(general, prompt, rows, name, cost)
            record = live(trained_reference, prompt, visuals, name, cost, general.manifest)
            assert same(by_layer(anywhere), list(record.kept))
            if name == "none":
                continue
            here = special.prefill(prompt, rows, Request(1, cost=cost, seed=SEED), Stopwatch())
            assert same(by_layer(here), by_layer(anywhere))
            assert np.abs(here.logits - anywhere.logits).max() <= 1e-4 * np.abs(anywhere.logits).max()
            assert load_reducer(name).static == (name != "framefusion")


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["gqa", "portable"])
@pytest.mark.parametrize(("name", "dtype"), [("fastv", "float16"), ("evs", "float16"), ("vidcom2", "float32")])
def test_other_dialects_and_types_reproduce_the_model(
    checkpoint: Path, tmp_path: Path, name: str, dtype: Any, dialect: str
) -> None:
    options = BuildOptions(reducer=name, cost=0.6, max_input_len=384, dialect=dialect, dtype=dtype)
    manifest = build(Checkpoint(checkpoint), tmp_path / "bundle", options).manifest
    assert manifest.check["passed"]
    assert manifest.check["kept_tokens"] < manifest.check["prompt_tokens"]
