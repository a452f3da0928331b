"""Backends: what executes a segment, and the device on which its buffers lie. Nobody above knows more than these.

A `Backend` binds a segment to buffers for a number of tokens; the `BoundSegment` it returns runs them as often as
wanted, in place. So a decode loop binds once and then only writes a token's row and runs. The few things that are done
to rows between segments are the `Device`'s, so that tokens need not leave it: only scores, logits and plans travel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from framefusion.reduction.plan import Plan
from framefusion.runtime.backends.buffer import Array, Buffer
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.format.manifest import SegmentRecord


class Mirror(Protocol):
    """A small buffer that the host writes or reads between runs: the same memory on the CPU, else a pinned twin."""

    @property
    def host(self) -> Array:
        """The host's memory; read it after `pull`, write it before `push`."""

    @property
    def buffer(self) -> Buffer:
        """The device's memory, which graphs are bound to."""

    def push(self) -> None:
        """Bring the host's values to the device, before whatever runs next."""

    def request(self) -> None:
        """Begin to bring to the host what was computed so far."""

    def pull(self) -> Array:
        """Wait for what was requested, request it first where nothing was, and return `host`."""


@dataclass(frozen=True)
class StepBuffers:
    """What a decode step of W tokens reads, and what it leaves: buffers of one device. Only the first token counts."""

    hidden: Buffer  # [1, W, D]
    cos: Buffer  # [1, W, hd/2]
    sin: Buffer
    lengths: Buffer  # [segments, ...] int64: tokens in each cache behind the step
    logits: Buffer  # [1, V] fp32


class GreedyTokens(Protocol):
    """The last link of a decode step's chain: takes the largest logit and makes the buffers ready for the next step.

    It is run as a `BoundSegment` behind the segments. The first step is fed by the host.

    Attributes:
        feeds_rows: the next token's embedding is among what it makes ready; else the host writes it.
        runs_ahead: a step may be enqueued before the token of the one before it is pulled, one at most.
    """

    feeds_rows: bool
    runs_ahead: bool
    inputs: Mapping[str, Buffer]
    outputs: Mapping[str, Buffer]

    def run(self) -> None:
        """Enqueue the choice, the next row of the rotary tables, and lengths that are one longer."""

    def request(self) -> None:
        """Begin to bring what the last run chose to the host."""

    def pull(self) -> tuple[int, float]:
        """Wait for the oldest choice that was requested and not pulled: the token and its logit."""


class Device(Protocol):
    """Where buffers lie, and what is done to rows [S, D] there. Indices come from the host, int64.

    What a method is given are buffers of this device: another one's are a mistake of ours, a TypeError.
    """

    @property
    def row_type(self) -> type[np.generic]:
        """numpy's type of rows before the first segment."""

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """A buffer with any content."""

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """A buffer of zeros."""

    def mirror(self, shape: Sequence[int], dtype: DTypeLike) -> Mirror:
        """A buffer of zeros that the host reads and writes, too."""

    def upload(self, array: Array) -> Buffer:
        """A host array as a buffer; the array itself on the CPU."""

    def upload_together(self, arrays: Mapping[str, Array]) -> dict[str, Buffer]:
        """Small host arrays as buffers, in one journey; the arrays themselves on the CPU."""

    def download(self, buffer: Buffer) -> Array:
        """A buffer as a host array; waits for what computes it."""

    def typed(self, buffer: Buffer, dtype: DTypeLike) -> Buffer:
        """The buffer in another type; itself where it has it."""

    def contiguous(self, buffer: Buffer) -> Buffer:
        """The buffer without gaps between its elements, as graphs are bound to it; itself where it has none."""

    def copy(self, target: Buffer, source: Buffer) -> None:
        """Write the source into a view of the same shape."""

    def put(self, target: Buffer, index: NDArray[np.int64], rows: Buffer) -> None:
        """target[index] = rows.  [m, D], [n], [n, D]"""

    def take(self, rows: Buffer, index: NDArray[np.int64]) -> Buffer:
        """rows[index], or more rows than that, finite ones.  [m, D], [n] -> [n or more, D]"""

    def mix(self, rows: Buffer, index: NDArray[np.int64], weight: NDArray[np.float32]) -> Buffer:
        """Weighted sums of K rows each, in fp32.  [m, D], [n, K], [n, K] -> [n, D]"""

    def padded(self, rows: Buffer, length: int, size: int) -> Buffer:
        """The first `length` rows with finite ones behind them.  [..., length or more, D] -> [..., size, D]"""

    def reduced(self, rows: Buffer, plan: Plan) -> Buffer:
        """What policy.apply_plan does, or more rows than that, finite ones.  [..., S, D] -> [..., K or more, D]"""

    def reduce_tokens(
        self, hidden: Buffer, rotary: tuple[Buffer, Buffer], features: Buffer | None, plan: Plan
    ) -> tuple[Buffer, tuple[Buffer, Buffer], Buffer | None]:
        """All that travels with tokens, reduced together: one journey of the plan to the device.

        Args:
            hidden: reduced by means.  [S or more, D]
            rotary: cos and sin, of which each kept token keeps its row.  [S or more, hd/2] each
            features: reduced by means, table by table; None where there are none.  [K, S or more, D]
            plan: of S tokens, of which K stay.

        Returns:
            The same for the tokens that stay, or more rows than that, finite ones.
        """

    def similarity(self, rows: Buffer, labels: NDArray[np.int64]) -> NDArray[np.float32]:
        """tracks.track_similarity of the first rows, on the host.  [S or more, D], [S] -> [S]"""

    def spare_memory(self) -> int:
        """Bytes that a copy of what lies on the host may take here; 0 where it would save nothing."""

    def greedy_tokens(
        self, step: StepBuffers, rotary: tuple[Buffer, Buffer], table: Buffer | None, limit: int
    ) -> GreedyTokens:
        """What chooses the tokens of one answer here.

        Args:
            step: of the chain that it ends.
            rotary: cos and sin of each token that may be fed back, in the type of the rows.  [N, hd/2]
            table: rows of the embedding, in that type; what is beyond it is zero. None leaves rows to the host.  [R, D]
            limit: logits from here on belong to no token.
        """


