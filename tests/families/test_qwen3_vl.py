"""What is Qwen3-VL's alone: sizes over a whole video, the position table, DeepStack with and without reduction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from framefusion.errors import CheckpointError, VideoError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.families.qwen3_vl.row import preprocessing
from framefusion.export.families.qwen3_vl.weights import tower
from framefusion.export.options import BuildOptions
from framefusion.reduction.plan import Plan, merge_plan, prune_plan
from framefusion.reduction.policy import FixedReduction, ReductionState
from framefusion.runtime.families.qwen3_vl import Qwen3VLPreprocessing, TableSettings
from framefusion.runtime.generation.prefill import Prefilled, prefill
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.media.frame_sampling import FrameSampling, sample_indices
from framefusion.runtime.media.sources import as_image, as_video
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.visual_input import Grid, Rows, Tiles
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Prompt, Turn
from tests.families.case import IMAGE, VIDEO, clip, picture, relative_error
from tests.families.eager import eager_pipeline
from tests.families.qwen2_vl import QwenVLReference
from tests.families.qwen3_vl import Qwen3VLCase, video_processing
from tests.versions import needs

CASE = Qwen3VLCase()
LIMIT = 1e-5  # fp32 sums in another order after six layers; a wrong feature, place or mean is off by 1e-2 and more
TURNS = [Turn("user", (IMAGE, VIDEO, "Is it there?"))]
SHOWN = [picture(), clip()]
OPTIONS = BuildOptions(cost=0.5, similarity_lower_bound=0.7, depth=4)


@dataclass
class Subject:
    folder: Path
    pipeline: Pipeline
    reference: QwenVLReference
    prompt: Prompt
    rows: TokenRows

    def prefill(self, reduction: ReductionState | None, rows: TokenRows | None = None) -> Prefilled:
        return prefill(self.pipeline.segments, rows or self.rows, reduction, 4, Stopwatch())


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("three-features")
    CASE.write(folder, "three-features")
    pipeline = eager_pipeline(folder, tmp_path_factory.mktemp("bundle") / "b", OPTIONS)
    return Subject(folder, pipeline, CASE.reference(folder), *pipeline.read(TURNS, SHOWN))


sizes = st.integers(8, 2500)


@needs("transformers", "5.17", "it refuses small films and rounds large ones in another way")
@given(st.integers(2, 40), sizes, sizes, st.sampled_from([4096, 131072]), st.sampled_from([786432, 25165824]))
def test_sizes_equal_transformers(frames: int, height: int, width: int, low: int, high: int) -> None:
    rule = Qwen3VLPreprocessing(min_pixels=low, max_pixels=high)
    try:
        expected = video_processing().smart_resize(frames, height, width, 2, 32, low, high)
    except ValueError:
        with pytest.raises(VideoError, match="the limit is 200 to 1"):
            rule.frame_size(frames, height, width)
    else:
        assert rule.frame_size(frames, height, width) == expected


@needs("transformers", "5.17", "its processor knows no cap on the pixels of a frame")
@pytest.mark.parametrize(("frames", "high"), [(4, 786432), (64, 786432), (700, 786432), (6, 10**8)])
def test_the_limit_of_a_frame_equals_transformers(frames: int, high: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own `resize`, stopped before it touches pixels."""
    module, sizes = video_processing(), []
    monkeypatch.setattr(module.BaseVideoProcessor, "resize", lambda _self, size, **_: sizes.append(size))
    processor = module.Qwen3VLVideoProcessor.__new__(module.Qwen3VLVideoProcessor)
    film, size = (
        torch.empty(1, frames, 3, 720, 1280, device="meta"),
        SimpleNamespace(shortest_edge=4096, longest_edge=high),
    )
    processor.resize(film, size, 3, factor=32, temporal_factor=2, cap_pixels_per_frame=True)
    rule = Qwen3VLPreprocessing(min_pixels=4096, max_pixels=high, max_frame_tokens=768)
    assert rule.frame_size(frames, 720, 1280) == (sizes[0].height, sizes[0].width)


