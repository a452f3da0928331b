"""kernels.cu without a GPU: a numpy twin of each kernel's index arithmetic, and the compiler.

A twin computes what every thread of every block reads and writes, all at once, from the geometry that the launch really
gets. That each element is written by one thread and that the twin's result is the reference's shows the indexing right;
the kernels' own code is run by test_cuda_emulated.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from framefusion.errors import BackendError
from framefusion.installation import install_command
from framefusion.reduction import tracks
from framefusion.reduction.plan import apply_plan, merge_plan
from framefusion.runtime.backends.cuda import kernels
from framefusion.runtime.backends.cuda.array import DeviceArray
from framefusion.runtime.backends.cuda.device import reading_order, track_entries
from framefusion.runtime.backends.cuda.driver import cuda_module
from framefusion.runtime.backends.cuda.kernels import (
    READS,
    SPAN,
    THREADS,
    WARP,
    Geometry,
    compiled,
    load_or_compile,
    reach,
    row_geometry,
    span_geometry,
    target_for,
)

Ints = NDArray[np.int64]
modest = settings(max_examples=40)
# Turing, Ampere, Orin, Ada, Hopper, Blackwell in servers, Thor, GeForce, Spark.
CAPABILITIES = (75, 80, 86, 87, 89, 90, 100, 110, 120, 121)

lengths = st.integers(1, 60)
widths = st.sampled_from([1, 2, 3, 8, 16, 37, 64, 255, 257, 896, 3584, 5120])


class Written(NamedTuple):
    """What the threads of a launch write: for each of their writes table, row and first element."""

    table: Ints
    row: Ints
    column: Ints


def row_writes(geometry: Geometry, rows: int, width: int, at_once: int) -> Written:
    """i = blockIdx.x * blockDim.y + threadIdx.y; columns from threadIdx.x * V in steps of blockDim.x * V."""
    (grid_x, grid_y), (block_x, block_y) = geometry
    rounds = -(-width // (block_x * at_once))
    shape = (grid_y, grid_x, block_y, block_x, rounds)
    table, block, thread_y, thread_x, turn = (axis.reshape(-1) for axis in np.indices(shape))
    row, column = block * block_y + thread_y, thread_x * at_once + turn * block_x * at_once
    runs = (row < rows) & (column < width)
    return Written(table[runs], row[runs], column[runs])


def assert_covers(written: Written, tables: int, rows: int, width: int, at_once: int) -> None:
    """Each element of [tables, rows, width] is written once, none outside."""
    places = ((written.table * rows + written.row) * width + written.column)[:, None] + np.arange(at_once)
    assert (written.column + at_once <= width).all()
    assert (np.bincount(places.reshape(-1), minlength=tables * rows * width) == 1).all()


def elements_at_once(width: int, itemsize: int) -> int:
    """V of the kernel that is launched over rows of this width."""
    return reach(width, itemsize, DeviceArray(256, (1, width), np.dtype(f"V{itemsize}"))) // itemsize


@given(lengths, widths, st.sampled_from([2, 4]), st.integers(1, 3), st.sampled_from([1, READS]))
@modest
def test_each_element_is_written_by_one_thread(rows: int, width: int, itemsize: int, tables: int, reads: int) -> None:
    at_once = elements_at_once(width, itemsize)
    geometry = row_geometry(rows, width // at_once, tables, reads)
    assert np.prod(geometry.block) <= THREADS
    assert_covers(row_writes(geometry, rows, width, at_once), tables, rows, width, at_once)


@given(widths, st.sampled_from([2, 4]), st.integers(0, 15))
@modest
def test_reads_of_16_bytes_begin_at_multiples_of_16(width: int, itemsize: int, shift: int) -> None:
    address = 256 + shift * itemsize
    rows = DeviceArray(address, (5, width), np.dtype(f"V{itemsize}"))
    at_once = reach(width, itemsize, rows)
    written = row_writes(row_geometry(5, width * itemsize // at_once), 5, width, at_once // itemsize)
    assert at_once in (itemsize, 16)
    assert ((address + (written.row * width + written.column) * itemsize) % at_once == 0).all()


def draw_rows(seed: int, rows: int, width: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=50), st.floats(0, 1), widths, st.integers(0, 99))
@modest
def test_the_twin_of_reduce_is_apply_plan(marks: list[int], share: float, width: int, seed: int) -> None:
    labels, random = np.array(marks), np.random.default_rng(seed)
    plan = merge_plan(labels, (random.random(labels.size) < share) & (tracks.previous_in_track(labels) >= 0))
    rows, (starts, members) = draw_rows(seed, labels.size, width), reading_order(plan)
    at_once = elements_at_once(width, 4)
    geometry = row_geometry(plan.kept.size, width // at_once, reads=READS)
    written = row_writes(geometry, plan.kept.size, width, at_once)
    columns = written.column[:, None] + np.arange(at_once)
    start, end = starts[written.row], starts[written.row + 1]
    value = rows[members[start][:, None], columns]
    for place in range(1, int((end - start).max())):
        more = np.flatnonzero(start + place < end)
        value[more] += rows[members[start[more] + place][:, None], columns[more]]
    out = np.full((plan.kept.size, width), np.nan, np.float32)
    out[written.row[:, None], columns] = value / (end - start)[:, None].astype(np.float32)
    np.testing.assert_array_equal(out, apply_plan(rows, plan))


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 99))
@modest
def test_each_row_that_is_kept_or_merged_is_read_once(marks: list[int], share: float, seed: int) -> None:
    labels, random = np.array(marks), np.random.default_rng(seed)
    plan = merge_plan(labels, (random.random(labels.size) < share) & (tracks.previous_in_track(labels) >= 0))
    starts, members = reading_order(plan)
    assert starts[-1] == members.size == labels.size  # a merge loses no row
    assert (np.bincount(members) == 1).all()


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=90), widths, st.sampled_from([2, 4]), st.integers(0, 99))
@modest
def test_the_twin_of_similarity_is_that_of_tracks(marks: list[int], width: int, itemsize: int, seed: int) -> None:
    labels = np.array(marks)
    order, entries = track_entries(labels)
    if not order.size:
        return
    rows, at_once = draw_rows(seed, labels.size, width).astype(np.float64), elements_at_once(width, itemsize)
    (blocks, _), threads = geometry = span_geometry(order.size)
    assert threads == (WARP, 1)
    token = np.where(entries < 0, ~entries, entries)
    block_writes = row_writes(Geometry((1, 1), geometry.block), 1, width, at_once)  # a block's threads along a row
    assert_covers(block_writes, 1, 1, width, at_once)
    places = np.arange(blocks)[:, None] * SPAN + np.arange(-1, SPAN)  # row[0] is the one before the block's first
    places[:, 0] += entries[places[:, 1]] < 0  # unless that one is the first of its track
    read = rows[token[np.minimum(places, order.size - 1)]]
    dot, square = np.einsum("btd,btd->bt", read[:, :-1], read[:, 1:]), np.einsum("btd,btd->bt", read, read)
    cosine = (dot / np.sqrt(square[:, :-1] * square[:, 1:])).reshape(-1)[: order.size]
    found = np.full(labels.size, float(tracks.DISSIMILAR))
    found[order] = np.where(entries >= 0, cosine, tracks.DISSIMILAR)
    np.testing.assert_allclose(found, tracks.track_similarity(rows, labels), atol=1e-6)  # the reference is in fp32


# --- The compiler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability", [pytest.param(kind, marks=() if kind == 87 else pytest.mark.slow) for kind in CAPABILITIES]
)
def test_the_kernels_compile_for_each_gpu(capability: int) -> None:
    assert target_for(capability) == (f"sm_{capability}", True)
    listing = compiled(kernels.SOURCE.read_bytes(), f"compute_{capability}", binary=False).decode()
    names = {line.split("(")[0].split()[-1] for line in listing.splitlines() if line.startswith(".visible .entry")}
    types, reaches = ("float32", "float16", "bfloat16"), ("wide", "single")
    wanted = {f"{kernel}_{kind}_{v}" for kernel in ("reduce", "mix", "similarity") for kind in types for v in reaches}
    wanted |= {f"{kernel}_{size}" for kernel in ("take", "put") for size in kernels.WORDS}
    wanted |= {"choose_parts", "feed_2", "feed_4"} | {f"append_{word}" for word in (2, 4, 16)}
    assert names == wanted | {f"cast_{kind}_{other}" for kind in types for other in types if kind != other}
    for kernel in ("reduce", "similarity"):
        entry = listing.split(f".entry {kernel}_bfloat16_wide(")[1].split(".entry ")[0]
        loads = set(re.findall(r"ld\.global\S*", entry))
        assert any(".v4." in load for load in loads)  # 16 bytes at once
        assert not any(load.endswith("16") for load in loads)


def test_a_gpu_newer_than_the_compiler_gets_code_that_its_driver_compiles() -> None:
    target, binary = target_for(999)
    assert target.startswith("compute_")
    assert not binary


def test_a_gpu_older_than_the_compiler_knows_is_named() -> None:
    with pytest.raises(BackendError, match=r"compute capabilities \[75.*not 35: pip install"):
        target_for(35)


@pytest.fixture
def small_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A source that compiles at once."""
    path = tmp_path / "small.cu"
    path.write_text('extern "C" __global__ void nothing() {}')
    monkeypatch.setattr(kernels, "SOURCE", path)
    return path


