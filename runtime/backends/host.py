"""The CPU as a device: buffers are numpy arrays. What the other devices do to rows is compared with this.

Knows no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.reduction import tracks
from framefusion.reduction.plan import Plan, apply_plan
from framefusion.runtime.backends.base import Array, BoundSegment, Device, empty_cache
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.format.manifest import SegmentRecord
from framefusion.runtime.media.visual_input import RowMap

CHUNK = 512
"""Tokens of the last segment's prefill at a time. An attention kernel that computes the masked half as well pays for
less of it, and the activations of the longest segment stop growing with the prompt."""


class HostMirror:
    """A buffer that is its own mirror."""

    def __init__(self, array: Array) -> None:
        self.host = self.there = array

    def push(self) -> None:
        """Nothing to do."""

    def request(self) -> None:
        """Nothing to do."""

    def pull(self) -> Array:
        """The array."""
        return self.host


class HostDevice:
    """See `Device`. Rows are summed in fp32 and rounded once, before the first segment."""

    row_type = np.float32

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        """See `Device.empty`."""
        return np.empty(shape, dtype)

    def zeros(self, shape: Sequence[int], dtype: Any) -> Array:
        """See `Device.zeros`; the operating system gives the pages only when they are written."""
        return np.zeros(shape, dtype)

    def mirror(self, shape: Sequence[int], dtype: Any) -> HostMirror:
        """See `Device.mirror`."""
        return HostMirror(np.zeros(shape, dtype))

    def upload(self, array: Array) -> Array:
        """The array itself."""
        return array

    def download(self, buffer: Array) -> Array:
        """The array itself."""
        return buffer

    def typed(self, buffer: Array, dtype: Any) -> Array:
        """See `Device.typed`."""
        return buffer.astype(dtype, copy=False)

    def contiguous(self, buffer: Array) -> Array:
        """See `Device.contiguous`."""
        return np.ascontiguousarray(buffer)

    def copy(self, target: Array, source: Array) -> None:
        """See `Device.copy`."""
        target[...] = source

    def put(self, target: Array, index: NDArray[np.int64], rows: Array) -> None:
        """See `Device.put`."""
        target[index] = rows

    def take(self, rows: Array, index: NDArray[np.int64]) -> Array:
        """See `Device.take`."""
        return rows[index]

    def mix(self, rows: Array, index: NDArray[np.int64], weight: NDArray[np.float32]) -> Array:
        """See `Device.mix`."""
        return RowMap(index, weight).apply(rows)

    def padded(self, rows: Array, length: int, size: int) -> Array:
        """See `Device.padded`."""
        if rows.shape[-2] == size:
            return rows
        extra = [(0, 0)] * (rows.ndim - 2) + [(0, size - length), (0, 0)]
        return np.pad(rows[..., :length, :], extra)

    def reduced(self, rows: Array, plan: Plan) -> Array:
        """See `Device.reduced`."""
        return apply_plan(rows, plan) if rows.ndim == 2 else np.stack([apply_plan(one, plan) for one in rows])

    def similarity(self, rows: Array, labels: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Device.similarity`."""
        return tracks.track_similarity(rows[: labels.size], labels)


HOST = HostDevice()


class HostBackend:
    """What backends that take any shape have in common: fresh caches for each request, segments run in a loop.

    Args:
        decode_width: tokens of a decode step; 1, but for whoever wants to see what engines of two do.
        chunk: see `Backend`.
        device: where buffers lie, the CPU unless told otherwise.
    """

    continues = True

    def __init__(self, decode_width: int = 1, chunk: int | None = CHUNK, device: Device = HOST) -> None:
        self.decode_width = decode_width
        self.chunk = chunk
        self.device = device

    def cache(self, record: SegmentRecord, shapes: Sequence[tuple[int, ...]], dtype: Any) -> SegmentCache:
        """Caches of zeros, as large as asked."""
        return empty_cache(self.device, shapes, dtype)

    def chain(self, segments: Sequence[BoundSegment]) -> Callable[[], None]:
        """See `Backend.chain`."""

        def run() -> None:
            for segment in segments:
                segment.run()

        return run
