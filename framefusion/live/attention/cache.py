"""Layers of transformers' dynamic and static caches that store fewer tokens than they stand for.

The length that transformers reads is the whole prompt's, so that positions, masks and the slicing of input_ids go on
from the original length; `slots` tells which of its tokens are stored. It travels with the request: a second turn, beam
search and assisted generation find in it all they need. Knows no policy.

A static layer keeps its buffers [B, Hkv, max_cache_len, hd] and fills their front. In eager code its update gives the
part that is filled. A compiled decode step reads and writes tensors alone, all of fixed shape and address: `places`
(the slots, -1 where nothing is stored) and `filled`, from which the step makes its own mask over the whole buffer.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from framefusion.errors import BackendError
from framefusion.live.attention.mask import buffer_mask
from framefusion.live.seams import broken, cache_layers, cache_of, crop_gives_length

COMPILED = (
    "a prompt is reduced to lengths of its own, which compiled code has no room for: run the prefill without "
    "torch.compile, and compile decode steps over a static cache alone, as generate() does; or give it "
    "disable_compile=True"
)


class Slots:
    """Which tokens a cache layer stores.

    `slots` [B, K] are their places in the prompt, `valid` [B, K] tells padding (None: there is none), `total` is the
    length of the whole prompt. A compiled step leaves all three behind: `caught_up` adds what it stored.
    """

    slots: Tensor
    valid: Tensor | None = None
    total = 0
    announced = False

    def extend(self, slots: Tensor, valid: Tensor | None, total: int) -> None:
        """Say which tokens will be stored once the next update is done."""
        self.slots = slots
        self.valid = valid
        self.total = total
        self.announced = True

    def take(self) -> None:
        """Begin an update.

        Raises:
            BackendError: nobody said which tokens come: the model that goes on over this cache is not changed.
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
        """Say that the batch now consists of these rows of it."""
        rows = rows.to(self.slots.device)
        self.slots = self.slots[rows]
        self.valid = None if self.valid is None else self.valid[rows]


def caught_up(layer: Slots, past: int) -> tuple[Tensor, Tensor | None]:
    """Slots and validity of a layer behind which compiled steps have stored a token each, up to `past`."""
    if layer.total == past:
        return layer.slots, layer.valid
    if layer.total > past:
        raise broken(f"the cache tells {past} tokens for a prompt of {layer.total}")
    latest = torch.arange(layer.total, past, device=layer.slots.device).expand(len(layer.slots), -1)
    valid = layer.valid
    if valid is not None:
        valid = torch.cat([valid, torch.ones_like(latest, dtype=torch.bool)], dim=1)
    return torch.cat([layer.slots, latest], dim=1), valid


