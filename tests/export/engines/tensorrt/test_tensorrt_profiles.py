"""Sizes that engines are built for: every bucket, every decode, every picture that a family can show. No library."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framefusion.errors import BundleError, VideoError
from framefusion.export.engines.tensorrt import profiles as tensorrt_profiles
from framefusion.export.engines.tensorrt.profiles import cache_capacities, most_rows, segment_spec, tower_profiles
from framefusion.runtime.backends.tensorrt.engine import batch_sizes
from framefusion.runtime.families.minicpmv import MiniCpmVPreprocessing, layout_of
from framefusion.runtime.families.nvila import NvilaPreprocessing, ScalesSettings
from framefusion.runtime.families.qwen2_5_vl import WindowSettings, windows_of
from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing, grid_of
from framefusion.runtime.families.qwen3_vl import Qwen3VLPreprocessing
from framefusion.runtime.format.manifest import FixedRecord, Limits, SegmentRecord
from framefusion.runtime.generation.embedder import PATCHES_AT_ONCE
from framefusion.runtime.media.tower_kinds import PlainSettings, PooledSettings, RopeSettings, TowerSettings

BUCKETS = (64, 80, 96)
PREFILL = {"hidden": (1, "tokens", 8), "kv_len": (2,), "past_key_0": (1, 1, "capacity_0", 4),
           "past_key_1": (1, 1, "capacity_1", 4)}  # fmt: skip
SIDES = st.integers(28, 4000)


def manifest(**other: Any) -> Any:
    """The entries of a manifest that sizes follow from."""
    entries: dict[str, Any] = {"limits": Limits(96, 120), "fixed": None, "dialect": "portable",
                               "model": SimpleNamespace(dtype="float16")}  # fmt: skip
    return SimpleNamespace(**(entries | other))


def segment(**other: Any) -> SegmentRecord:
    given: dict[str, Any] = {
        "attention_layers": (2, 3),
        "num_mlps": 3,
        "scores": False,
        "head": True,
        "buckets": BUCKETS,
    }
    return SegmentRecord("rest", "g.onnx", weight_bytes=1, **(given | other))


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_profiles, "graph_axes", lambda graph: PREFILL)


def test_a_profile_for_each_bucket_and_a_decode_of_two(axes: None) -> None:
    spec = segment_spec(Path("b"), manifest(), segment(), "g.onnx", "tensorrt-rtx", ("8.6",))
    assert [(profile.name, profile.tokens) for profile in spec.profiles] == [
        ("prefill 64", 64), ("prefill 80", 80), ("prefill 96", 96), ("decode", 2)
    ]  # fmt: skip
    for profile, tokens in zip(spec.profiles, (*BUCKETS, 2), strict=True):
        assert profile.shapes["hidden"] == ((1, tokens, 8),)
        assert profile.shapes["past_key_1"] == ((1, 1, 128, 4),)
        assert profile.shapes["kv_len"] == ((2,),)
    assert (spec.graph, spec.targets, spec.capacities) == (Path("b/g.onnx"), ("8.6",), (128, 128))


BATCHED = {"hidden": ("batch", "tokens", 8), "kv_len": ("lengths",), "past_key_0": ("batch", 1, "capacity_0", 4),
           "past_key_1": ("batch", 1, "capacity_1", 4)}  # fmt: skip


@pytest.mark.parametrize(
    ("most", "rows"), [(None, (2, 4, 8)), (1, ()), (2, (2,)), (6, (2, 4, 6)), (16, (2, 4, 8, 16)), (8, (2, 4, 8))]
)
@pytest.mark.parametrize("variant", ["attention", "plain"])
def test_a_step_of_several_requests_has_a_profile_for_each_power_of_two(
    monkeypatch: pytest.MonkeyPatch, most: int | None, rows: tuple[int, ...], variant: str
) -> None:
    monkeypatch.setattr(tensorrt_profiles, "graph_axes", lambda graph: BATCHED)
    spec = segment_spec(Path("b"), manifest(), segment(), "g.onnx", "tensorrt-rtx", ("8.6",), variant, most)
    single = len(BUCKETS) + 1
    assert [profile.shapes["hidden"][0][0] for profile in spec.profiles[:single]] == [1] * single
    steps = spec.profiles[single:]
    assert [(profile.name, profile.tokens) for profile in steps] == [(f"decode {n} rows", 1) for n in rows]
    for profile, count in zip(steps, rows, strict=True):
        assert profile.shapes["hidden"] == ((count, 1, 8),)
        assert profile.shapes["past_key_1"] == ((count, 1, 128, 4),)
        assert profile.shapes["kv_len"] == ((2 * count,),)
    assert most_rows(spec.profiles) == max(rows, default=1)
    record: Any = SimpleNamespace(profiles=spec.profiles)
    assert batch_sizes(record) == rows


def test_a_graph_of_one_row_is_compiled_for_one_request_unless_more_are_asked_for(axes: None) -> None:
    record = segment()
    assert most_rows(segment_spec(Path("b"), manifest(), record, "g.onnx", "tensorrt", (), max_batch_size=1).profiles)
    with pytest.raises(BundleError, match=r"b/g.onnx takes one row, .*: rebuild the bundle, or leave out --max-batch"):
        segment_spec(Path("b"), manifest(), record, "g.onnx", "tensorrt", (), max_batch_size=2)


def test_caches_have_room_for_the_padding_of_a_decode_and_of_the_largest_bucket() -> None:
    assert cache_capacities(manifest(limits=Limits(96, 128)), segment()) == (144, 144)  # 128 and the dummy's slot
    assert cache_capacities(manifest(limits=Limits(96, 127)), segment()) == (128, 128)
    assert cache_capacities(manifest(), segment(buckets=(64, 200))) == (208, 208)


def test_the_fixed_mode_has_caches_as_long_as_its_reductions_leave_them(axes: None) -> None:
    fixed = FixedRecord(32, 64, 8, (96, 70, 60, 40), (26, 10, 20))
    fixed_manifest, record = manifest(fixed=fixed), segment(buckets=None, decode_graph="d.onnx")
    assert cache_capacities(fixed_manifest, record) == (96, 80)  # 60 + 24 + 1, 40 + 24 + 1
    decode = segment_spec(Path("b"), fixed_manifest, record, "d.onnx", "tensorrt-rtx", ())
    assert [(profile.name, profile.tokens) for profile in decode.profiles] == [("decode", 2)]


def test_a_bundle_without_static_sizes_is_refused(axes: None) -> None:
    with pytest.raises(BundleError, match=r"b is of the gqa dialect.*--dialect portable"):
        segment_spec(Path("b"), manifest(dialect="gqa"), segment(buckets=None), "g.onnx", "tensorrt-rtx", ())


def tower(preprocessing: Any, kind: TowerSettings, axes: dict[str, Any], longest: int = 8192) -> Any:
    vision = SimpleNamespace(settings=kind, patches_per_token=4.0)
    fixed_manifest = manifest(preprocessing=preprocessing, vision=vision, limits=Limits(longest, longest + 64))
    return tower_profiles(fixed_manifest, axes)


GRIDS = {"patches": ("grids", "patches", 1176), "cos": (1, "patches", 40), "slots": ("merge_blocks",),
         "units": ("windows", 16)}  # fmt: skip
QWEN = QwenVLPreprocessing(image_max_pixels=12845056, image_min_pixels=3136)


def admits(profile: Any, shapes: dict[str, tuple[int, ...]]) -> bool:
    def fits(name: str, shape: tuple[int, ...]) -> bool:
        low, *_, high = profile.shapes[name]
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    return all(fits(name, shape) for name, shape in shapes.items())


@settings(max_examples=200)
@given(SIDES, SIDES, st.integers(1, 64))
def test_every_frame_and_image_of_a_qwen_fits_a_profile(height: int, width: int, frames: int) -> None:
    profiles = tower(QWEN, WindowSettings(merge_size=2, window=4), GRIDS)
    image = QWEN.image_size(height, width)
    grids = [(grid_of(frames, height, width, QWEN).height, grid_of(frames, height, width, QWEN).width),
             (image[0] // QWEN.patch_size, image[1] // QWEN.patch_size)]  # fmt: skip
    for rows, columns in grids:
        patches = rows * columns
        if patches > 4 * 8192:  # its tokens fit into no prompt
            continue
        units, _ = windows_of(rows // 2, columns // 2, 4)
        for count in (1, max(1, PATCHES_AT_ONCE // patches)):
            shapes = {"patches": (count, patches, 1176), "cos": (1, patches, 40), "slots": (patches // 4,),
                      "units": units.shape}  # fmt: skip
            assert any(admits(profile, shapes) for profile in profiles), shapes


@pytest.mark.parametrize(
    "rule", [QWEN, Qwen3VLPreprocessing(), QwenVLPreprocessing(max_pixels=112**2, min_pixels=28**2)]
)
def test_stretches_meet_and_bound_the_memory_of_a_call(rule: QwenVLPreprocessing) -> None:
    least, most = rule.picture_patches()
    profiles = tower(rule, RopeSettings(merge_size=2), {"patches": ("grids", "patches", 8)})
    ranges = [profile.shapes["patches"] for profile in profiles]
    assert (ranges[0][0][1], ranges[-1][-1][1]) == (least, min(most, 4 * 8192))
    for (*_, before), (after, *_) in itertools.pairwise(ranges):
        assert after[1] == before[1] + 4
    for low, _, high in ranges:
        assert high[0] * high[1] <= max(high[1], (tensorrt_profiles.STRETCH + 1) * PATCHES_AT_ONCE)
        assert low[0] == 1


@settings(max_examples=200)
@given(SIDES, SIDES)
def test_every_slice_of_a_minicpmv_fits_a_profile(height: int, width: int) -> None:
    rule = MiniCpmVPreprocessing(query_num=64, scale_resolution=448, image_slices=9)
    least, most = rule.picture_patches()
    try:
        layout = layout_of(height, width, 9, rule)
    except VideoError:
        return
    for rows, columns in (layout.overview, *[layout.slice] * (layout.num_slices > 0)):
        assert least <= rows * columns <= most


def test_nvila_shows_a_frame_a_group_of_frames_or_all_scales() -> None:
    rule = NvilaPreprocessing(image_size=56, pool_sizes=(4, 1, 1))
    assert rule.picture_patches() == (16, 64)
    scaled = replace(rule, image_aspect_ratio="dynamic_s2", scales=(1, 2, 3), max_tiles=12)
    assert scaled.picture_patches() == (16, 16 * (1 + 4 + 12))
    kind = ScalesSettings(rows=9, side=4, scales=(1, 2, 3), most=2)
    axes = {"patches": ("images", "patches", 588), "taps": (4, "places")}
    profiles = tower(scaled, kind, axes)
    for tiles in range(9, 13):
        assert any(admits(p, {"patches": (1, 16 * (5 + tiles), 588), "taps": (4, 48 * tiles)}) for p in profiles)
    assert any(admits(p, {"patches": (PATCHES_AT_ONCE // 16, 16, 588), "taps": (4, 48)}) for p in profiles)
    for low, middle, high in (p.shapes["taps"] for p in profiles):
        assert np.all(np.array([low, middle, high])[:, 1] % 48 == 0)


def test_pictures_of_one_size_have_one_profile_of_any_number() -> None:
    (profile,) = tower(None, PooledSettings(), {"patches": ("tiles", 1024, 588), "pool": ("rows", 1024)})
    assert profile.shapes["patches"] == ((1, 1024, 588), (4, 1024, 588), (4, 1024, 588))
    assert profile.shapes["pool"] == ((1, 1024), (1024, 1024), (1024, 1024))
    (single,) = tower(None, PlainSettings(), {"patches": ("tiles", 8192, 588)})
    assert single.shapes["patches"] == ((1, 8192, 588),)
