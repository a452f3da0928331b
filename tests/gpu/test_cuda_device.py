"""The CUDA device against numpy, on a GPU: `make test-gpu`.

Without one, test_cuda_emulated.py (tests/runtime/backends/cuda) runs this very file over a driver that runs the kernels
on the CPU.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from framefusion.errors import BackendError
from framefusion.reduction import tracks
from framefusion.reduction.plan import Plan, apply_plan, keep_all, merge_plan
from framefusion.runtime.backends.base import GreedyTokens, StepBuffers, empty_cache
from framefusion.runtime.backends.cuda.array import device_array
from framefusion.runtime.backends.cuda.decode.append import AppendedRows
from framefusion.runtime.backends.cuda.decode.checked import CheckedGraphs
from framefusion.runtime.backends.cuda.device import CudaDevice
from framefusion.runtime.backends.cuda.driver import OutOfMemoryError
from framefusion.runtime.backends.cuda.memory import RING
from framefusion.runtime.backends.host import HOST
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest import SegmentRecord
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.text.prompt import Turn, Visual
from tests.gpu.driver_calls import Calls

pytestmark = pytest.mark.gpu
modest = settings(max_examples=60)

TYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
# Whole vectors of 16 bytes, a few elements more or less, one element; long enough for more than one round of threads.
WIDTHS = [1, 2, 3, 7, 8, 16, 24, 36, 64, 65, 127, 896, 1032, 2053]


@pytest.fixture(scope="module")
def device() -> Iterator[CudaDevice]:
    device = CudaDevice(np.float16)
    yield device
    device.synchronize()


def draw_rows(random: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Rows with outliers, as hidden states have them."""
    rows = random.standard_normal(shape) * np.where(random.random(shape) < 0.01, 100, 1)
    return rows.astype(np.float32).astype(dtype)


def upload_at(device: CudaDevice, rows: NDArray[Any], aligned: bool) -> Any:
    """Rows on the device, at an address that allows reads of 16 bytes or does not."""
    if aligned:
        return device.upload(rows)
    flat = device.empty((rows.size + 1,), rows.dtype)
    shifted = flat[1:].reshape(*rows.shape)
    device.copy(shifted, device.upload(rows))
    return shifted


@st.composite
def token_labels(draw: st.DrawFn) -> NDArray[np.int64]:
    frames, patches, text = draw(st.integers(1, 9)), draw(st.integers(1, 7)), draw(st.integers(0, 3))
    if draw(st.booleans()):
        return np.array(draw(st.lists(st.integers(-1, 4), min_size=1, max_size=40)), np.int64)
    body = [label for _ in range(frames) for label in [*range(patches), *[tracks.TEXT] * text]]
    return np.array([tracks.TEXT, *body, tracks.TEXT], np.int64)


def draw_plan(random: np.random.Generator, labels: NDArray[np.int64], kind: str) -> Plan:
    if kind == "none":
        return keep_all(labels)
    marked = random.random(labels.size) < random.choice([0.2, 0.5, 0.95])
    if kind == "merge":
        return merge_plan(labels, marked & (tracks.previous_in_track(labels) >= 0))
    nothing = np.empty(0, np.int64)
    return Plan("prune", np.flatnonzero(~marked | (labels == tracks.TEXT)), nothing, nothing, nothing)


seeds = st.integers(0, 2**20)
sizes = st.tuples(st.sampled_from(TYPES), st.sampled_from(WIDTHS), st.booleans())


# --- Buffers and views ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*TYPES, np.dtype(np.int64), np.dtype(np.uint8)], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0), (2, 3, 5), (RING // 4 + 1,)])
def test_what_goes_there_comes_back(device: CudaDevice, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 99, shape).astype(dtype)
    np.testing.assert_array_equal(device.download(device.upload(array)), array)


def test_views_are_those_of_numpy(device: CudaDevice) -> None:
    array = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    there = device.upload(array)
    keys: list[Any] = [0, -1, slice(1, 2), (0, slice(2, 4)), (Ellipsis, slice(1, 3), slice(None)), (None, 1), None]
    keys += [(slice(None), slice(4, 9)), (slice(None), 2), (1, 2, 0), (Ellipsis, slice(1, 2)), slice(3, 1)]
    for key in keys:
        view = there[key]
        assert view.shape == array[key].shape
        np.testing.assert_array_equal(device.download(view), array[key])
    part = device.contiguous(there[..., 1:3, :])
    assert part.contiguous
    np.testing.assert_array_equal(device.download(part), array[:, 1:3])
    device.copy(there[:, 1:3], there[:, 3:5])
    np.testing.assert_array_equal(device.download(there)[:, 1:3], array[:, 3:5])