@given(
    st.integers(2, 4000), st.sampled_from([10.0, 23.976, 24.0, 25.0, 29.97, 30.0, 59.94]), st.sampled_from([1, 2, 4])
)
def test_frames_equal_transformers(total: int, fps: float, wanted: int) -> None:
    from transformers.video_utils import VideoMetadata

    given = SimpleNamespace(fps=wanted, min_frames=4, max_frames=768)
    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    expected = video_processing().Qwen3VLVideoProcessor.sample_frames(given, metadata)
    found = sample_indices(total, fps, FrameSampling("qwen3_vl", fps=wanted))
    assert found.tolist() == expected.tolist()


def test_one_frame_is_no_video() -> None:
    with pytest.raises(VideoError, match=r"1 frame\(s\), the model needs 2 or more"):
        sample_indices(1, 25.0, FrameSampling("qwen3_vl"))


@pytest.mark.parametrize(("frames", "total", "fps"), [(5, 31, 10.0), (6, 200, 29.97), (7, 9, 24.0), (2, 2, 25.0)])
def test_times_of_odd_and_even_films_equal_transformers(frames: int, total: int, fps: float, subject: Subject) -> None:
    """The last frame of an odd film stands for two, in its patches and in its time."""
    indices = np.linspace(0, total - 1, frames).round().astype(np.int64)
    video = Video(clip(frames), indices, fps, total, total / fps, 0.0)
    visual = subject.pipeline.manifest.preprocessing.video(video)
    pieces = ["<|video_pad|>" * p.labels.size if isinstance(p, Rows) else str(p) for p in visual.pieces]
    assert "".join(pieces) == CASE.shown("video", video)
    (expected,) = CASE.pixels(subject.folder, video)
    np.testing.assert_allclose(visual.tiles[0].values, expected, rtol=0, atol=1e-6)


