"""Backends: what executes a segment. Each module offers the same few methods; the pipeline knows only these.

A `Backend` binds a segment to buffers for a number of tokens; the `BoundSegment` it returns runs them as often as
wanted, in place. So a decode loop binds once and then only writes a token's row and runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from framefusion.runtime.kv_cache import SegmentCache

Array = NDArray[Any]


class BoundSegment(Protocol):
    """A graph bound to its buffers. `inputs` may be written to between runs; `outputs` are overwritten by each."""

    @property
    def inputs(self) -> Mapping[str, Array]:
        """Arrays the graph reads."""

    @property
    def outputs(self) -> Mapping[str, Array]:
        """Arrays the graph writes."""

    def run(self) -> None:
        """Compute the outputs, and the new slots of the caches, in place."""


class Backend(Protocol):
    """What executes the graphs of one bundle."""

    name: str  # for reports

    def open(self, graphs: Sequence[str]) -> None:
        """Get graphs ready, in this order, so that no request waits for it."""

    def bind(
        self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array], cache: SegmentCache | None
    ) -> BoundSegment:
        """Bind a graph of the bundle to inputs, to outputs to be overwritten, and to a cache changed in place.

        Inputs that the graph has no use for are left out; outputs that are not wanted need not be given.
        """
