"""The CPU as a device: buffers are numpy arrays. What the other devices do to rows is compared with this.

Knows no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray

from framefusion.reduction import tracks
from framefusion.reduction.plan import Plan, apply_plan
from framefusion.runtime.backends.base import BoundSegment, Device, StepBuffers, empty_cache
from framefusion.runtime.backends.buffer import Array, Buffer
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.format.manifest import SegmentRecord
from framefusion.runtime.media.visual_input import RowMap

CHUNK = 512
"""Tokens of the last segment's prefill at a time. An attention kernel that computes the masked half as well pays for
less of it, and the activations of the longest segment stop growing with the prompt."""


class HostMirror:
    """A buffer that is its own mirror."""

    def __init__(self, array: Array) -> None:
        self.host = array
        self.buffer = array

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

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """See `Device.empty`."""
        return np.empty(shape, dtype)

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """See `Device.zeros`; the operating system gives the pages only when they are written."""
        return np.zeros(shape, dtype)

    def mirror(self, shape: Sequence[int], dtype: DTypeLike) -> HostMirror:
        """See `Device.mirror`."""
        return HostMirror(np.zeros(shape, dtype))

    def upload(self, array: Array) -> Array:
        """The array itself."""
        return array

    def upload_together(self, arrays: Mapping[str, Array]) -> dict[str, Buffer]:
        """The arrays themselves."""
        return dict(arrays)

    def download(self, buffer: Buffer) -> Array:
        """The array itself."""
        return host_array(buffer)

    def typed(self, buffer: Buffer, dtype: DTypeLike) -> Array:
        """See `Device.typed`."""
        return host_array(buffer).astype(dtype, copy=False)

    def contiguous(self, buffer: Buffer) -> Array:
        """See `Device.contiguous`."""
        return np.ascontiguousarray(host_array(buffer))

    def copy(self, target: Buffer, source: Buffer) -> None:
        """See `Device.copy`."""
        host_array(target)[...] = host_array(source)

    def put(self, target: Buffer, index: NDArray[np.int64], rows: Buffer) -> None:
        """See `Device.put`."""
        host_array(target)[index] = host_array(rows)

    def take(self, rows: Buffer, index: NDArray[np.int64]) -> Array:
        """See `Device.take`."""
        picked: Array = host_array(rows)[index]
        return picked

    def mix(self, rows: Buffer, index: NDArray[np.int64], weight: NDArray[np.float32]) -> Array:
        """See `Device.mix`."""
        return RowMap(index, weight).apply(host_array(rows))

    def padded(self, rows: Buffer, length: int, size: int) -> Array:
        """See `Device.padded`; what is added are zeros."""
        array = host_array(rows)
        if array.shape[-2] == size:
            return array
        extra = [(0, 0)] * (array.ndim - 2) + [(0, size - length), (0, 0)]
        return np.pad(array[..., :length, :], extra)

    def reduced(self, rows: Buffer, plan: Plan) -> Array:
        """See `Device.reduced`."""
        array = host_array(rows)
        return apply_plan(array, plan) if array.ndim == 2 else np.stack([apply_plan(table, plan) for table in array])

    def reduce_tokens(
        self, hidden: Buffer, rotary: tuple[Buffer, Buffer], features: Buffer | None, plan: Plan
    ) -> tuple[Buffer, tuple[Buffer, Buffer], Buffer | None]:
        """See `Device.reduce_tokens`."""
        (cos, sin) = rotary
        kept = self.take(cos, plan.kept), self.take(sin, plan.kept)
        return self.reduced(hidden, plan), kept, None if features is None else self.reduced(features, plan)

    def similarity(self, rows: Buffer, labels: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Device.similarity`."""
        return tracks.track_similarity(host_array(rows)[: labels.size], labels)

    def spare_memory(self) -> int:
        """None: the table is mapped, and memory holds the pages that are read."""
        return 0

    def greedy_tokens(
        self, step: StepBuffers, rotary: tuple[Buffer, Buffer], table: Buffer | None, limit: int
    ) -> HostGreedyTokens:
        """See `Device.greedy_tokens`."""
        return HostGreedyTokens(step, rotary, table, limit)


class HostGreedyTokens:
    """See `GreedyTokens`: what the GPU's kernels do, in numpy. A step is complete when it returns."""

    runs_ahead = False

    def __init__(self, step: StepBuffers, rotary: tuple[Buffer, Buffer], table: Buffer | None, limit: int) -> None:
        self.feeds_rows = table is not None
        self.inputs: Mapping[str, Buffer] = {"logits": step.logits}
        self.outputs: Mapping[str, Buffer] = {"hidden": step.hidden, "cos": step.cos, "sin": step.sin}
        self._logits = host_array(step.logits)[0, :limit]
        self._hidden = host_array(step.hidden)
        self._lengths = host_array(step.lengths)
        self._rotary = [
            (host_array(there), host_array(rows)) for there, rows in zip((step.cos, step.sin), rotary, strict=True)
        ]
        self._table = None if table is None else host_array(table)
        self._step = 0
        self._chosen: tuple[int, float] = (0, 0.0)

    def run(self) -> None:
        """See `GreedyTokens.run`."""
        token = int(self._logits.argmax())
        self._chosen = token, float(self._logits[token])
        self._step += 1
        for there, rows in self._rotary:
            there[0, 0] = rows[min(self._step, len(rows) - 1)]
        if self._table is not None:
            self._hidden[0, 0] = self._table[token] if token < len(self._table) else 0
        self._lengths += 1

    def request(self) -> None:
        """Nothing to do."""

    def pull(self) -> tuple[int, float]:
        """See `GreedyTokens.pull`."""
        return self._chosen


def host_array(buffer: Buffer) -> Array:
    """A buffer of the CPU as what it is.

    Raises:
        TypeError: it lies on another device.
    """
    if not isinstance(buffer, np.ndarray):
        raise TypeError(f"{type(buffer).__name__} lies on another device and was given to the CPU")
    return buffer


HOST = HostDevice()


class HostBackend:
    """What backends that take any shape have in common: fresh caches for each request, segments run in a loop.

    Args:
        decode_width: tokens of a decode step; 1, but where a test compares with engines that decode two.
        chunk: see `Backend`.
        device: where buffers lie.
    """

    name = "host"
    continues = True
    host_threads: int | None = 0
    batch_sizes: Sequence[int] | None = None

    def __init__(self, decode_width: int = 1, chunk: int | None = CHUNK, device: Device = HOST) -> None:
        self.decode_width = decode_width
        self.chunk = chunk
        self.device = device

    def cache(self, record: SegmentRecord, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> SegmentCache:
        """Caches of zeros of these very shapes."""
        return empty_cache(self.device, shapes, dtype)

    def batch_refusal(self, graph: str) -> str | None:
        """See `Backend.batch_refusal`; what batches says so."""
        return f"the backend {self.name} decodes one row at a time"

    def chain(self, segments: Sequence[BoundSegment]) -> Callable[[], None]:
        """See `Backend.chain`."""

        def run() -> None:
            for segment in segments:
                segment.run()

        return run


class NoGraphs(HostBackend):
    """Opens none of a bundle's graphs: what reads films and lays out prompts needs no memory for a model."""

    name = "none"

    def open(self, graphs: Sequence[str]) -> None:
        """Open nothing."""

    def bind(
        self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], cache: SegmentCache | None
    ) -> BoundSegment:
        """Refuse."""
        raise NotImplementedError(f"{graph} is not open: nothing is to be run here")