def test_the_caller_may_change_an_array_at_once(device: CudaDevice) -> None:
    """More than the ring takes, so that its halves are used again."""
    array = np.zeros(RING // 16, np.int32)
    there = []
    for number in range(20):
        array[:] = number
        there.append(device.upload(array))
    for number, buffer in enumerate(there):
        assert (device.download(buffer) == number).all()


def test_no_buffer_is_given_to_two(device: CudaDevice) -> None:
    """A buffer is dropped while what reads it is still enqueued."""
    rows = np.ones((64, 8), np.float32)
    results = []
    for number in range(50):
        fresh = device.upload(rows * number)
        results.append(device.take(fresh, np.arange(64)))
    for number, result in enumerate(results):
        assert (device.download(result) == number).all()


def test_requests_like_the_one_before_take_no_more_memory(device: CudaDevice) -> None:
    def request() -> int:
        rows = device.zeros((4096, 512), np.float16)
        device.reduced(rows, keep_all(np.arange(4096)))
        device.mirror((4096,), np.float32).pull()
        device.synchronize()
        return device.free_memory()

    first = request()
    gc.collect()
    assert [request() for _ in range(5)] == [first] * 5


# --- Mirrors --------------------------------------------------------------------------------------------------------


def test_a_mirror_starts_with_zeros_on_both_sides(device: CudaDevice) -> None:
    mirror = device.mirror((3, 2), np.int64)
    assert not mirror.host.any()
    mirror.host[:] = 7
    assert not mirror.pull().any()


def test_what_is_pushed_is_what_was_there_at_that_time(device: CudaDevice) -> None:
    mirror, copies = device.mirror((2000,), np.float32), []
    for number in range(5):
        mirror.host[:] = number
        mirror.push()
        copies.append(device.empty(mirror.buffer.shape, np.float32))
        device.copy(copies[-1], mirror.buffer)
        mirror.host[:] = -1
    assert [float(device.download(copy)[-1]) for copy in copies] == [0, 1, 2, 3, 4]


def test_two_vectors_are_requested_and_arrive(device: CudaDevice) -> None:
    rows = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    there, mirrors = device.upload(rows), [device.mirror((300,), np.float32) for _ in range(2)]
    for turn in range(3):
        for number, mirror in enumerate(mirrors):
            picked = device.take(there, np.arange(5) + turn + number)
            device.copy(mirror.buffer[:5], picked[0][:5])
            mirror.request()
        device.zeros((1 << 16,), np.float32)  # independent work
        for number, mirror in enumerate(mirrors):
            np.testing.assert_array_equal(mirror.pull()[:5], rows[turn + number, :5])


def test_what_was_pulled_outlives_its_mirror(device: CudaDevice) -> None:
    pulled = []
    for number in range(8):
        mirror = device.mirror((100,), np.float32)
        device.copy(mirror.buffer, device.upload(np.full(100, number, np.float32)))
        pulled.append(mirror.pull())
        del mirror
    assert [int(array[0]) for array in pulled] == list(range(8))


def test_a_mirror_may_be_dropped_with_a_request_under_way(device: CudaDevice) -> None:
    for _ in range(4):
        dropped = device.mirror((100,), np.float32)
        device.copy(dropped.buffer, device.upload(np.full(100, 5, np.float32)))
        dropped.request()
        del dropped
        after = device.mirror((100,), np.float32)
        device.synchronize()
        assert not after.host.any()


def test_what_is_requested_is_copied_before_its_memory_serves_again(device: CudaDevice) -> None:
    mirror = device.mirror((1000,), np.float32)
    device.copy(mirror.buffer, device.upload(np.full(1000, 5, np.float32)))
    mirror.request()
    host = mirror.host
    del mirror
    device.zeros((1000,), np.float32)
    device.synchronize()
    assert (host == 5).all()


def test_another_thread_may_call(device: CudaDevice) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(device.download(device.upload(np.arange(9)))))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0], np.arange(9))


