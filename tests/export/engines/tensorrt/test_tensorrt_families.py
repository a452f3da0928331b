"""Every family's tower and a segment of its decoder as engines, and profiles that admit every call of the tower.

What the library refuses in a family's graph shows here by the family's name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.engines.tensorrt.build import build_engine
from framefusion.export.engines.tensorrt.network import parse_plain
from framefusion.export.engines.tensorrt.network_check import layer_kinds
from framefusion.export.engines.tensorrt.profiles import segment_spec, tower_spec
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.writing.parts import Builder
from framefusion.runtime.backends.tensorrt.library import load_library
from framefusion.runtime.format.engine_record import ProfileRecord
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.generation.embedder import PATCHES_AT_ONCE
from framefusion.runtime.media.visual_input import Tiles, VisualInput
from tests.export.engines.tensorrt.test_tensorrt_plain import rewritten, run
from tests.families import CASES
from tests.families.case import FamilyCase, clip, picture
from tests.families.test_families import name_of

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.slow
TARGETS = ("8.6", "8.9", "12.0")
OPTIONS = BuildOptions(cost=0.5, dialect="portable", dtype="float16")


def shown(manifest: Manifest) -> list[VisualInput]:
    """A film, a picture and one of many pictures, in sizes that differ."""
    from framefusion.runtime.media.sources import as_video

    rule, sampling = manifest.preprocessing, manifest.sampling
    films = [as_video(clip(8, *size), sampling) for size in ((84, 112), (150, 60))]
    several = rule.for_images(2)
    images = [rule.for_images(1).image(picture(60, 200)), several.image(picture(112, 70, seed=2))]
    return [*(rule.video(film) for film in films), *images]


def admits(profile: ProfileRecord, shapes: dict[str, tuple[int, ...]]) -> bool:
    ranges = {name: np.array(profile.shapes[name]) for name in shapes}
    return all(np.all((ranges[name][0] <= shape) & (shape <= ranges[name][-1])) for name, shape in shapes.items())


def calls_of(manifest: Manifest, tiles: Tiles) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the tower's inputs for a full call and for a last one with a single picture."""
    count, patches, width = tiles.values.shape
    call = manifest.vision.settings.call(tiles, manifest.vision.head_dim)
    shared = {name: array.shape for name, array in call.inputs.items()}
    numbers = (min(count, max(1, PATCHES_AT_ONCE // patches)), 1)
    return [{"patches": (number, patches, width), **shared} for number in numbers]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_tower_and_a_segment(case: FamilyCase, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    case.write(tmp_path / "checkpoint", case.variants[0])
    builder = Builder(BuildPlan(Checkpoint(tmp_path / "checkpoint"), OPTIONS))
    producers, manifest = builder.producers(), builder.manifest({}, None)
    record = manifest.segments[1]
    for part in ("vision", f"segments/{record.name}"):
        producers[part](tmp_path)
    spec: Any = tower_spec(tmp_path, manifest, "tensorrt-rtx", TARGETS)
    for visual in shown(manifest):
        for tiles in visual.tiles:
            for shapes in calls_of(manifest, tiles):
                assert any(admits(profile, shapes) for profile in spec.profiles), (shapes, spec.profiles)
    tower = build_engine(replace(spec, profiles=spec.profiles[-1:]), tmp_path / "tower")  # the largest pictures
    assert tower.layer_kinds["ATTENTION_INPUT"] > 0
    assert "KV_CACHE_UPDATE" not in tower.layer_kinds
    assert next(tensor.name for tensor in tower.tensors if tensor.mode == "output") == "tokens"
    spec = segment_spec(tmp_path, manifest, record, record.graph, "tensorrt-rtx", TARGETS)
    segment = build_engine(replace(spec, profiles=spec.profiles[-1:]), tmp_path / "segment")  # the decode
    assert (segment.layer_kinds["ATTENTION_INPUT"], segment.layer_kinds["KV_CACHE_UPDATE"]) == (1, 2)
    assert {"similarity", "importance"} <= {tensor.name for tensor in segment.tensors}
    tower_graph = tmp_path / manifest.vision.graph
    assert_plain_is_the_same(tower_graph, tower_feeds(tower_graph, manifest, shown(manifest)[-1]), 0)
    assert_plain_is_the_same(tmp_path / record.graph, segment_feeds(tmp_path / record.graph), 1)


def assert_plain_is_the_same(graph: Path, feeds: dict[str, Any], caches: int) -> None:
    """What is built for TensorRT 10: parsed by the library at hand, and its numbers beside those of the graph."""
    library = load_library("tensorrt-rtx")
    builder = library.builder()
    parsed = parse_plain(library, builder, graph, caches, one_length=True)
    assert not {"ATTENTION_INPUT", "KV_CACHE_UPDATE"} & layer_kinds(parsed.network).keys()
    model = onnx.load(str(graph))
    found, expected = run(rewritten(model, one_length=True), feeds), run(graph, feeds)
    compared = [name for name in expected if name in found]
    assert len(compared) + 2 * caches == len(expected)
    for name in compared:
        error = np.abs(found[name].astype(np.float32) - expected[name].astype(np.float32)).max()
        assert error <= 2e-2 * np.abs(expected[name]).max(), name  # fp16, a layer or some


def tower_feeds(graph: Path, manifest: Manifest, visual: VisualInput) -> dict[str, Any]:
    """Two tiles at most, in the types of the graph."""
    tiles = visual.tiles[0]
    call = manifest.vision.settings.call(tiles, manifest.vision.head_dim)
    values = {"patches": tiles.values[:2], **call.inputs}
    inputs = onnx.load(str(graph), load_external_data=False).graph.input
    types = {value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in inputs}
    return {name: array.astype(types[name]) for name, array in values.items()}


def segment_feeds(graph: Path) -> dict[str, Any]:
    """A chunk of six tokens behind five."""
    random = np.random.default_rng(0)
    sizes = {"tokens": 6, "batch": 1}
    feeds: dict[str, Any] = {"kv_len": np.array([11]), "last": np.array([5]), "previous": np.arange(6) - 1}
    for value in onnx.load(str(graph), load_external_data=False).graph.input:
        if value.name not in feeds:
            axes = value.type.tensor_type.shape.dim
            shape = [axis.dim_value or sizes.get(axis.dim_param, 24) for axis in axes]
            feeds[value.name] = random.standard_normal(shape).astype(np.float16)
    return feeds
