"""Backends that answer wrongly without an error: ONNX Runtime on the CPU with one thing of it broken on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from framefusion.errors import BackendError
from framefusion.runtime.backends.base import BoundSegment
from framefusion.runtime.backends.host import HostDevice
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend, OnnxRuntimeSegment
from framefusion.runtime.bundle import Bundle

OPENED: list[str] = []
"""Names of the backends that were opened, in order."""


class Honest(OnnxRuntimeBackend):
    """As it is."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle.folder, 1, manifest=bundle.manifest)
        OPENED.append(type(self).__name__)


class ScalesACache(Honest):
    """Decoding reads keys of the last segment that are a little too large."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self._last: SegmentCache | None = None

    def cache(self, *arguments: Any) -> SegmentCache:
        """Remember the last one."""
        self._last = super().cache(*arguments)
        return self._last

    def chain(self, segments: Sequence[BoundSegment]) -> Any:
        """Scale before the first step."""
        assert self._last is not None
        keys: Any = self._last.keys[0]
        keys *= 1.1
        return super().chain(segments)


class Rewrites(Honest):
    """Changes an output of every graph that has it."""

    output = ""

    def change(self, array: Any) -> None:
        """In place."""

    def bind(
        self, graph: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], cache: SegmentCache | None
    ) -> Any:
        """Run as it is, then change the output."""
        return Rewritten(super().bind(graph, inputs, outputs, cache), self)


class Rewritten:
    """A bound segment of such a backend."""

    def __init__(self, inner: OnnxRuntimeSegment, owner: Rewrites) -> None:
        self._inner = inner
        self._owner = owner
        self.inputs = inner.inputs
        self.outputs = inner.outputs

    def run(self) -> None:
        """Run and change."""
        self._inner.run()
        if self._owner.output in self.outputs:
            self._owner.change(self.outputs[self._owner.output])


class ChoosingDevice(HostDevice):
    """The CPU as a device that chooses tokens by itself."""


class MisreadingDevice(ChoosingDevice):
    """From its fourth token on it takes the smallest logit in place of the largest."""

    def greedy_tokens(self, *arguments: Any) -> Any:
        """The host's, which reads another logit."""
        return Misreading(super().greedy_tokens(*arguments))


class Misreading:
    """Choices that are right three times."""

    feeds_rows = False
    runs_ahead = False

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._pulled = 0
        self.inputs = inner.inputs
        self.outputs = inner.outputs

    def run(self) -> None:
        """As it is."""
        self._inner.run()

    def request(self) -> None:
        """As it is."""
        self._inner.request()

    def pull(self) -> tuple[int, float]:
        """The token, or the worst one."""
        (token, largest) = self._inner.pull()
        self._pulled += 1
        return (token, largest) if self._pulled < 4 else (int(self.inputs["logits"].argmin()), largest)


class Chooses(Honest):
    """Tokens are chosen by the device."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.device = ChoosingDevice()


class Misreads(Honest):
    """Tokens are chosen by a device that chooses wrongly."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.device = MisreadingDevice()


class MisplacesSimilarity(Rewrites):
    """Scores stand one token too late."""

    output = "similarity"

    def change(self, array: Any) -> None:
        """Move on by one."""
        array[...] = np.roll(array, 1)


class LosesImportance(Rewrites):
    """All tokens are equally important: the first ones are kept."""

    output = "importance"

    def change(self, array: Any) -> None:
        """One value for all."""
        array[...] = 1.0


class LosesNumbers(Rewrites):
    """Importance is no number, as an overflow in the scores alone would leave it; logits are right."""

    output = "importance"

    def change(self, array: Any) -> None:
        """Nothing but NaN."""
        array[...] = np.nan


class RoundsSimilarity(Rewrites):
    """Off by what rounding may do."""

    output = "similarity"

    def change(self, array: Any) -> None:
        """A few units in the last place."""
        array[...] += 4e-6


class AnswersNaN(Rewrites):
    """As an overflow would."""

    output = "logits"

    def change(self, array: Any) -> None:
        """Nothing but NaN."""
        array[...] = np.nan


class ConfusesRows(Rewrites):
    """Rows of a batch get each other's logits."""

    output = "logits"

    def change(self, array: Any) -> None:
        """One row on."""
        array[...] = np.roll(array, 1, axis=0)


class BlursTheTower(Rewrites):
    """The vision tower's rows are a little too small."""

    output = "tokens"

    def change(self, array: Any) -> None:
        """By a tenth."""
        array[...] *= 0.9


def open_wrong(bundle: Bundle, _name: str, _device: str, _threads: int) -> Honest:
    """As a row of the table opens a backend."""
    return ScalesACache(bundle)


def open_honest(bundle: Bundle, _name: str, _device: str, _threads: int) -> Honest:
    """The same of one that is right."""
    return Honest(bundle)


class Fails(Honest):
    """Opens, and cannot run."""

    def bind(self, *_: Any, **__: Any) -> Any:
        """Refuse."""
        raise BackendError("no kernel for this device")


def open_failing(bundle: Bundle, _name: str, _device: str, _threads: int) -> Honest:
    """One that cannot run what it opened."""
    return Fails(bundle)