# --- Rows -----------------------------------------------------------------------------------------------------------


@given(sizes, token_labels(), st.sampled_from(["merge", "merge", "prune", "none"]), st.integers(0, 3), seeds)
@modest
def test_reduced_gives_the_bits_of_apply_plan(
    device: CudaDevice,
    size: tuple[np.dtype[Any], int, bool],
    labels: NDArray[np.int64],
    kind: str,
    tables: int,
    seed: int,
) -> None:
    (dtype, width, aligned), random = size, np.random.default_rng(seed)
    plan = draw_plan(random, labels, kind)
    rows = draw_rows(random, (labels.size, width) if tables == 0 else (tables, labels.size, width), dtype)
    got = device.download(device.reduced(upload_at(device, rows, aligned), plan))
    wanted = apply_plan(rows, plan) if tables == 0 else np.stack([apply_plan(table, plan) for table in rows])
    assert got.dtype == rows.dtype
    np.testing.assert_array_equal(got, wanted)


@given(sizes, token_labels(), st.sampled_from(["merge", "prune"]), st.integers(0, 3), st.integers(1, 40), seeds)
@modest
def test_all_that_travels_with_tokens_is_reduced_by_one_launch(
    device: CudaDevice,
    size: tuple[np.dtype[Any], int, bool],
    labels: NDArray[np.int64],
    kind: str,
    tables: int,
    half: int,
    seed: int,
) -> None:
    (dtype, width, aligned), random = size, np.random.default_rng(seed)
    plan = draw_plan(random, labels, kind)
    behind = labels.size + int(random.integers(0, 3))  # rows of padding
    hidden = draw_rows(random, (behind, width), dtype)
    rotary = tuple(draw_rows(random, (labels.size, half), dtype) for _ in range(2))
    features = draw_rows(random, (tables, labels.size, width), dtype) if tables else None
    cos, sin = (device.upload(table) for table in rotary)
    there = upload_at(device, hidden, aligned), None if features is None else upload_at(device, features, aligned)
    with Calls(device) as calls:
        rows, kept, merged = device.reduce_tokens(there[0], (cos, sin), there[1], plan)
    assert calls.journeys == (1 if plan.kept.size else 0, 1, 0)
    assert not calls.waits
    np.testing.assert_array_equal(device.download(rows), apply_plan(hidden[: labels.size], plan))
    for ours, table in zip(kept, rotary, strict=True):
        np.testing.assert_array_equal(device.download(ours), table[plan.kept])
    if features is not None and merged is not None:
        np.testing.assert_array_equal(device.download(merged), np.stack([apply_plan(t, plan) for t in features]))
    assert (merged is None) == (features is None)


def test_tables_of_two_types_are_not_reduced_together(device: CudaDevice) -> None:
    table = device.zeros((4, 8), np.float16)
    plan = merge_plan(np.zeros(4, np.int64), np.array([False, True, False, True]))
    with pytest.raises(TypeError, match=r"\['float16', 'float32', 'float32'\]"):
        device.reduce_tokens(table, (device.zeros((4, 4), np.float32),) * 2, None, plan)
    with pytest.raises(ValueError, match="other rows"):
        device.reduce_tokens(table, (table, table), device.zeros((1, 4, 4), np.float16), plan)
    with pytest.raises(IndexError, match="into 3 rows"):
        device.reduce_tokens(table, (table, table[:3]), None, plan)


def test_scores_make_one_journey_to_the_gpu_and_one_back(device: CudaDevice) -> None:
    rows = device.upload(np.ones((40, 16), np.float16))
    with Calls(device) as calls:
        device.similarity(rows, np.zeros(40, np.int64))
    assert calls.journeys == (1, 1, 1)
    assert calls.waits == 1


def test_small_vectors_are_uploaded_in_one_journey(device: CudaDevice) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "previous": np.arange(77),
        "last": np.array([5]),
        "none": np.zeros((0, 3), np.float32),
        "table": np.arange(6, dtype=np.float32).reshape(2, 3),
    }
    with Calls(device) as calls:
        there = device.upload_together(arrays)
    assert calls.journeys == (0, 1, 0)
    for name, array in arrays.items():
        assert device_array(there[name]).address % 256 == 0 or device_array(there["previous"]).address % 256
        assert there[name].dtype == array.dtype
        np.testing.assert_array_equal(device.download(there[name]), array)


