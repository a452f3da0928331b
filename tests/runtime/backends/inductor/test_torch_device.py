"""torch's device on the CPU against numpy's: what is done to rows between segments, in each type.

Where nothing is summed, equality; sums are in fp32 in the same order and rounded to the rows' type by both: equality up
to one rounding of the type.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from framefusion.errors import BackendError
from framefusion.reduction.plan import Plan
from framefusion.reduction.policy import Reduction, ReductionSettings
from framefusion.runtime.backends.base import Device, StepBuffers
from framefusion.runtime.backends.host import HOST
from framefusion.runtime.backends.inductor.device import TorchDevice
from framefusion.runtime.backends.inductor.tokens import tensor_of

ml_dtypes = pytest.importorskip("ml_dtypes")
torch = pytest.importorskip("torch")

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
LENGTH, WIDTH = 48, 5


@pytest.fixture(params=TYPES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def device(kind: str) -> TorchDevice:
    return TorchDevice("cpu", TYPES[kind])


@pytest.fixture
def rows(kind: str) -> NDArray[Any]:
    drawn = np.random.default_rng(0).standard_normal((LENGTH, WIDTH))
    drawn[10:30] = drawn[9] + 0.01 * drawn[10:30]  # some are alike
    drawn[33] = 0
    return drawn.astype(TYPES[kind])


def labels() -> NDArray[np.int64]:
    places = np.arange(LENGTH) % 4
    places[:4] = places[-3:] = -1
    return places


def plans() -> Iterator[Plan]:
    """A merge with runs of several lengths, and a prune."""
    similarity = np.random.default_rng(1).uniform(0, 0.8, LENGTH).astype(np.float32)
    reduction = Reduction(ReductionSettings(0.5, 0.6, 0.1, 8, 4), labels())
    yield reduction.step(similarity, None)
    while reduction.wants_similarity:
        left = reduction.labels.size
        yield reduction.step(np.full(left, 0.1, np.float32), np.zeros(left, np.float32))
    yield reduction.step(None, np.arange(reduction.labels.size, dtype=np.float32))


def same(device: TorchDevice, ours: Any, theirs: NDArray[Any], eps: float = 0.0) -> None:
    found, expected = device.download(ours).astype(np.float32), theirs.astype(np.float32)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= eps * np.abs(expected).max()


def test_buffers_go_there_and_back(device: TorchDevice, rows: NDArray[Any], kind: str) -> None:
    there = device.upload(rows)
    same(device, there, rows)
    same(device, device.zeros((2, 3), rows.dtype), np.zeros((2, 3)))
    assert device.empty((2, 3), there.dtype).dtype == there.dtype == getattr(torch, kind)
    same(device, device.typed(there, np.float32), rows)
    same(device, device.contiguous(there[..., 2:]), rows[:, 2:])
    device.copy(there[1:3], device.upload(rows[5:7]))
    same(device, there[1:3], rows[5:7])


def test_a_mirror_is_seen_from_both_sides(device: TorchDevice, kind: str) -> None:
    mirror = device.mirror((2, 3), TYPES[kind])
    mirror.host[0] = [1, 2, 3]
    mirror.push()
    same(device, mirror.buffer[0], np.array([1, 2, 3]))
    tensor_of(mirror.buffer)[1] = 4
    mirror.request()
    np.testing.assert_array_equal(mirror.pull()[1].astype(np.float32), [4, 4, 4])


def test_rows_are_taken_put_mixed_and_padded(device: TorchDevice, rows: NDArray[Any], kind: str) -> None:
    rng, there = np.random.default_rng(2), device.upload(rows)
    index = rng.permutation(LENGTH)[:9]
    same(device, device.take(there, index), HOST.take(rows, index))
    several, weight = rng.integers(0, LENGTH, (7, 4)), rng.uniform(0, 1, (7, 4)).astype(np.float32)
    same(device, device.mix(there, several, weight), HOST.mix(rows.astype(np.float32), several, weight), EPS[kind])
    same(device, device.padded(there, 20, 24)[:20], rows[:20])
    same(device, device.padded(there, 20, 24)[20:], np.zeros((4, WIDTH)))
    stacked = np.stack([rows, rows[::-1]])
    same(device, device.padded(device.upload(stacked), LENGTH, 50), HOST.padded(stacked, LENGTH, 50))
    target = rows.copy()
    HOST.put(target, index, rows[:9])
    ours = device.upload(rows.copy())
    device.put(ours, index, device.upload(rows[:9].copy()))
    same(device, ours, target)


def test_plans_are_applied_as_on_the_host(device: TorchDevice, rows: NDArray[Any], kind: str) -> None:
    kinds = set()
    for plan in plans():
        kinds.add(plan.kind)
        same(device, device.reduced(device.upload(rows), plan), HOST.reduced(rows, plan), EPS[kind])
        stacked = np.stack([rows, 2 * rows])
        same(device, device.reduced(device.upload(stacked), plan), HOST.reduced(stacked, plan), EPS[kind])
        rows = HOST.reduced(rows, plan)
    assert {"merge", "prune"} <= kinds


def test_similarity_is_that_of_the_host(device: TorchDevice, rows: NDArray[Any]) -> None:
    padded = np.concatenate([rows, rows[:3]])
    ours, theirs = device.similarity(device.upload(padded), labels()), HOST.similarity(padded, labels())
    assert (theirs > -1).any()
    assert (theirs < -1).any()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)  # fp32, sums in another order


@pytest.mark.parametrize("table_rows", [0, 3, 9])
@pytest.mark.parametrize("limit", [1, 7, 9])
def test_tokens_and_what_the_next_step_reads_are_the_hosts(
    device: TorchDevice, kind: str, table_rows: int, limit: int
) -> None:
    random = np.random.default_rng(limit)

    def draw(*shape: int) -> NDArray[Any]:
        return random.standard_normal(shape).astype(TYPES[kind])

    sizes = (1, 2, WIDTH), (1, 2, 4), (1, 2, 4)
    parts = [*(draw(*shape) for shape in sizes), np.full((2, 32), 5), np.zeros((1, 9), np.float32)]
    (rotary, table) = (draw(3, 4), draw(3, 4)), draw(table_rows, WIDTH)
    places: list[Device] = [HOST, device]
    steps = [StepBuffers(*(place.upload(part.copy()) for part in parts)) for place in places]
    choosers = [
        place.greedy_tokens(
            step,
            (place.upload(rotary[0]), place.upload(rotary[1])),
            place.upload(table) if table_rows else None,
            limit,
        )
        for place, step in zip(places, steps, strict=True)
    ]
    not_numbers = (np.nan, -np.inf)
    for turn in range(8):
        logits = random.integers(-2, 2, (1, 9)).astype(np.float32)  # with ties
        logits[0, limit:] = 50  # of no token
        if turn >= 6:
            logits[0, limit // 2 : limit] = not_numbers[turn - 6]
        if turn == 7:
            logits[:] = -np.inf
        found = []
        for chooser, step in zip(choosers, steps, strict=True):
            tensor_of(step.logits)[...] = logits if step is steps[0] else torch.from_numpy(logits)
            chooser.run()
            chooser.request()
            found.append(chooser.pull())
        np.testing.assert_array_equal(found[1], found[0])  # where one is not a number, the other is none
        assert np.isfinite(found[1][1]) == (turn < 6)
        for name in ("hidden", "cos", "sin", "lengths"):
            same(device, getattr(steps[1], name), np.asarray(getattr(steps[0], name)).astype(np.float32))
    assert choosers[1].feeds_rows == choosers[0].feeds_rows == (table_rows > 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_does_not_have_is_refused() -> None:
    with pytest.raises(BackendError, match=r"torch .* cannot run on cuda: .*--device cpu"):
        TorchDevice("cuda", np.float16)


def test_without_torch_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendError, match=r"torch is not installed.*pip install torch"):
        TorchDevice("cpu", np.float32)
