"""One GPU as `backends.Device`: rows stay on it, scores and logits come back, plans go there.

Indices are int32 on the GPU. Sums are fp32 in the order of plan.apply_plan, so `reduced` gives its bits; `similarity`
sums in another order than numpy and differs in the last bits of fp32. What is enqueued when, see `buffers`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from framefusion.reduction import tracks
from framefusion.reduction.plan import Plan
from framefusion.runtime.backends.base import StepBuffers
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.cuda.array import DeviceArray, device_array
from framefusion.runtime.backends.cuda.buffers import CudaBuffers, CudaMirror
from framefusion.runtime.backends.cuda.decode.append import AppendedRows, CudaAppend
from framefusion.runtime.backends.cuda.decode.tokens import CudaGreedyTokens
from framefusion.runtime.backends.cuda.kernels import (
    NOTHING,
    READS,
    THREADS,
    WORDS,
    Geometry,
    Kernels,
    count,
    dimensions,
    reach,
    row_geometry,
    span_geometry,
    width,
)


class CudaDevice(CudaBuffers):
    """See `backends.Device`. One request at a time; buffers may be dropped by any thread.

    Args:
        row_type: of rows before the first segment: the bundle's own, so that they travel and lie in it.
        ordinal: of the GPU among those that CUDA_VISIBLE_DEVICES shows.
        kernels: folder for compiled kernels; None takes the user's cache folder.

    Raises:
        BackendError: there is no GPU, no driver, one too old, a missing package, or a GPU too old for the kernels.
    """

    def __init__(self, row_type: type[np.generic] = np.float16, ordinal: int = 0, kernels: Path | None = None) -> None:
        super().__init__(ordinal)
        self.row_type = row_type
        self._kernels = Kernels(self.cuda, self._stream, kernels)
        self._uploaded_plan: tuple[Plan, DeviceArray] | None = None

    def copy(self, target: Buffer, source: Buffer) -> None:
        """See `Device.copy`; in the target's type."""
        super().copy(target, self.typed(source, target.dtype))

    def typed(self, buffer: Buffer, dtype: DTypeLike) -> DeviceArray:
        """See `Device.typed`; to nearest, ties to even."""
        buffer = device_array(buffer)
        if buffer.dtype == np.dtype(dtype):
            return buffer
        result = self.empty(buffer.shape, dtype)
        self._cast(result, self.contiguous(buffer))
        return result

    def _cast(self, target: DeviceArray, source: DeviceArray) -> None:
        pair = {target.dtype.name, source.dtype.name}
        if not pair <= {"float32", "float16", "bfloat16"}:
            raise TypeError(f"no kernel turns {source.dtype.name} into {target.dtype.name}")
        if not target.size:
            return
        geometry = Geometry((min(-(-target.size // THREADS), 1 << 16), 1), (THREADS, 1))
        name = f"cast_{source.dtype.name}_{target.dtype.name}"
        self._kernels.launch(name, geometry, source, target, width(target.size))

    def _indices(self, index: NDArray[np.int64], below: int) -> DeviceArray:
        """Indices on the GPU, where nothing checks them any more."""
        _require_below(index, below)
        return self.upload(index.astype(np.int32))

    def take(self, rows: Buffer, index: NDArray[np.int64]) -> DeviceArray:
        """See `Device.take`."""
        rows = device_array(rows)
        of, elements = dimensions(rows)
        result = self._with_room(index.size, of, elements, rows.dtype)
        self._move("take", rows, self._indices(index, of), result, index.size)
        return result

    def put(self, target: Buffer, index: NDArray[np.int64], rows: Buffer) -> None:
        """See `Device.put`; no place may be named twice."""
        target = device_array(target)
        rows = device_array(rows)
        given_rows, elements = dimensions(rows)
        target_rows, target_elements = dimensions(target)
        if elements != target_elements or given_rows < index.size:
            raise ValueError(f"{rows!r} has no {index.size} rows for {target!r}")
        self._move("put", self.typed(rows, target.dtype), self._indices(index, target_rows), target, index.size)

    def _move(self, kernel: str, rows: DeviceArray, index: DeviceArray, out: DeviceArray, number: int) -> None:
        row = rows.shape[1] * rows.dtype.itemsize
        fitting = [word for word in WORDS if all(place % word == 0 for place in (row, rows.address, out.address))]
        if not fitting:
            raise TypeError(f"rows of {rows.dtype.name} [{rows.shape[1]}] cannot be moved by {min(WORDS)} bytes")
        if not number or not row:
            return
        word = fitting[0]
        arguments = rows, index, out, count(number), width(row // word)
        self._kernels.launch(f"{kernel}_{word}", row_geometry(number, row // word), *arguments)

    def mix(self, rows: Buffer, index: NDArray[np.int64], weight: NDArray[np.float32]) -> DeviceArray:
        """See `Device.mix`; rounded once to the type of the rows."""
        rows = device_array(rows)
        (number, terms) = index.shape
        (of, elements) = dimensions(rows)
        result = self.empty((number, elements), rows.dtype)
        places = self._indices(index, of)
        weights = self.upload(weight.astype(np.float32, copy=False))
        arguments = rows, places, weights, result, count(number), count(terms)
        self._launch("mix", elements, rows, result, number, 1, *arguments, width(elements))
        return result

    def _launch(
        self, name: str, elements: int, rows: DeviceArray, out: DeviceArray, number: int, tables: int, *arguments: Any
    ) -> None:
        """A kernel over rows, in the widest reads that they allow."""
        if not number or not elements or not tables:
            return
        itemsize = rows.dtype.itemsize
        at_once = reach(elements, itemsize, rows, out)
        suffix = "wide" if at_once == 16 else "single"
        geometry = row_geometry(number, elements * itemsize // at_once, tables)
        self._kernels.launch(f"{name}_{rows.dtype.name}_{suffix}", geometry, *arguments)

    def _with_room(self, number: int, room: int, elements: int, dtype: DTypeLike) -> DeviceArray:
        """[number, elements], with room behind it for padding up to `room` rows."""
        whole = self.empty((max(number, room), elements), dtype)
        rows = whole[:number]
        rows.room = len(whole) - number
        return rows

    def padded(self, rows: Buffer, length: int, size: int) -> DeviceArray:
        """See `Device.padded`: in place where there is room, without a copy where there are rows enough."""
        rows = device_array(rows)
        if rows.shape[-2] == size:
            return rows
        if rows.ndim == 2 and rows.contiguous and rows.shape[0] + rows.room >= size:
            kept = rows[: min(len(rows), size)]
            longer = DeviceArray(kept.address, (size, rows.shape[1]), rows.dtype, rows.owner)
            self._clear(longer[len(kept) :])
            return longer
        result = self.empty((*rows.shape[:-2], size, rows.shape[-1]), rows.dtype)
        for table, source in zip(_tables(result), _tables(rows), strict=True):
            self.copy(table[:length], source[:length])
            self._clear(table[length:])
        return result

    def reduced(self, rows: Buffer, plan: Plan) -> DeviceArray:
        """See `Device.reduced`. Each row that is kept or merged is read once, by one launch for all tables."""
        rows = device_array(rows)
        _require_tables(rows)
        (of, elements) = rows.shape[-2:]
        if rows.ndim == 2:
            result = self._with_room(plan.kept.size, of, elements, rows.dtype)
            self._reduce(plan, (rows, result))
        else:
            result = self.empty((len(rows), plan.kept.size, elements), rows.dtype)
            if len(rows):
                self._reduce(plan, (rows[0], result[0]), (rows[1:], result[1:]))
        return result

    def reduce_tokens(
        self, hidden: Buffer, rotary: tuple[Buffer, Buffer], features: Buffer | None, plan: Plan
    ) -> tuple[Buffer, tuple[Buffer, Buffer], Buffer | None]:
        """See `Device.reduce_tokens`: one upload and one launch for everything that travels with the tokens."""
        tables = [device_array(table) for table in (hidden, *rotary)]
        results = [self._with_room(plan.kept.size, *dimensions(table), table.dtype) for table in tables]
        merged: tuple[DeviceArray, DeviceArray] | None = None
        if features is not None:
            features = device_array(features)
            _require_tables(features)
            merged = features, self.empty((len(features), plan.kept.size, features.shape[2]), features.dtype)
        self._reduce(plan, (tables[0], results[0]), merged, (tables[1], results[1]), (tables[2], results[2]))
        return results[0], (results[1], results[2]), None if merged is None else merged[1]

    def _reduce(
        self,
        plan: Plan,
        rows: tuple[DeviceArray, DeviceArray],
        features: tuple[DeviceArray, DeviceArray] | None = None,
        cos: tuple[DeviceArray, DeviceArray] | None = None,
        sin: tuple[DeviceArray, DeviceArray] | None = None,
    ) -> None:
        """Launch `reduce` over tables and what they become: rows [S, D], features [K, S, D], cos and sin [S, hd/2]."""
        given = [pair for pair in (rows, features, cos, sin) if pair is not None]
        (source, result) = rows
        width_of_rows = source.shape[1]
        if any(table.dtype != source.dtype for table, _ in given):
            raise TypeError(
                f"tables of one kind of element are reduced together, not {[t.dtype.name for t, _ in given]}"
            )
        if features is not None and features[0].shape[2] != width_of_rows:
            raise ValueError(f"{features[0]!r} has other rows than {source!r}")
        packed = self._plan_there(plan, min(table.shape[-2] for table, _ in given))
        number = plan.kept.size
        tables = 1 + (0 if features is None else len(features[0]))
        half = 0 if cos is None else cos[0].shape[1]
        if not number or not max(width_of_rows, half):
            return
        itemsize = source.dtype.itemsize
        strided = () if features is None else features
        arrays = [table for pair in given for table in pair]
        at_once = reach(math.gcd(width_of_rows, half), itemsize, *arrays)
        geometry = row_geometry(number, width_of_rows * itemsize // at_once, tables, READS)
        self._kernels.launch(
            f"reduce_{source.dtype.name}_{'wide' if at_once == 16 else 'single'}",
            geometry,
            *(source, result, width(width_of_rows)),
            *(features or (NOTHING, NOTHING)),
            *(width(table.shape[1] * table.shape[2]) for table in strided or ()),
            *(() if strided else (width(0), width(0))),
            *((NOTHING,) * 4 if cos is None or sin is None else (cos[0], sin[0], cos[1], sin[1])),
            *(width(half), packed, count(number)),
        )

    def _plan_there(self, plan: Plan, of: int) -> DeviceArray:
        """A plan's `reading_order` on the GPU, in one array; the last one stays, for other tables of its tokens."""
        if self._uploaded_plan is None or self._uploaded_plan[0] is not plan:
            self._uploaded_plan = plan, self.upload(np.concatenate(reading_order(plan)))
        for index in (plan.kept, plan.members):
            _require_below(index, of)
        return self._uploaded_plan[1]

    def similarity(self, rows: Buffer, labels: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Device.similarity`. Waits for the result."""
        rows = device_array(rows)
        of, elements = dimensions(rows)
        if labels.size > of:
            raise ValueError(f"{labels.size} labels for {rows!r}")
        order, entries = track_entries(labels)
        scores = np.full(labels.size, tracks.DISSIMILAR, np.float32)
        if order.size and elements:
            scores[order] = self.track_cosines(rows, entries).pull()
        return scores

    def track_cosines(self, rows: DeviceArray, entries: NDArray[np.int32]) -> CudaMirror:
        """Enqueue the cosines of tokens in track order, `track_entries`, to the ones before them.  [V]"""
        elements = rows.shape[1]
        itemsize = rows.dtype.itemsize
        scores = CudaMirror(self, self.empty(entries.shape, np.float32))
        uploaded = self.upload(entries)
        at_once = reach(elements, itemsize, rows)
        name = f"similarity_{rows.dtype.name}_{'wide' if at_once == 16 else 'single'}"
        geometry = span_geometry(entries.size)
        self._kernels.launch(name, geometry, rows, uploaded, scores.buffer, count(entries.size), width(elements))
        return scores

    def greedy_tokens(
        self, step: StepBuffers, rotary: tuple[Buffer, Buffer], table: Buffer | None, limit: int
    ) -> CudaGreedyTokens:
        """See `Device.greedy_tokens`."""
        return CudaGreedyTokens(self, self._kernels, step, rotary, table, limit)

    def append(self, appended: Sequence[AppendedRows], kv_len: Buffer) -> CudaAppend:
        """What brings new rows of keys and values into their caches."""
        return CudaAppend(self, self._kernels, appended, device_array(kv_len))


def reading_order(plan: Plan) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The rows that make each row of the result: members[starts[i]:starts[i + 1]], in run order.  [K + 1], [M]"""
    lengths = plan.run_lengths
    heads = plan.head_slots
    sizes = np.ones(plan.kept.size, np.int64)
    sizes[heads] = lengths
    starts = np.concatenate([[0], np.cumsum(sizes)])
    members = np.empty(starts[-1], np.int64)
    members[starts[:-1]] = plan.kept
    place = np.arange(plan.members.size) - np.repeat(plan.run_starts, lengths)
    members[np.repeat(starts[heads], lengths) + place] = plan.members
    return starts.astype(np.int32), members.astype(np.int32)


def track_entries(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The visual tokens in track order, and the same with ~token for the first of each track.  [V], [V]"""
    order = tracks.track_order(labels)
    visual = order[: tracks.count_visual(labels)]
    follows = tracks.previous_in_track(labels, order)[visual] >= 0
    return visual, np.where(follows, visual, ~visual).astype(np.int32)


def _require_below(index: NDArray[np.int64], below: int) -> None:
    """No index is checked again once it is on the GPU."""
    if index.size and not 0 <= index.min() <= index.max() < below:
        raise IndexError(f"indices {index.min()} .. {index.max()} into {below} rows")


def _require_tables(rows: DeviceArray) -> None:
    """What `reduce` reads lies without gaps."""
    if rows.ndim not in (2, 3) or not rows.contiguous:
        raise ValueError(f"{rows!r} is neither [S, D] nor [K, S, D] without gaps")


def _tables(rows: DeviceArray) -> list[DeviceArray]:
    """The [S, D] tables of [..., S, D]."""
    return [rows] if rows.ndim == 2 else [table for place in range(len(rows)) for table in _tables(rows[place])]