def rounding(width: int) -> float:
    """What fp32 may differ by: as many sums as a thread adds, and a warp, of three products, twice."""
    additions = width / 32 + 1 + 5
    return float(2 * 3 * additions * np.finfo(np.float32).eps)


@given(sizes, token_labels(), st.booleans(), seeds)
@modest
def test_similarity_is_that_of_tracks(
    device: CudaDevice, size: tuple[np.dtype[Any], int, bool], labels: NDArray[np.int64], odd: bool, seed: int
) -> None:
    (dtype, width, aligned), random = size, np.random.default_rng(seed)
    rows = draw_rows(random, (labels.size + 3, width), dtype)
    if odd:  # zero rows and equal ones
        rows[random.random(len(rows)) < 0.3] = 0
        rows[random.random(len(rows)) < 0.3] = rows[0]
    got = device.similarity(upload_at(device, rows, aligned), labels)
    wanted = tracks.track_similarity(rows[: labels.size].astype(np.float64), labels)
    np.testing.assert_array_equal(got == tracks.DISSIMILAR, wanted == tracks.DISSIMILAR)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=rounding(width))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_identical_rows_tie(device: CudaDevice, dtype: np.dtype[Any]) -> None:
    rows = np.tile(draw_rows(np.random.default_rng(1), (1, 897), dtype), (40, 1))
    labels = np.zeros(40, np.int64)
    got = device.similarity(device.upload(rows), labels)
    assert got[0] == tracks.DISSIMILAR
    assert (tracks.snap_identical(got[1:]) == 1).all()


def test_a_row_that_overflows_in_fp16_does_not_here(device: CudaDevice) -> None:
    rows = np.full((3, 64), 60000, np.float16)
    labels = np.zeros(3, np.int64)
    np.testing.assert_allclose(device.similarity(device.upload(rows), labels)[1:], 1, rtol=1e-6)
    plan = merge_plan(labels, np.array([False, True, True]))
    np.testing.assert_array_equal(device.download(device.reduced(device.upload(rows), plan)), rows[:1])


@given(sizes, st.integers(1, 30), st.integers(0, 40), seeds)
@modest
def test_take_and_put_are_numpys(
    device: CudaDevice, size: tuple[np.dtype[Any], int, bool], of: int, number: int, seed: int
) -> None:
    (dtype, width, aligned), random = size, np.random.default_rng(seed)
    rows, index = draw_rows(random, (of, width), dtype), random.integers(0, of, number)
    taken = device.download(device.take(upload_at(device, rows, aligned), index))
    np.testing.assert_array_equal(taken, rows[index])
    places = random.permutation(of)[: min(of, number)]
    given_rows, target = draw_rows(random, (places.size, width), dtype), upload_at(device, rows, aligned)
    device.put(target, places, device.upload(given_rows))
    rows[places] = given_rows
    np.testing.assert_array_equal(device.download(target), rows)