@cache
def cache_layer() -> Any:
    """The class for a dynamic cache, made when transformers is there."""

    class ReducedLayer(Slots, cache_layers().DynamicLayer):  # type: ignore[misc]
        """Keys and values of the tokens that reached this layer."""

        keys: Tensor
        values: Tensor

        def update(self, *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
            self.take()
            keys, values = super().update(*args, **named)
            return keys, values

        def get_seq_length(self) -> int:
            return self.total

        def reset(self) -> None:
            super().reset()
            self.clear()

        def crop(self, tokens_to_remove: int) -> None:
            """Take back the latest tokens, as assisted generation does; none of a reduced prompt."""
            length = tokens_to_remove > 0 or (tokens_to_remove == 0 and crop_gives_length())
            count = self.total - tokens_to_remove if length else -tokens_to_remove
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
            super().reorder_cache(beam_idx)
            self.select(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.select(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self.select(torch.arange(len(self.slots)).repeat_interleave(repeats))

    return ReducedLayer


@cache
def static_cache_layer() -> Any:
    """The class for a static cache, made when transformers is there."""

    class ReducedStaticLayer(Slots, cache_layers().StaticLayer):  # type: ignore[misc]
        """Keys and values of the tokens that reached this layer, at the front of buffers of fixed shape."""

        keys: Tensor
        values: Tensor
        places: Tensor | None = None  # [B, max_cache_len] int64
        filled: Tensor  # int64, no axes

        def extend(self, slots: Tensor, valid: Tensor | None, total: int) -> None:
            if total > self.max_cache_len:
                raise BackendError(
                    f"a static cache of {self.max_cache_len} tokens cannot stand for {total}: "
                    f"give max_cache_len={total} or more"
                )
            super().extend(slots, valid, total)

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if torch.compiler.is_compiling():
                where = self.filled[None]
                self.keys.index_copy_(2, where, key_states)
                self.values.index_copy_(2, where, value_states)
                self.filled.add_(1)
                self.cumulative_length.add_(1)
                return self.keys, self.values
            self.take()
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            stored = self.slots.shape[1]
            first = stored - key_states.shape[2]
            self.keys[:, :, first:stored] = key_states
            self.values[:, :, first:stored] = value_states
            self._tell_compiled_steps(stored)
            return self.keys[:, :, :stored], self.values[:, :, :stored]

        def _tell_compiled_steps(self, stored: int) -> None:
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
            """Note the place of the one new token, and give the mask over the buffer for one over all tokens."""
            assert self.places is not None  # a prefill came first
            self.places.index_copy_(1, self.filled[None], self.cumulative_length.expand(len(self.places), 1))
            return buffer_mask(mask, self.places)

        def reset(self) -> None:
            super().reset()
            self.clear()
            if self.places is not None:
                self.places.fill_(-1)
                self.filled.zero_()

        def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
            super().reorder_cache(beam_idx)
            self.select(beam_idx)

    return ReducedStaticLayer


def compiled_step(index: int, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a decoder layer in compiled code, hidden [B, 1, D]: a decode step, never a prefill.

    Raises:
        BackendError: more than one token, or reduced ones in a dynamic cache.
    """
    cache = cache_of(given)
    layer: Any = None if cache is None or len(cache.layers) <= index else cache.layers[index]
    reduced = isinstance(layer, Slots)
    static = hasattr(layer, "mask_of_compiled_step")
    if hidden.shape[1] > 1 or (reduced and not static):
        refuse_to_compile()
    if not reduced:
        return given
    return {**given, "attention_mask": layer.mask_of_compiled_step(given.get("attention_mask"))}


@partial(torch.compiler.disable, reason=COMPILED)  # or the compiler would take the error for a reason to run uncompiled
def refuse_to_compile() -> None:
    """Raise the error for compiled code that would have to reduce.

    Raises:
        BackendError: always; with fullgraph=True the compiler's own error, which gives the same reason.
    """
    raise BackendError(COMPILED)


def adopt(past_key_values: Any, index: int, dense: tuple[Tensor, Tensor | None]) -> Any:
    """The cache's layer of that index as one that knows its slots; what it holds already stays in it.

    Args:
        past_key_values: transformers' Cache.
        index: of the layer.
        dense: slots and validity of a layer that holds every earlier token.

    Raises:
        BackendError: a quantized cache, or a sliding one that holds tokens.
    """
    kinds = cache_layers()
    layers = past_key_values.layers
    make = kinds.DynamicLayer
    while len(layers) <= index:
        layers.append(make())
    layer = layers[index]
    if isinstance(layer, Slots):
        return layer
    # what reaches a window is refused before it gets here
    if type(layer) is kinds.DynamicSlidingWindowLayer and not layer.is_initialized:
        layer = make()
    if type(layer) is kinds.StaticSlidingWindowLayer and not layer.is_initialized:
        layer = kinds.StaticLayer(layer.max_cache_len)
    if type(layer) not in (kinds.DynamicLayer, kinds.StaticLayer):
        raise BackendError(
            f"a cache of {type(layer).__name__} cannot hold reduced tokens, whose number differs by layer: "
            "use the DynamicCache that generate() makes by default, or a StaticCache"
        )
    adopted = cache_layer()() if type(layer) is kinds.DynamicLayer else static_cache_layer()(layer.max_cache_len)
    adopted.__dict__.update(layer.__dict__)
    adopted.extend(*dense, dense[0].shape[1])
    layers[index] = adopted
    return adopted
