"""Which tokens of a prompt a cache layer stores, and what it stands for. Knows neither policy nor transformers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from framefusion.errors import BackendError
from framefusion.live.seams import broken


class CacheLayer(Protocol):
    """What the live model uses of a cache layer that it adopted: `Slots`, and the length that transformers reads."""

    slots: Tensor
    valid: Tensor | None
    total: int
    announced: bool

    def extend(self, slots: Tensor, valid: Tensor | None, total: int) -> None:
        """Say which tokens will be stored once the next update is done: `slots` and `valid` [B, K] of `total`."""

    def get_seq_length(self) -> int:
        """Length of the whole prompt, as positions and masks go on from it."""


class Slots:
    """Which tokens a cache layer stores. A compiled step does not bring it up to date: `caught_up` does.

    Attributes:
        slots: places of the stored tokens in the prompt.  [B, K] int64
        valid: which of them are no padding; None: all.  [B, K] bool
        total: length of the whole prompt.
        announced: whether `extend` said which tokens the next update brings.
    """

    slots: Tensor
    valid: Tensor | None = None
    total = 0
    announced = False

    def extend(self, slots: Tensor, valid: Tensor | None, total: int) -> None:
        """Say which tokens will be stored once the next update is done: `slots` and `valid` [B, K] of `total`."""
        self.slots = slots
        self.valid = valid
        self.total = total
        self.announced = True

    def take(self) -> None:
        """Begin an update.

        Raises:
            BackendError: `extend` was not called: the model that goes on over this cache has no FrameFusion.
        """
        if not self.announced:
            raise BackendError(
                "this cache holds reduced tokens, which a model goes on from under apply_framefusion alone: "
                "apply it again, or begin with a new cache"
            )
        self.announced = False

    def clear(self) -> None:
        """Say that nothing is stored."""
        self.slots = self.slots[:, :0]
        self.valid = None
        self.total = 0

    def select(self, rows: Tensor) -> None:
        """Say that the batch now consists of these rows of it.  [B'] int64"""
        rows = rows.to(self.slots.device)
        self.slots = self.slots[rows]
        self.valid = None if self.valid is None else self.valid[rows]


def caught_up(layer: CacheLayer, past: int) -> tuple[Tensor, Tensor | None]:
    """Slots and validity of a layer behind which compiled steps have stored a token each, up to `past`.  [B, K] twice

    Raises:
        BackendError: the layer stands for more tokens than the cache says.
    """
    if layer.total == past:
        return layer.slots, layer.valid
    if layer.total > past:
        raise broken(f"the cache counts {past} tokens for a prompt of {layer.total}")
    latest = torch.arange(layer.total, past, device=layer.slots.device).expand(len(layer.slots), -1)
    valid = layer.valid
    if valid is not None:
        valid = torch.cat([valid, torch.ones_like(latest, dtype=torch.bool)], dim=1)
    return torch.cat([layer.slots, latest], dim=1), valid


def joined_valid(old: Tensor, old_valid: Tensor | None, new: Tensor, new_valid: Tensor | None) -> Tensor | None:
    """Validity of old slots [B, K] and new ones [B, N] together; None where nothing is padding.  -> [B, K + N]"""
    if old_valid is None and new_valid is None:
        return None
    old_valid = torch.ones_like(old, dtype=torch.bool) if old_valid is None else old_valid
    new_valid = torch.ones_like(new, dtype=torch.bool) if new_valid is None else new_valid
    return torch.cat([old_valid.to(new.device), new_valid.to(new.device)], dim=1)