class BoundSegment(Protocol):
    """A graph bound to its buffers. `inputs` may be written to between runs; `outputs` are overwritten by each."""

    @property
    def inputs(self) -> Mapping[str, Buffer]:
        """Buffers the graph reads."""

    @property
    def outputs(self) -> Mapping[str, Buffer]:
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
        host_threads: of the CPU that an operator takes; 0 takes the physical cores, None none: a device computes.
        batch_sizes: the numbers of rows that a step of several may have, ascending; None takes any number. Where they
            are given, slabs have the most rows and all slots from the beginning, and a step of fewer rows is padded.
    """

    name: str
    decode_width: int
    chunk: int | None
    continues: bool
    host_threads: int | None
    batch_sizes: Sequence[int] | None

    @property
    def device(self) -> Device:
        """Where buffers are to lie."""

    def open(self, graphs: Sequence[str]) -> None:
        """Get graphs ready, in this order, so that no request waits for it."""

    def cache(self, record: SegmentRecord, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> SegmentCache:
        """Caches of a segment, for each of its attention layers [1, Hkv, C, hd] with at least as many slots C.

        A backend of static shapes gives the same buffers again: what an earlier request left in them is gone.
        """

    def bind(
        self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], cache: SegmentCache | None
    ) -> BoundSegment:
        """Bind a graph of the bundle to inputs, to outputs to be overwritten, and to a cache changed in place.

        Inputs that the graph has no use for are left out; outputs that are not wanted need not be given.
        """

    def batch_refusal(self, graph: str) -> str | None:
        """Why a decoding graph cannot take a token of each of several rows at once; None where it can.

        Where it can, `cache` gives as many rows as its shapes have, `hidden`, `cos` and `sin` have a row each, and
        `kv_len` is [A*B]: the lengths of all rows in the first layer, then in the second.
        """

    def chain(self, segments: Sequence[BoundSegment]) -> Callable[[], None]:
        """What runs bound segments one after the other, again and again."""


class GraphRunner(Protocol):
    """The part of a `Backend` that runs one graph."""

    @property
    def device(self) -> Device:
        """See `Backend.device`."""

    def cache(self, record: SegmentRecord, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> SegmentCache:
        """See `Backend.cache`."""

    def bind(
        self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], cache: SegmentCache | None
    ) -> BoundSegment:
        """See `Backend.bind`."""


class BlockGraph(NamedTuple):
    """A graph of building blocks, which is proven before there is a bundle, and what runs it."""

    dialect: str  # of the graph, or what an engine's network is made of; "" where there is one kind alone
    dtype: str
    backend: GraphRunner
    importance: str = "float32"  # type that it is computed in, whatever the graph's
    caches: str | None = None  # type of the backend's own caches; None holds numbers of the graph's type


def empty_cache(device: Device, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> SegmentCache:
    """Caches of zeros on a device.

    Args:
        device: on which the buffers lie.
        shapes: of each layer's keys and values, [1, Hkv, C_j, hd].
        dtype: of the buffers.
    """
    keys = [device.zeros(shape, dtype) for shape in shapes]
    values = [device.zeros(shape, dtype) for shape in shapes]
    return SegmentCache(keys, values, np.zeros(len(shapes), np.int64))