def test_a_source_that_does_not_compile_is_told_in_the_compilers_words(small_source: Path, tmp_path: Path) -> None:
    small_source.write_text("__global__ void broken() { undeclared = 1; }")
    with pytest.raises(BackendError, match=r"(?s)small\.cu does not compile for sm_87: .*\"undeclared\" is undefined"):
        load_or_compile(87, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_what_was_compiled_is_kept_by_source_and_gpu(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept"
    image = load_or_compile(87, folder)
    load_or_compile(86, folder)
    small_source.write_text('extern "C" __global__ void other() {}')
    load_or_compile(87, folder)
    assert len(list(folder.iterdir())) == 3
    small_source.write_text('extern "C" __global__ void nothing() {}')
    monkeypatch.setattr(kernels, "compiled", lambda *_, **__: pytest.fail("compiled again"))
    assert load_or_compile(87, folder) == image


@pytest.mark.parametrize("damage", [lambda kept: kept[:-7], lambda kept: kept[:40] + b"x" + kept[41:], lambda _: b""])
@pytest.mark.usefixtures("small_source")
def test_a_damaged_file_is_compiled_anew(tmp_path: Path, damage: Any) -> None:
    image = load_or_compile(87, tmp_path / "kept")
    (path,) = (tmp_path / "kept").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert load_or_compile(87, tmp_path / "kept") == image
    assert path.read_bytes() == whole


@pytest.mark.usefixtures("small_source")
def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert load_or_compile(87, tmp_path / "file" / "kept")


@pytest.mark.parametrize("module", ["driver", "nvrtc"])
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, f"cuda.bindings.{module}", None)
    with pytest.raises(BackendError, match="cuda-bindings cannot be imported .*" + re.escape(install_command("gpu"))):
        cuda_module(module)
