"""Backends: what executes a segment, and the device on which its buffers lie. Stitching and pipeline know only these.

A `Backend` binds a segment to buffers for a number of tokens; the `BoundSegment` it returns runs them as often as
wanted, in place. So a decode loop binds once and then only writes a token's row and runs. The few things that are done
to rows between segments are the `Device`'s, so that tokens need not leave it: only scores, logits and plans travel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from framefusion.reduction.plan import Plan
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.format.manifest import SegmentRecord

Array = NDArray[Any]


class Buffer(Protocol):
    """Memory of a device with a shape: a numpy array on the CPU. Leading axes can be indexed, sliced and added."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """numpy's type of an element."""

    @property
    def nbytes(self) -> int:
        """Bytes."""

    def __getitem__(self, key: Any, /) -> Any:
        """A view."""


class Mirror(Protocol):
    """A small buffer that the host writes or reads between runs: the same memory on the CPU, else a pinned twin."""

    @property
    def host(self) -> Array:
        """What the host sees."""

    @property
    def there(self) -> Any:
        """The buffer that graphs are bound to."""

    def push(self) -> None:
        """Bring the host's values there, before whatever runs next."""

    def request(self) -> None:
        """Begin to bring to the host what was computed so far."""

    def pull(self) -> Array:
        """Wait for what was requested, request it first where nothing was, and return `host`."""


class Device(Protocol):
    """Where buffers lie, and what is done to rows [S, D] there. Indices come from the host, int64."""

    @property
    def row_type(self) -> type[np.generic]:
        """Type of rows before the first segment."""

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """A buffer with any content."""

    def zeros(self, shape: Sequence[int], dtype: Any) -> Any:
        """A buffer of zeros."""

    def mirror(self, shape: Sequence[int], dtype: Any) -> Mirror:
        """A buffer of zeros that the host sees, too."""

    def upload(self, array: Array) -> Any:
        """A host array as a buffer; the array itself on the CPU."""

    def download(self, buffer: Any) -> Array:
        """A buffer as a host array; waits for what computes it."""

    def typed(self, buffer: Any, dtype: Any) -> Any:
        """The buffer in another type; itself where it has it."""

    def contiguous(self, buffer: Any) -> Any:
        """The buffer as graphs can be bound to it."""

    def copy(self, target: Any, source: Any) -> None:
        """Write the source into a view of the same shape."""

    def put(self, target: Any, index: NDArray[np.int64], rows: Any) -> None:
        """target[index] = rows.  [m, D], [n], [n, D]"""

    def take(self, rows: Any, index: NDArray[np.int64]) -> Any:
        """rows[index], or more rows than that, finite ones.  [m, D], [n] -> [n or more, D]"""

    def mix(self, rows: Any, index: NDArray[np.int64], weight: NDArray[np.float32]) -> Any:
        """Weighted sums of K rows each, in fp32.  [m, D], [n, K], [n, K] -> [n, D]"""

    def padded(self, rows: Any, length: int, size: int) -> Any:
        """The first `length` rows with finite ones behind them.  [..., length or more, D] -> [..., size, D]"""

    def reduced(self, rows: Any, plan: Plan) -> Any:
        """The rows after reduction.plan.apply_plan; further finite ones may follow.  [..., S, D] -> [..., >= K, D]"""

    def similarity(self, rows: Any, labels: NDArray[np.int64]) -> NDArray[np.float32]:
        """tracks.track_similarity of the first rows, on the host.  [S or more, D], [S] -> [S]"""


class BoundSegment(Protocol):
    """A graph bound to its buffers. `inputs` may be written to between runs; `outputs` are overwritten by each."""

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Buffers the graph reads."""

    @property
    def outputs(self) -> Mapping[str, Any]:
        """Buffers the graph writes."""

    def run(self) -> None:
        """Compute the outputs, and the new slots of the caches, in place; a device may still be at it afterwards."""


class Backend(Protocol):
    """What executes the graphs of one bundle.

    Attributes:
        name: for reports.
        device: where buffers are to lie.
        decode_width: tokens of a decode step; those behind the first are padding.
        chunk: most tokens at a time in the last segment's prefill, where it takes any number; None runs all at once.
        continues: a prefill may follow tokens that are in the caches.
    """

    name: str
    decode_width: int
    chunk: int | None
    continues: bool

    @property
    def device(self) -> Device:
        """Where buffers are to lie."""

    def open(self, graphs: Sequence[str]) -> None:
        """Get graphs ready, in this order, so that no request waits for it."""

    def cache(self, record: SegmentRecord, shapes: Sequence[tuple[int, ...]], dtype: Any) -> SegmentCache:
        """Caches of a segment, for each of its attention layers [1, Hkv, C, hd] with at least as many slots C.

        A backend of static shapes gives the same buffers again: what an earlier request left in them is gone.
        """

    def bind(
        self, graph: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], cache: SegmentCache | None
    ) -> BoundSegment:
        """Bind a graph of the bundle to inputs, to outputs to be overwritten, and to a cache changed in place.

        Inputs that the graph has no use for are left out; outputs that are not wanted need not be given.
        """

    def chain(self, segments: Sequence[BoundSegment]) -> Callable[[], None]:
        """What runs bound segments one after the other, again and again."""


def empty_cache(device: Device, shapes: Sequence[tuple[int, ...]], dtype: Any) -> SegmentCache:
    """Caches of zeros on a device.

    Args:
        device: on which the buffers lie.
        shapes: of each layer's keys and values, [1, Hkv, C_j, hd].
        dtype: of the buffers.
    """
    keys = [device.zeros(shape, dtype) for shape in shapes]
    values = [device.zeros(shape, dtype) for shape in shapes]
    return SegmentCache(keys, values, np.zeros(len(shapes), np.int64))
