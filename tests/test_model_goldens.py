"""Whole tiny models against recordings of the reference code: kept tokens by layer, caches, logits, decoded tokens.

The recordings (tests/goldens/README.md) come from the reference running unmodified in transformers 4.45 and 4.51; here
the same weights run through our segments, in eager torch and as compiled ONNX segments in both dialects.

Tolerance: 2e-5 of the largest magnitude. fp32 sums in another order differ by about 1e-6 after six layers, and a wrong
token, position or mean is off by more than 1e-2.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.hashed_file import HashedFile
from framefusion.export.checkpoints.tensors.weights import load_parameters, write_parameters
from framefusion.export.eager.backend import EagerBackend
from framefusion.export.families import decoders
from framefusion.export.families.qwen2_vl import row as qwen2_vl
from framefusion.export.families.qwen2_vl.weights import tower
from framefusion.export.graphs.decoder import Segment
from framefusion.export.graphs.segments import SegmentPlan, cut_after, segment_module
from framefusion.export.graphs.tracing.dialects import DIALECTS
from framefusion.export.graphs.tracing.trace import save_graph, trace
from framefusion.reduction.policy import Reduction, ReductionSettings
from framefusion.runtime.backends.base import Backend
from framefusion.runtime.backends.host import host_array
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing
from framefusion.runtime.format.manifest import (
    SCHEMA_VERSION,
    EmbeddingRecord,
    Limits,
    Manifest,
    ModelRecord,
    ReductionRecord,
    SegmentRecord,
    VisionRecord,
)
from framefusion.runtime.generation.decode import Decoder
from framefusion.runtime.generation.prefill import prefill
from framefusion.runtime.generation.segments import Segments
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.tower_kinds import RopeSettings
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.positions import rope_tables, vision_rope_tables
from framefusion.runtime.text.prompt import PromptTemplate
from framefusion.runtime.text.sampling import GenerationConfig

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 2e-5
DEPTH = 4  # of six layers: as deep as a reduction can be
VARIANTS = {"dense": None, "layers28_as_it_stands": 28, "layers_true_6": 6}
CASES = [("qwen2", "s1_merge_then_prune"), ("qwen2", "s2_topk_budget"), ("qwen2_vl", "v1_merge_then_prune")]
BACKENDS = ["eager", "gqa", "portable"]


@dataclass(frozen=True)
class Recorded:
    """One setting of one recorded model."""

    model: str
    name: str

    @property
    def setting(self) -> dict[str, Any]:
        settings = json.loads((GOLDENS / self.model / "e2e.json").read_text())["settings"]
        return next(setting for setting in settings if setting["name"] == self.name)

    def arrays(self, variant: str) -> dict[str, NDArray[Any]]:
        with np.load(GOLDENS / self.model / f"{self.name}.{variant}.npz") as loaded:
            return dict(loaded)

    def labels(self) -> NDArray[Any]:
        given = self.arrays("input")
        if "patch_type" in given:
            return np.asarray(given["patch_type"][0])
        ids, video = given["input_ids"][0], Checkpoint(GOLDENS / self.model).config["video_token_id"]
        labels = np.full(ids.size, -1)
        places = int(given["video_grid_thw"][0, 1:].prod()) // 4  # 2x2 patches are a token
        labels[ids == video] = np.arange(int((ids == video).sum())) % places
        return labels

    def embeddings_and_positions(self) -> tuple[NDArray[Any], NDArray[Any]]:
        if self.model == "qwen2_vl":
            dense = self.arrays("dense")
            return dense["inputs_embeds"][0], dense["position_ids"][:, 0].astype(np.int64)
        embeddings = self.arrays("input")["inputs_embeds"][0]
        return embeddings, np.arange(len(embeddings))


@cache
def parts(model: str) -> tuple[Checkpoint, Any, Any, tuple[SegmentPlan, ...]]:
    checkpoint = Checkpoint(GOLDENS / model)
    family = replace(qwen2_vl.ROW, importance_rows=4 if model == "qwen2_vl" else 1)
    config = decoders.decoder_config(checkpoint, family)
    return checkpoint, family, config, cut_after(config.num_layers, range(DEPTH + 1))


def manifest_of(model: str, dialect: str) -> Manifest:
    _, family, config, plans = parts(model)
    facts = {name: getattr(config, name) for name in ModelRecord.__dataclass_fields__ if hasattr(config, name)}
    buckets = None if dialect != "portable" else (64, 96, 128, 192, 224, 256, 288, 320)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        tools={},
        model=ModelRecord(family=family.name, model_type=model, dtype="float32", **facts),
        limits=Limits(512, 1024),
        dialect=dialect,
        reduction=ReductionRecord("adaptive", depth=DEPTH),
        segments=tuple(
            SegmentRecord(p.name, f"{p.name}/graph.onnx", p.attention_layers, 1, p.scores, p.head, 0, buckets)
            for p in plans
        ),
        vision=VisionRecord("", "rope_2d", 0, 0, 0, 0, 0, 4, settings=RopeSettings(merge_size=2)),
        embedding=EmbeddingRecord("", "float32", 0, 0),
        prompt=PromptTemplate({}, ""),
        preprocessing=QwenVLPreprocessing(),
        sampling=FrameSampling("qwen2_vl"),
        generation=GenerationConfig(),
        files={},
    )


def compiled(model: str, dialect: str, folder: Path) -> Backend:
    checkpoint, family, config, plans = parts(model)
    graphs: dict[Any, Any] = {}
    for plan in plans:
        target = folder / plan.name
        target.mkdir(parents=True)
        sources = decoders.decoder_sources(checkpoint, family, plan)
        module = segment_module(config, plan)
        with HashedFile(target / "weights.bin") as file:
            places = write_parameters(module, checkpoint, sources, torch.float32, file)
        if plan.structure not in graphs:
            graphs[plan.structure] = trace(module, DIALECTS[dialect]).model
        save_graph(graphs[plan.structure], target / "graph.onnx", "weights.bin", places)
    return OnnxRuntimeBackend(folder, threads=1)


def eager(model: str) -> Backend:
    checkpoint, family, config, plans = parts(model)

    def loader(plan: SegmentPlan) -> Callable[[], Segment]:
        sources = decoders.decoder_sources(checkpoint, family, plan)
        return lambda: load_parameters(segment_module(config, plan), checkpoint, sources, torch.float32)

    return EagerBackend({f"{plan.name}/graph.onnx": loader(plan) for plan in plans})


@pytest.fixture(scope="module")
def segments_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Segments]:
    @cache
    def make(model: str, kind: str) -> Segments:
        backend = eager(model) if kind == "eager" else compiled(model, kind, tmp_path_factory.mktemp(model + kind))
        return Segments(manifest_of(model, kind), backend)

    return make


def relative(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def in_each_backend() -> Iterator[Any]:
    """Compiling a model takes seconds: before a commit one is compiled, in one dialect."""
    for model, name in CASES:
        for kind in BACKENDS:
            slow = kind == "portable" or (kind == "gqa" and model != "qwen2_vl")
            yield pytest.param(model, name, kind, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("model", "name", "kind"), [*in_each_backend()])
def test_equals_the_recording(
    model: str, name: str, kind: str, variant: str, segments_of: Callable[[str, str], Segments]
) -> None:
    recorded, segments = Recorded(model, name), segments_of(model, kind)
    setting, golden, config = recorded.setting, recorded.arrays(variant), parts(model)[2]
    hidden, positions = recorded.embeddings_and_positions()
    layers = VARIANTS[variant]
    reduction = None
    if layers is not None:
        thresholds = ReductionSettings(setting["cost"], setting["sim"], setting["ratio"], layers, DEPTH)
        reduction = Reduction(thresholds, recorded.labels())

    def tables(places: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        cos, sin = rope_tables(places, config.head_dim, config.rope_theta, config.mrope_section)
        half = config.head_dim // 2
        return np.ascontiguousarray(cos[:, :half]), np.ascontiguousarray(sin[:, :half])

    before = hidden.copy()
    rows = TokenRows(hidden, *tables(positions), np.arange(len(hidden)))
    prefilled = prefill(segments, rows, reduction, 8, Stopwatch())
    np.testing.assert_array_equal(hidden, before, err_msg="the caller's embeddings were changed")

    stated = setting[variant]
    kept = [origin for origin, cache in zip(prefilled.kept, prefilled.caches, strict=True) for _ in cache.keys]
    assert [len(places) for places in kept] == stated["kv_len_per_layer_after_prefill"]
    for layer, places in enumerate(kept):
        if f"kv_kept_layer{layer}" in golden:
            np.testing.assert_array_equal(places, golden[f"kv_kept_layer{layer}"])
    first, last = prefilled.caches[0], prefilled.caches[-1]
    for cache_, index, layer in ((first, 0, 0), (last, len(last.keys) - 1, 5)):
        if f"kcache_layer{layer}" in golden:
            length = int(cache_.lengths[index])
            assert relative(host_array(cache_.keys[index][:, :, :length]), golden[f"kcache_layer{layer}"]) < TOLERANCE
            assert relative(host_array(cache_.values[index][:, :, :length]), golden[f"vcache_layer{layer}"]) < TOLERANCE
    assert relative(prefilled.logits, golden["prefill_logits_last"]) < TOLERANCE

    decoder, logits, tokens = Decoder(segments, prefilled.caches), prefilled.logits, []
    table = Checkpoint(GOLDENS / model).tensor("model.embed_tokens.weight").float().numpy()
    start = len(hidden) + stated.get("rope_delta", 0)
    for step, expected in enumerate(golden["decode_logits"]):
        assert relative(logits, expected) < TOLERANCE, f"step {step}"
        tokens.append(int(logits.argmax()))
        place = np.full((3, 1), start + step) if config.mrope_section else np.array([start + step])
        cos, sin = tables(place)
        if step < 7:
            logits = decoder.step(table[tokens[-1]], cos[0], sin[0])
    assert tokens == stated["decode_tokens"]


@pytest.mark.parametrize("variant", ["dense", "layers_true_6"])
@pytest.mark.parametrize("kind", ["eager", pytest.param("gqa", marks=pytest.mark.slow)])
def test_equals_the_recording_in_chunks(
    kind: str, variant: str, segments_of: Callable[[str, str], Segments], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last segment's prefill in parts of 48 tokens, the last part a short one."""
    for model, name in CASES:
        monkeypatch.setattr(segments_of(model, kind).backend, "chunk", 48)
        test_equals_the_recording(model, name, kind, variant, segments_of)


def test_vision_tower_equals_the_recording() -> None:
    recorded, checkpoint = Recorded("qwen2_vl", "v1_merge_then_prune"), parts("qwen2_vl")[0]
    plan = tower(checkpoint)
    module = load_parameters(plan.module, checkpoint, plan.sources, torch.float32)
    given = recorded.arrays("input")
    grids, height, width = given["video_grid_thw"][0]
    cos, sin = vision_rope_tables(int(height), int(width), 2, plan.head_dim)
    half = plan.head_dim // 2
    patches = torch.from_numpy(given["pixel_values_videos"]).reshape(int(grids), int(height * width), -1)
    with torch.inference_mode():
        tokens = module(patches, *(torch.from_numpy(table[None, :, :half].copy()) for table in (cos, sin)))
    assert relative(tokens.numpy(), recorded.arrays("dense")["video_embeds"]) < TOLERANCE
