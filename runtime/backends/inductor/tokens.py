"""The tokens of one answer, chosen by torch on its device: see `GreedyTokens`. Knows no segment and no stop."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from framefusion.runtime.backends.base import Device, StepBuffers
from framefusion.runtime.backends.buffer import Buffer


def tensor_of(buffer: Buffer) -> Any:
    """A buffer of this device as what it is, a tensor: torch's types are not known where torch need not be."""
    return buffer


class TorchGreedyTokens:
    """See `GreedyTokens`. Two places for results, in turn: one is read while the next step is running.

    Args:
        torch: the module.
        device: of all buffers.
        step: see `StepBuffers`.
        rotary: see `Device.greedy_tokens`.
        table: likewise.
        limit: likewise.
    """

    runs_ahead = True

    def __init__(
        self,
        torch: ModuleType,
        device: Device,
        step: StepBuffers,
        rotary: tuple[Buffer, Buffer],
        table: Buffer | None,
        limit: int,
    ) -> None:
        self._torch = torch
        self.feeds_rows = table is not None
        self.inputs: Mapping[str, Buffer] = {"logits": step.logits}
        self.outputs: Mapping[str, Buffer] = {"hidden": step.hidden, "cos": step.cos, "sin": step.sin}
        self._logits = tensor_of(step.logits)[0, :limit]
        self._hidden = tensor_of(step.hidden)[0, 0]
        self._lengths = tensor_of(step.lengths)
        self._rotary = [
            (tensor_of(there)[0, 0], tensor_of(rows)) for there, rows in zip((step.cos, step.sin), rotary, strict=True)
        ]
        self._table = None if table is None else tensor_of(table)
        self._results = [device.mirror((2,), np.float64) for _ in range(2)]  # fp64 holds every id
        self._step = 0
        self._requested = 0
        self._pulled = 0

    def run(self) -> None:
        """See `GreedyTokens.run`: the first of the largest logits, as numpy takes it."""
        (largest, token) = self._logits.max(0)
        result = tensor_of(self._results[self._step % 2].buffer)
        result[0] = token
        result[1] = largest
        self._step += 1
        for there, rows in self._rotary:
            there.copy_(rows[min(self._step, len(rows) - 1)])
        if self._table is not None:
            known = token < len(self._table)
            row = self._table.index_select(0, token.clamp(max=len(self._table) - 1)[None])[0]
            self._hidden.copy_(self._torch.where(known, row, self._torch.zeros_like(row)))
        self._lengths.add_(1)

    def request(self) -> None:
        """See `GreedyTokens.request`."""
        self._results[self._requested % 2].request()
        self._requested += 1

    def pull(self) -> tuple[int, float]:
        """See `GreedyTokens.pull`."""
        assert self._pulled < self._requested < self._pulled + 3  # of two places, none is written before it is read
        (token, largest) = self._results[self._pulled % 2].pull()
        self._pulled += 1
        return int(token), float(largest)
