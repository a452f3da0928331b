"""Layers of transformers' dynamic and static caches that store fewer tokens than they stand for.

A static layer keeps its buffers [B, Hkv, max_cache_len, hd] and fills their front. In eager code its update gives the
part that is filled. A compiled decode step reads and writes tensors alone, all of fixed shape and address: `places`
(the slots, -1 where nothing is stored) and `filled`, from which the step makes its own mask over the whole buffer.

Importing this imports transformers. Knows no policy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from framefusion.errors import BackendError
from framefusion.live.attention.mask import buffer_mask
from framefusion.live.attention.slots import Slots
from framefusion.live.seams import cache_layers, crop_gives_length


class ReducedLayer(Slots, cache_layers().DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, Hkv, K, hd] of the K tokens that reached this layer."""

    keys: Tensor
    values: Tensor

    def update(self, *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Store the tokens that `extend` announced, and give all keys and values.  [B, Hkv, K, hd] twice

        Raises:
            BackendError: none were announced.
        """
        self.take()
        keys, values = super().update(*args, **named)
        return keys, values

    def get_seq_length(self) -> int:
        """Length of the whole prompt."""
        return self.total

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the latest tokens, as assisted generation does; none of a reduced prompt.

        Args:
            tokens_to_remove: their number as a negative one, or, as up to transformers 5.10, the length that stays.

        Raises:
            BackendError: reduced tokens are among them.
        """
        is_length = tokens_to_remove > 0 or (tokens_to_remove == 0 and crop_gives_length())
        count = self.total - tokens_to_remove if is_length else -tokens_to_remove
        if count <= 0:
            return
        latest = torch.arange(self.total - count, self.total, device=self.slots.device)
        tail = self.slots[:, -count:]
        if tail.shape[1] < count or bool((tail != latest).any()):
            raise BackendError(f"the cache cannot give back {count} tokens: reduced ones are among them")
        # not by the base class: some versions would count from the length that this layer stands for
        self.keys = self.keys[..., :-count, :]
        self.values = self.values[..., :-count, :]
        self.slots = self.slots[:, :-count]
        self.valid = None if self.valid is None else self.valid[:, :-count]
        self.total -= count

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Go on with these rows of the batch, as beam search does.  [B] int64"""
        super().reorder_cache(beam_idx)
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows of the batch.  [B'] int64"""
        super().batch_select_indices(indices)
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with each row of the batch this many times, as beam search begins."""
        super().batch_repeat_interleave(repeats)
        self.select(torch.arange(len(self.slots)).repeat_interleave(repeats))


class ReducedStaticLayer(Slots, cache_layers().StaticLayer):  # type: ignore[misc]
    """Keys and values of the tokens that reached this layer, at the front of buffers of fixed shape.

    Attributes:
        keys, values: of which the first K places are filled.  [B, Hkv, max_cache_len, hd]
        places: the slots, -1 where nothing is stored; None before the first prefill.  [B, max_cache_len] int64
        filled: K, for compiled steps.  int64, no axes
    """

    keys: Tensor
    values: Tensor
    places: Tensor | None = None
    filled: Tensor

    def extend(self, slots: Tensor, valid: Tensor | None, total: int) -> None:
        """Say which tokens will be stored once the next update is done: `slots` and `valid` [B, K] of `total`.

        Raises:
            BackendError: the prompt is longer than the buffers may stand for.
        """
        if total > self.max_cache_len:
            raise BackendError(
                f"a static cache of {self.max_cache_len} tokens cannot stand for {total}: "
                f"give max_cache_len={total} or more"
            )
        super().extend(slots, valid, total)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the tokens that `extend` announced, [B, Hkv, n, hd] each, and give keys and values.

        Returns:
            The filled part [B, Hkv, K, hd] twice; in compiled code the whole buffers [B, Hkv, max_cache_len, hd].

        Raises:
            BackendError: none were announced.
        """
        # 1. a compiled decode step: one token, by tensors of fixed shape alone; the slots are caught up with later
        if torch.compiler.is_compiling():
            where = self.filled[None]
            self.keys.index_copy_(2, where, key_states)
            self.values.index_copy_(2, where, value_states)
            self.filled.add_(1)
            self.cumulative_length.add_(1)
            return self.keys, self.values
        # 2. otherwise the new tokens go behind those that are stored, and attention gets the filled part
        self.take()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stored = self.slots.shape[1]
        first = stored - key_states.shape[2]
        self.keys[:, :, first:stored] = key_states
        self.values[:, :, first:stored] = value_states
        self._note_for_compiled_steps(stored)
        return self.keys[:, :, :stored], self.values[:, :, :stored]

    def _note_for_compiled_steps(self, stored: int) -> None:
        """Write slots, count and length into the tensors that compiled steps read."""
        slots = self.slots
        valid = self.valid
        if self.places is None or len(self.places) != len(slots):
            self.places = torch.full((len(slots), self.max_cache_len), -1, device=self.device)
            self.filled = torch.zeros((), dtype=torch.int64, device=self.device)
            torch._dynamo.mark_static_address(self.places)
            torch._dynamo.mark_static_address(self.filled)
        self.places[:, :stored] = slots if valid is None else slots.masked_fill(~valid, -1)
        self.filled.fill_(stored)
        self.cumulative_length.fill_(self.total)

    def mask_of_compiled_step(self, mask: Tensor | None) -> Tensor:
        """Note the place of the new token, and give the mask over the buffer for one over all tokens.

        Args and result are those of `buffer_mask`: [B, 1, 1, T] or [B, T] -> [B, 1, 1, C] or [B, C].
        """
        assert self.places is not None  # a prefill came first
        self.places.index_copy_(1, self.filled[None], self.cumulative_length.expand(len(self.places), 1))
        return buffer_mask(mask, self.places)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.clear()
        if self.places is not None:
            self.places.fill_(-1)
            self.filled.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Go on with these rows of the batch, as beam search does.  [B] int64"""
        super().reorder_cache(beam_idx)
        self.select(beam_idx)
