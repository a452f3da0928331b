"""What belongs to each token on its way through the segments, and how a plan changes it, on whatever device it lies.

Knows no segment and no policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from framefusion.reduction.plan import Plan
from framefusion.runtime.backends.base import Device
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.host import HOST


@dataclass
class TokenRows:
    """S tokens. Buffers may have more rows than that: what is behind them is padding, finite and without meaning."""

    hidden: Buffer  # [S, D]
    cos: Buffer  # [S, hd/2]
    sin: Buffer
    origin: NDArray[np.int64]  # place of each token in the prompt; there are as many tokens as places
    deepstack: Buffer | None = None  # [K, S, D] visual features that the next K layers add, zeros for text
    device: Device = HOST

    @property
    def length(self) -> int:
        """S, the tokens; buffers may have more rows."""
        return int(self.origin.size)

    def on(self, device: Device) -> TokenRows:
        """The rows on a device, in its type of rows; themselves where they are on it."""
        if device is self.device:
            return self
        if self.device is not HOST:
            raise ValueError("rows go from the host to a device, never between devices")
        moved = self._each(lambda table: device.upload(np.asarray(table, device.row_type)))
        return replace(moved, device=device)

    def reduced(self, plan: Plan) -> TokenRows:
        """The rows after a plan; kept tokens keep the tables of their original positions."""
        if plan.kind == "none":
            return self
        hidden, rotary, features = self.device.reduce_tokens(self.hidden, (self.cos, self.sin), self.deepstack, plan)
        return TokenRows(hidden, *rotary, self.origin[plan.kept], features, self.device)

    def typed(self, float_type: type[np.generic]) -> TokenRows:
        """The rows in another type; themselves where they have it."""
        return self._each(lambda table: self.device.typed(table, float_type))

    def part(self, start: int, end: int) -> TokenRows:
        """The rows of tokens `start` .. `end` - 1, contiguous as graphs are bound to them."""
        tokens = slice(start, end)
        part = self._each(lambda table: self.device.contiguous(table[..., tokens, :]))
        return replace(part, origin=self.origin[tokens])

    def padded(self, size: int) -> TokenRows:
        """The rows with padding up to `size`."""
        return self._each(lambda table: self.device.padded(table, self.length, size))

    def after(self, hidden: Buffer, added: int) -> TokenRows:
        """The rows behind a segment that left `hidden` and added the first `added` of the features."""
        features = None if self.deepstack is None or self.deepstack.shape[0] <= added else self.deepstack[added:]
        return replace(self, hidden=hidden, deepstack=features)

    def inputs(self, deepstack: int) -> dict[str, Buffer]:
        """As a segment takes them: [1, S, D], [1, S, hd/2], and the first features that it adds, [deepstack, S, D]."""
        inputs = {"hidden": self.hidden[None], "cos": self.cos[None], "sin": self.sin[None]}
        if deepstack:
            inputs["deepstack"] = self._features(deepstack)
        return inputs

    def _features(self, count: int) -> Buffer:
        """Visual features for the next `count` layers, [count, S, D]."""
        if self.deepstack is not None and self.deepstack.shape[0] >= count:
            return self.deepstack[:count]
        shape = (count, *self.hidden.shape)  # generated tokens and prompts of text alone have nothing to add
        return self.device.zeros(shape, self.hidden.dtype)

    def _each(self, change: Callable[[Buffer], Buffer]) -> TokenRows:
        """All tables changed in the same way."""
        features = None if self.deepstack is None else change(self.deepstack)
        return replace(self, hidden=change(self.hidden), cos=change(self.cos), sin=change(self.sin), deepstack=features)