@given(sizes, st.integers(1, 4), st.integers(1, 9), st.integers(0, 5), st.integers(1, 3), seeds)
@modest
def test_rows_are_appended_where_the_lengths_say(
    device: CudaDevice,
    size: tuple[np.dtype[Any], int, bool],
    heads: int,
    rows: int,
    before: int,
    layers: int,
    seed: int,
) -> None:
    """Layers of other lengths, capacities and numbers of rows in one launch; what has no slot is written nowhere."""
    (dtype, width, aligned), random = size, np.random.default_rng(seed)
    news, caches, appended, lengths = [], [], [], []
    for layer in range(layers):
        count, slots = rows + layer, rows + 2 * layer + int(random.integers(0, 4))
        new, cache = (draw_rows(random, (heads * number, width), dtype) for number in (count, slots))
        there = [
            upload_at(device, array, aligned).reshape(1, heads, len(array) // heads, width) for array in (new, cache)
        ]
        news.append(new.reshape(heads, count, width))
        caches.append(cache.reshape(heads, slots, width))
        appended.append(AppendedRows(there[0], there[1], layers - 1 - layer))
        lengths.append(before + count)
    device.append(appended, device.upload(np.array(lengths[::-1]))).run()
    for new, cache, place, end in zip(news, caches, appended, lengths, strict=True):
        start = end - new.shape[1]
        fitting = max(0, min(new.shape[1], cache.shape[1] - start))
        cache[:, start : start + fitting] = new[:, :fitting]
        np.testing.assert_array_equal(device.download(place.cache)[0], cache)


def test_rows_that_do_not_belong_to_a_cache_are_refused(device: CudaDevice) -> None:
    rows, cache = device.zeros((1, 2, 3, 8), np.float16), device.zeros((1, 2, 9, 8), np.float16)
    kv_len = device.upload(np.array([3]))
    with pytest.raises(TypeError, match="of one type"):
        device.append([AppendedRows(rows, device.zeros((1, 2, 9, 8), np.float32), 0)], kv_len)
    with pytest.raises(ValueError, match="as many heads"):
        device.append([AppendedRows(rows, device.zeros((1, 1, 9, 8), np.float16), 0)], kv_len)
    with pytest.raises(ValueError, match="more rows than slots"):
        device.append([AppendedRows(cache, rows, 0)], kv_len)
    with pytest.raises(ValueError, match="does not say the lengths"):
        device.append([AppendedRows(rows, cache, 1)], kv_len)


@given(sizes, st.integers(1, 30), st.integers(0, 12), st.integers(1, 5), seeds)
@modest
def test_mix_is_that_of_the_host_rounded_once(
    device: CudaDevice, size: tuple[np.dtype[Any], int, bool], of: int, number: int, terms: int, seed: int
) -> None:
    (dtype, width, aligned), random = size, np.random.default_rng(seed)
    rows, index = draw_rows(random, (of, width), dtype), random.integers(0, of, (number, terms))
    weight = random.standard_normal((number, terms)).astype(np.float32)
    got = device.download(device.mix(upload_at(device, rows, aligned), index, weight))
    np.testing.assert_array_equal(got, HOST.mix(rows.astype(np.float32), index, weight).astype(dtype))


def every_value(dtype: np.dtype[Any]) -> NDArray[Any]:
    """All values of 16 bits, or random bits of 32 with the hard ones: ties, subnormals, infinities."""
    if dtype.itemsize == 2:
        return np.arange(1 << 16, dtype=np.uint16).view(dtype)
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        between = (halves + np.nextafter(halves, np.float32(np.inf))) / 2
        ties = (halves[:-1] + halves[1:]) / 2
    brains = (np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    return np.concatenate([bits.view(np.float32), halves, between, ties, brains])


@pytest.mark.parametrize("to", TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_typed_rounds_as_numpy_does(device: CudaDevice, dtype: np.dtype[Any], to: np.dtype[Any]) -> None:
    values = every_value(dtype)
    got = device.download(device.typed(device.upload(values), to))
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = values.astype(np.float32).astype(to)
    np.testing.assert_array_equal(got.astype(np.float32), wanted.astype(np.float32))


@given(sizes, st.integers(1, 20), st.integers(0, 20), st.integers(0, 3), st.integers(0, 4), seeds)
@modest
def test_padding_is_finite_and_the_rows_before_it_stay(
    device: CudaDevice,
    size: tuple[np.dtype[Any], int, bool],
    length: int,
    more: int,
    behind: int,
    tables: int,
    seed: int,
) -> None:
    (dtype, width, aligned), random = size, np.random.default_rng(seed)
    rows = draw_rows(random, (*([tables] if tables else []), length + behind, width), dtype)
    got = device.download(device.padded(upload_at(device, rows, aligned), length, length + more))
    assert got.shape == (*rows.shape[:-2], length + more, width)
    np.testing.assert_array_equal(got[..., :length, :], rows[..., :length, :])
    assert np.isfinite(got.astype(np.float32)).all()


def test_what_was_reduced_is_padded_where_it_lies(device: CudaDevice) -> None:
    rows, labels = np.ones((64, 8), np.float16), np.zeros(64, np.int64)
    reduced = device.reduced(device.upload(rows), merge_plan(labels, np.arange(64) % 2 == 1))
    padded = device.padded(reduced, 32, 48)
    assert padded.address == reduced.address
    np.testing.assert_array_equal(device.download(padded), np.repeat([1.0, 0.0], [32, 16])[:, None] * np.ones(8))


def test_indices_that_nothing_would_check_later_are_checked(device: CudaDevice) -> None:
    rows = device.zeros((4, 8), np.float32)
    for index in (np.array([0, 4]), np.array([-1])):
        with pytest.raises(IndexError, match=r"into 4 rows"):
            device.take(rows, index)


# --- Captured launches ----------------------------------------------------------------------------------------------


def test_a_captured_sequence_reads_what_is_there_when_it_is_replayed(device: CudaDevice) -> None:
    source, target = device.mirror((4, 8), np.float32), device.mirror((4, 8), np.float32)
    between = device.zeros((4, 8), np.float32)

    def run() -> None:
        device.copy(between, source.buffer)
        device.copy(target.buffer, between)

    run()
    replay = device.capture(run)
    for number in range(4):
        source.host[:] = number
        source.push()
        replay()
        assert (target.pull() == number).all()


def test_what_cannot_be_captured_says_so_and_spoils_nothing(device: CudaDevice) -> None:
    rows = device.upload(np.arange(6, dtype=np.float32))
    with pytest.raises(RuntimeError, match="nothing may be allocated while launches are captured"):
        device.capture(lambda: device.zeros((4,), np.float32))
    with pytest.raises(BackendError, match="CAPTURE"):
        device.capture(device.synchronize)
    np.testing.assert_array_equal(device.download(rows), np.arange(6))


def test_a_buffer_dropped_during_a_capture_is_freed_after_it(device: CudaDevice) -> None:
    held, target = [device.upload(np.full(8, 3, np.float32))], device.zeros((8,), np.float32)

    def run() -> None:
        device.copy(target, held[0])

    def run_and_drop() -> None:
        run()
        held.clear()
        gc.collect()

    run()
    before = device.free_memory()
    device.capture(run_and_drop)  # not replayed: what it reads is gone
    np.testing.assert_array_equal(device.download(target), np.full(8, 3))
    assert device.free_memory() >= before


def test_a_checked_graph_is_replayed_once_it_gave_the_plain_step(device: CudaDevice) -> None:
    source, target = device.mirror((8,), np.float32), device.zeros((8,), np.float32)
    ran, graphs = [], CheckedGraphs(device, patience=2)

    def step() -> None:
        ran.append(1)
        device.copy(target, source.buffer)

    for number in range(5):
        source.host[:] = number
        source.push()
        graphs.run("step", step, target, source.buffer)
        assert (device.download(target) == number).all()
        assert graphs.proven == (number > 1)
    assert len(ran) == 4  # twice plainly, captured, compared


def test_a_step_that_holds_a_number_of_the_host_is_never_replayed(device: CudaDevice) -> None:
    """What a library computes on the host from a length is captured with it."""
    rows, target = device.upload(np.arange(8, dtype=np.float32)), device.zeros((1,), np.float32)
    graphs = CheckedGraphs(device, patience=1)
    for length in range(5):
        lengths = device.upload(np.array([length]))
        graphs.run("step", lambda: device.copy(target, rows[length : length + 1]), target, lengths)  # noqa: B023
        assert float(device.download(target)[0]) == length
        assert not graphs.proven
    assert graphs.problem == "a captured step gave other logits than the plain one"


def test_a_graph_is_not_proven_at_the_length_that_it_was_captured_at(device: CudaDevice) -> None:
    """The next request may be as long, and a number of the host is right there, and nowhere else."""
    rows, target = device.upload(np.arange(8, dtype=np.float32)), device.zeros((1,), np.float32)
    graphs = CheckedGraphs(device, patience=1)
    for length in (3, 3, 3, 4, 5):
        lengths = device.upload(np.array([length]))
        graphs.run("step", lambda: device.copy(target, rows[length : length + 1]), target, lengths)  # noqa: B023
        assert float(device.download(target)[0]) == length
        assert not graphs.proven
        assert (graphs.problem is None) == (length == 3)


def test_a_step_that_cannot_be_captured_is_run_plainly(device: CudaDevice) -> None:
    target, graphs = device.zeros((8,), np.float32), CheckedGraphs(device, patience=1)

    def step() -> None:
        device.copy(target, device.upload(np.ones(8, np.float32)))

    for length in range(3):
        graphs.run("step", step, target, device.upload(np.array([length])))
    assert (device.download(target) == 1).all()
    assert str(graphs.problem).startswith("a step cannot be captured: nothing may be allocated")


# --- Tokens ---------------------------------------------------------------------------------------------------------


def step_of(place: Any, random: np.random.Generator, dtype: np.dtype[Any], width: int, half: int) -> StepBuffers:
    """Buffers of a step of two tokens, on the CPU or on the GPU."""
    rows = [draw_rows(random, (1, 2, n), dtype) for n in (width, half, half)]
    lengths = random.integers(1, 99, (3, 32))
    return StepBuffers(*(place.upload(array) for array in (*rows, lengths, np.zeros((1, VOCABULARY), np.float32))))


VOCABULARY = 40_000  # more than all blocks look at in one round


@given(
    st.sampled_from(TYPES),
    st.integers(1, 300),
    st.integers(1, 80),
    st.sampled_from([0, 7, VOCABULARY]),
    st.sampled_from([1, 255, VOCABULARY - 3, VOCABULARY]),
    seeds,
)
@settings(max_examples=15)
def test_tokens_and_what_the_next_step_reads_are_the_hosts(
    device: CudaDevice, dtype: np.dtype[Any], width: int, half: int, rows: int, limit: int, seed: int
) -> None:
    tables = [draw_rows(np.random.default_rng(seed), (3, half), dtype) for _ in range(2)]
    table = draw_rows(np.random.default_rng(seed), (rows, width), dtype) if rows else None
    steps = [step_of(place, np.random.default_rng(seed), dtype, width, half) for place in (HOST, device)]

    def tokens_of(place: Any, step: StepBuffers) -> GreedyTokens:
        (cos, sin) = map(place.upload, tables)
        chooser: GreedyTokens = place.greedy_tokens(
            step, (cos, sin), None if table is None else place.upload(table), limit
        )
        return chooser

    theirs = tokens_of(HOST, steps[0])
    ours = tokens_of(device, steps[1])
    device.synchronize()
    enqueue = ours.run
    random = np.random.default_rng(seed)
    for turn in range(4):
        logits = random.integers(-50, 50, (1, VOCABULARY)).astype(np.float32)  # with ties
        steps[0].logits[...] = logits  # type: ignore[index]
        device.send(logits, device_array(steps[1].logits))
        theirs.run()
        enqueue()
        ours.request()
        assert ours.pull() == theirs.pull()
        for name in ("hidden", "cos", "sin", "lengths"):
            np.testing.assert_array_equal(device.download(getattr(steps[1], name)), getattr(steps[0], name))
        if turn == 1:  # the others are replayed
            enqueue = device.capture(ours.run)
    assert ours.feeds_rows == theirs.feeds_rows == (table is not None)


def test_a_token_is_read_while_the_next_step_is_enqueued(device: CudaDevice) -> None:
    step = step_of(device, np.random.default_rng(0), np.dtype(np.float32), 8, 4)
    tables = device.zeros((9, 4), np.float32), device.zeros((9, 4), np.float32)
    tokens = device.greedy_tokens(step, tables, device.zeros((5, 8), np.float32), VOCABULARY)
    for token in range(6):
        logits = np.zeros((1, VOCABULARY), np.float32)
        logits[0, 100 + token] = token + 1
        device.send(logits, device_array(step.logits))
        tokens.run()
        tokens.request()
        if token:
            assert tokens.pull() == (99 + token, float(token))
    with Calls(device) as calls:
        assert tokens.pull() == (105, 6.0)
    assert calls.waits == 1
    assert calls.journeys == (0, 0, 0)


def test_what_is_no_number_is_said(device: CudaDevice) -> None:
    step = step_of(device, np.random.default_rng(0), np.dtype(np.float16), 8, 4)
    tables = device.zeros((9, 4), np.float16), device.zeros((9, 4), np.float16)
    tokens = device.greedy_tokens(step, tables, None, VOCABULARY)
    for value, place in ((np.nan, 17), (np.nan, VOCABULARY - 1), (np.inf, 30_000)):
        logits = np.arange(VOCABULARY, dtype=np.float32)[None]
        logits[0, place] = value
        device.send(logits, device_array(step.logits))
        tokens.run()
        tokens.request()
        (token, largest) = tokens.pull()
        assert token == place
        assert not np.isfinite(largest)
    device.send(np.full((1, VOCABULARY), -np.inf, np.float32), device_array(step.logits))
    tokens.run()
    tokens.request()
    assert tokens.pull() == (0, -np.inf)


def test_tables_that_do_not_belong_to_a_step_are_refused(device: CudaDevice) -> None:
    step = step_of(device, np.random.default_rng(0), np.dtype(np.float16), 8, 4)
    tables = device.zeros((9, 4), np.float16), device.zeros((9, 4), np.float16)
    with pytest.raises(TypeError, match="of one type"):
        device.greedy_tokens(step, tables, device.zeros((5, 8), np.float32), VOCABULARY)
    for table, limit in ((device.zeros((5, 7), np.float16), 5), (None, 0), (None, VOCABULARY + 1)):
        with pytest.raises(ValueError, match="do not belong together"):
            device.greedy_tokens(step, tables, table, limit)


# --- Errors ---------------------------------------------------------------------------------------------------------


def test_a_full_gpu_is_told_with_figures_and_usable_afterwards(device: CudaDevice) -> None:
    with pytest.raises(OutOfMemoryError, match=r"MiB free of \d+, \d+ MiB more were needed: sample fewer frames"):
        device.empty((2 * device.gpu.memory,), np.uint8)
    assert (device.download(device.zeros((5,), np.int32)) == 0).all()


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(BackendError, match="no NVIDIA GPU 77 with a working driver"):
        CudaDevice(np.float16, ordinal=77)


# --- A whole request ------------------------------------------------------------------------------------------------


class Ferried:
    """A segment of ONNX Runtime on the CPU whose inputs and outputs lie on the GPU."""

    def __init__(self, device: CudaDevice, inputs: Mapping[str, Any], outputs: Mapping[str, Any], bind: Any) -> None:
        self._device, self.inputs, self.outputs = device, inputs, outputs
        self._here = {name: np.empty(buffer.shape, buffer.dtype) for name, buffer in inputs.items()}
        self._results = {name: np.empty(buffer.shape, buffer.dtype) for name, buffer in outputs.items()}
        self._bound = bind(self._here, self._results)

    def run(self) -> None:
        for name, array in self._here.items():
            array[...] = self._device.download(self.inputs[name])
        self._bound.run()
        for name, array in self._results.items():
            self._device.send(array, self.outputs[name])


class FerryingBackend(OnnxRuntimeBackend):
    """Everything between the segments on the GPU, the segments themselves on the CPU."""

    def __init__(self, folder: Path, there: CudaDevice) -> None:
        super().__init__(folder, threads=1)
        self.device: Any = there

    def cache(self, record: SegmentRecord, shapes: Sequence[tuple[int, ...]], dtype: Any) -> SegmentCache:
        return empty_cache(HOST, shapes, dtype)

    def bind(self, graph: str, inputs: Any, outputs: Any, cache: SegmentCache | None) -> Any:
        return Ferried(self.device, inputs, outputs, lambda here, results: super(FerryingBackend, self).bind(
            graph, here, results, cache))  # fmt: skip


def test_a_film_is_answered_as_on_the_cpu(bundle: Path, film: Path) -> None:
    """fp32 rows: plans and tokens are the CPU's; logits differ by what fp32 sums in another order do."""
    answers = []
    for backend in (OnnxRuntimeBackend(bundle, threads=1), FerryingBackend(bundle, CudaDevice(np.float32))):
        pipeline = Pipeline(Bundle(bundle, verify=False), backend)
        turn = Turn("user", (Visual.VIDEO, "What happens in this video?"))
        answers.append(pipeline.generate([turn], [film], Request(max_new_tokens=6)))
    ours, theirs = answers
    assert [call.kind for call in theirs.reduction] == [call.kind for call in ours.reduction]
    assert "merge" in [call.kind for call in theirs.reduction]
    assert theirs.kv_lengths == ours.kv_lengths
    assert theirs.token_ids == ours.token_ids
