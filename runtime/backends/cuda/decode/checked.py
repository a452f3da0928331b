"""Decode steps of a library that does not say whether they can be captured: captured, compared, then replayed.

Addresses are captured, and with them whatever the host computed from a length: a graph of such a step answers wrongly
at the next length, without an error. So a graph is replayed only after it gave the bits of the plain step at another
length than it was captured at. A step may be run twice: it writes the same slots again. Knows no library.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from framefusion.errors import BackendError
from framefusion.runtime.backends.base import BoundSegment
from framefusion.runtime.backends.buffer import Array, Buffer

KEPT = 4  # graphs: one for each set of buffers that requests happen to get
PATIENCE = 16  # plain steps before one is captured, which takes as long as some: most answers are that long or short


class CapturingDevice(Protocol):
    """What captures launches: a GPU by its driver or by torch."""

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """What `run` enqueues, to be replayed.

        Raises:
            BackendError, RuntimeError: something in it cannot be captured.
        """

    def download(self, buffer: Buffer) -> Array:
        """A buffer as a host array."""


class KeyedSegment(BoundSegment, Protocol):
    """A bound segment that says what its launches depend on."""

    @property
    def key(self) -> object:
        """Equal for segments whose captured launches are interchangeable."""


class CheckedGraphs:
    """The graphs of one backend's steps, by what they are bound to.

    Args:
        device: whose stream the steps are enqueued on.
        patience: plain steps before one is captured, one at least.
    """

    def __init__(self, device: CapturingDevice, patience: int = PATIENCE) -> None:
        self._device = device
        self._patience = patience
        self._plain_steps: tuple[object, int] = (None, 0)  # how many were run of the step that is run now
        self._graphs: OrderedDict[object, Callable[[], None]] = OrderedDict()
        self._unproven: dict[object, Array] = {}  # lengths that each was captured at
        self.problem: str | None = None  # why nothing is captured any more

    @property
    def proven(self) -> int:
        """Graphs that are replayed."""
        return len(self._graphs.keys() - self._unproven)

    def chain(self, segments: Sequence[KeyedSegment], behind: Sequence[BoundSegment]) -> Callable[[], None]:
        """What runs segments, the last of which gives logits, and what is behind them.

        What is behind is enqueued as it is: run twice, it would count a token twice.
        """
        key = tuple(segment.key for segment in segments)
        lengths = segments[0].inputs["kv_len"]

        def plain() -> None:
            for segment in segments:
                segment.run()

        def run() -> None:
            self.run(key, plain, segments[-1].outputs["logits"], lengths)
            for link in behind:
                link.run()

        return run

    def run(self, key: object, plain: Callable[[], None], output: Buffer, lengths: Buffer) -> None:
        """Run a step: plainly at first, then once both ways, and as a graph from then on.

        Args:
            key: equal for steps whose graphs are interchangeable; whoever makes it keeps the buffers alive.
            plain: enqueues the step.
            output: what the step is compared by.
            lengths: tokens in the caches behind the step, int64.
        """
        if self.problem is not None:
            plain()
        elif key not in self._graphs:
            plain()  # what is allocated or loaded on a first run cannot be captured
            (last, count) = self._plain_steps
            self._plain_steps = (key, count + 1 if key == last else 1)
            if self._plain_steps[1] >= self._patience:
                self._capture(key, plain, lengths)
        elif key in self._unproven:
            self._prove(key, plain, output, lengths)
        else:
            self._graphs.move_to_end(key)
            self._graphs[key]()

    def _capture(self, key: object, plain: Callable[[], None], lengths: Buffer) -> None:
        try:
            self._graphs[key] = self._device.capture(plain)
        except (BackendError, RuntimeError) as error:  # of ours, and of a library whose call the capture made fail
            self._give_up(f"a step cannot be captured: {error}")
            return
        self._unproven[key] = np.array(self._device.download(lengths))
        if len(self._graphs) > KEPT:
            (oldest, _) = self._graphs.popitem(last=False)
            self._unproven.pop(oldest, None)

    def _prove(self, key: object, plain: Callable[[], None], output: Buffer, lengths: Buffer) -> None:
        if np.array_equal(self._device.download(lengths), self._unproven[key]):  # another request, as long as that one
            plain()
            return
        self._graphs[key]()
        replayed = self._device.download(output)
        plain()
        computed = self._device.download(output)
        if np.array_equal(replayed, computed):
            del self._unproven[key]
        else:
            self._give_up("a captured step gave other logits than the plain one")

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        self._graphs.clear()
        self._unproven.clear()