@needs("transformers", "5.17", "it has no function that tells the weights alone")
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([2, 6, 48]))
def test_the_position_table_is_read_as_transformers_does(rows: int, columns: int, side: int) -> None:
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    grid = Grid(1, 2 * rows, 2 * columns)
    corners, shares = get_vision_interpolation_indices_and_weights(
        torch.tensor([grid]), side, "bilinear", align_corners=True, spatial_merge_size=2
    )
    settings = TableSettings(merge_size=2, table_side=side)
    inputs = settings.call(Tiles(np.zeros((1, grid.size, 1), np.float32), grid), head_dim=16).inputs
    table = np.random.default_rng(0).normal(size=(side * side, 3))
    expected = (table[corners.numpy()] * shares.numpy()[:, :, None]).sum(1)
    found = (table[inputs["corners"]] * inputs["shares"][:, :, None]).sum(0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_positions_equal_transformers(subject: Subject) -> None:
    """Each temporal grid is an image of its own, so the rules of all releases agree."""
    ids = torch.from_numpy(subject.prompt.token_ids)[None]
    config = json.loads((subject.folder / "config.json").read_text())
    kinds = torch.where(ids == config["video_token_id"], 2, torch.where(ids == config["image_token_id"], 1, 0))
    image, video = (torch.tensor([CASE.processed(item)[1]]) for item in media_of(subject))
    positions, delta = subject.reference.model.model.get_rope_index(
        ids, kinds, image_grid_thw=image, video_grid_thw=video
    )
    np.testing.assert_array_equal(subject.prompt.positions, positions[:, 0].numpy())
    assert subject.prompt.rope_delta == int(delta)


def media_of(subject: Subject) -> list[Any]:
    return [as_image(SHOWN[0]), as_video(SHOWN[1], subject.pipeline.manifest.sampling)]


def reference_features(subject: Subject) -> NDArray[np.float32]:
    """transformers' DeepStack features at their places in the prompt, zeros for text.  [K, S, D]"""
    added = np.zeros((3, *subject.rows.hidden.shape), np.float32)
    shown = [torch.stack(list(subject.reference.tower(item).deepstack_features)) for item in media_of(subject)]
    added[:, subject.prompt.row_places] = torch.cat(shown, 1).numpy()
    return added


def test_features_equal_transformers(subject: Subject) -> None:
    assert subject.rows.deepstack is not None
    assert relative_error(np.asarray(subject.rows.deepstack), reference_features(subject)) < LIMIT


def test_reduced_run_equals_transformers_layers(subject: Subject) -> None:
    """The plans of a run, carried out on transformers' own layers: features follow their tokens, and merge by mean."""
    request = Request(cost=0.4, similarity_lower_bound=0.95, ratio_lower_bound=0.01)
    reduction = subject.pipeline.reduction(subject.prompt, request)
    assert reduction is not None
    plans: list[Plan] = []
    step = reduction.step
    reduction.step = lambda *scores: plans.append(step(*scores)) or plans[-1]  # type: ignore[func-returns-value,method-assign]
    prefilled = subject.prefill(reduction)
    kinds = [plan.kind for plan in plans]
    assert kinds[:2] == ["merge", "merge"]  # the second of them with features still to come
    assert "prune" in kinds[2:]
    logits = reduced_logits(subject, plans)
    assert relative_error(prefilled.logits, logits) < LIMIT
    assert relative_error(prefilled.logits, reduced_logits(subject, plans, follow=False)) > 1e-2  # the test can fail


@torch.inference_mode()
def reduced_logits(subject: Subject, plans: list[Plan], follow: bool = True) -> NDArray[np.float32]:
    """`follow` False leaves the features of a merged token as they were."""
    model = subject.reference.model
    llm = model.model.language_model
    hidden, features = torch.from_numpy(np.array(subject.rows.hidden)), torch.from_numpy(reference_features(subject))
    cos, sin = llm.rotary_emb(hidden[None], torch.from_numpy(subject.prompt.positions)[:, None])
    state = [hidden[None], features, cos, sin]  # tokens are axis 1 of each

    def reduce(call: int) -> None:
        if call < len(plans):
            runs = np.split(plans[call].members, plans[call].run_starts[1:]) if plans[call].heads.size else []
            for rows in state[: 2 if follow else 1]:
                means = [rows[:, run].mean(1) for run in runs]
                for run, mean in zip(runs, means, strict=True):
                    rows[:, run[0]] = mean
            state[:] = [rows[:, plans[call].kept].clone() for rows in state]

    reduce(0)
    for index, layer in enumerate(llm.layers):
        normed = layer.input_layernorm(state[0])
        state[0] = state[0] + layer.self_attn(normed, position_embeddings=(state[2], state[3]), attention_mask=None)[0]
        reduce(index + 1)
        state[0] = state[0] + layer.mlp(layer.post_attention_layernorm(state[0]))
        if index < 3:
            state[0] = state[0] + state[1][index]
    logits: NDArray[np.float32] = model.lm_head(llm.norm(state[0]))[0, -1].numpy()
    return logits


def test_features_of_merged_tokens_are_means() -> None:
    labels = np.array([-1, 0, 1, 0, 1, 0, -1])
    draw = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    rows = TokenRows(draw[0], draw[0], draw[0], np.arange(7), draw)
    merged = rows.reduced(merge_plan(labels, np.array([0, 0, 0, 1, 0, 1, 0], bool)))
    assert merged.deepstack is not None
    np.testing.assert_array_equal(merged.origin, [0, 1, 2, 4, 6])
    deepstack = np.asarray(merged.deepstack)
    np.testing.assert_allclose(deepstack[:, 1], draw[:, [1, 3, 5]].mean(1), rtol=1e-6)
    np.testing.assert_array_equal(deepstack[:, [0, 2, 3, 4]], draw[:, [0, 2, 4, 6]])
    pruned = rows.reduced(prune_plan(labels, np.arange(7.0), keep=2))
    assert pruned.deepstack is not None
    np.testing.assert_array_equal(pruned.deepstack, draw[:, [0, 4, 5, 6]])


def test_chunks_take_their_features(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at layer 0: the last segment adds what layers 1 and 2 have, in chunks."""
    pipeline = eager_pipeline(subject.folder, tmp_path / "b", BuildOptions(cost=0.5, depth=0))
    assert [record.deepstack for record in pipeline.manifest.segments] == [0, 3]
    whole = prefill(pipeline.segments, subject.rows, None, 4, Stopwatch())
    monkeypatch.setattr(pipeline.backend, "chunk", 37)
    chunked = prefill(pipeline.segments, subject.rows, None, 4, Stopwatch())
    assert relative_error(chunked.logits, whole.logits) < LIMIT
    assert relative_error(chunked.logits, subject.prefill(None).logits) < LIMIT


def test_a_truncated_decoder_takes_the_features_it_has_layers_for(subject: Subject, tmp_path: Path) -> None:
    """Two of six layers: the second one's MLP sees the last token only, and no third feature is added."""
    pipeline = eager_pipeline(subject.folder, tmp_path / "b", BuildOptions(reduction="none", num_decoder_layer=2))
    assert [record.deepstack for record in pipeline.manifest.segments] == [2]
    model = subject.reference.model
    layers = model.model.language_model.layers
    model.model.language_model.layers = layers[:2]
    try:
        expected = subject.reference.logits(subject.prompt, media_of(subject), [])[-1]
    finally:
        model.model.language_model.layers = layers
    found = prefill(pipeline.segments, subject.rows, None, 4, Stopwatch()).logits
    assert relative_error(found, expected) < LIMIT


def test_fixed_graph_equals_segments(subject: Subject, tmp_path: Path) -> None:
    """The static graph that reduces inside, against the policy between segments: tokens and logits."""
    fixed = BuildOptions(
        reduction="fixed", cost=0.5, merge_shares=(0.2, 0.1, 0.1), prune_layer=3, max_input_len=300, max_text_len=120
    )
    pipeline = eager_pipeline(subject.folder, tmp_path / "b", fixed)
    schedule = pipeline.manifest.reduction.schedule
    assert schedule is not None
    inside = pipeline.prefill(subject.prompt, subject.rows, Request(max_new_tokens=4), Stopwatch())
    between = subject.prefill(FixedReduction(schedule, subject.prompt.labels))
    assert len(between.kept[-1]) < subject.prompt.token_ids.size
    np.testing.assert_array_equal(inside.kept[0], between.kept[-1])
    assert relative_error(inside.logits, between.logits) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["gqa", "portable"])
@pytest.mark.parametrize("reduction", ["adaptive", "fixed"])
@pytest.mark.parametrize("variant", ["three-features", "untied"])
def test_compiled_equals_eager(variant: str, reduction: Any, dialect: str, tmp_path: Path) -> None:
    """A build compares the bundle with the torch graphs: features, kept tokens, logits, sixteen decoded ones."""
    from framefusion.export.build import build

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    CASE.write(folder, variant)
    schedule: dict[str, Any] = (
        {"merge_shares": (0.2, 0.1, 0.1), "prune_layer": 3} if reduction == "fixed" else {"depth": 3}
    )
    options = BuildOptions(
        reduction=reduction,
        cost=0.5,
        dialect=dialect,
        max_input_len=400,
        max_text_len=200,
        **schedule,
    )
    check = build(Checkpoint(folder), tmp_path / "bundle", options).manifest.check
    assert check["passed"]
    assert check["kept_tokens"] < check["prompt_tokens"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("deepstack_visual_indexes", [0, 9], r"deepstack_visual_indexes \[0, 9\] are not layers 0 .. 3"),
        ("hidden_act", "silu", "hidden_act 'silu' of vision_config is not supported, 'gelu_pytorch_tanh' is"),
    ],
)
def test_what_a_checkpoint_cannot_say(name: str, value: Any, message: str, tmp_path: Path) -> None:
    CASE.write(tmp_path, "untied")
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        tower(Checkpoint(tmp_path))


def test_a_cap_for_each_frame_is_read(tmp_path: Path) -> None:
    CASE.write(tmp_path, "untied")
    path = tmp_path / "video_preprocessor_config.json"
    told = json.loads(path.read_text())
    assert preprocessing(Checkpoint(tmp_path)).max_frame_tokens is None
    for more, expected in (({"cap_pixels_per_frame": True}, 768), ({"max_video_tokens": 5}, 5)):
        told |= more
        path.write_text(json.dumps(told))
        assert preprocessing(Checkpoint(tmp_path)).max_frame_tokens == expected
