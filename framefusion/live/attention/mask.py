"""Attention masks of a live model, from those that transformers makes over all tokens to those over the tokens stored.

bool and additive masks of four axes, masks of two axes as flash kernels take them, or none. Knows slots and places, no
cache, no layer and no policy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framefusion.errors import BackendError


def valid_tokens(mask: object, start: int, end: int, batch: int) -> Tensor | None:
    """Which of the tokens start .. end - 1 are no padding: those that some token attends to.  -> bool [B, end - start]

    Args:
        mask: [B or 1, 1, S, T] bool or additive, [B or 1, T] with 0 for padding, or a dict of such.
        start: the first token.
        end: behind the last one.
        batch: B.

    Returns:
        None for a mask of another form, or none at all.
    """
    if isinstance(mask, dict):  # by kind of attention, as generate() makes them for a static cache
        mask = next((kind for kind in mask.values() if kind is not None), None)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 2:
        attended = mask
    else:
        allowed = mask if mask.dtype == torch.bool else mask >= 0
        attended = allowed[:, 0].any(1)
    return attended[:, start:end].bool().expand(batch, -1)


def reduced_mask(
    mask: object, places: Tensor, slots: Tensor, valid: Tensor | None, past: int, flash: bool
) -> Tensor | None:
    """The mask of the tokens present over those stored.

    Args:
        mask: of all new tokens over all tokens, which begins at the first.
        places: of the tokens present among the new ones.  [B, K]
        slots: places of the tokens stored among all; those present are the last of them.  [B, T]
        valid: which slots are no padding, None: all.  [B, T]
        past: tokens before the new ones.
        flash: masks have two axes and mark padding alone.

    Returns:
        [B, 1, K, T], [B, T], or None: causal from the right end.

    Raises:
        BackendError: a mask of another form.
    """
    if mask is None and valid is None:
        return None
    if not (mask is None or isinstance(mask, Tensor)):
        raise _unknown_form(mask)
    rows = torch.arange(len(slots), device=slots.device)
    if flash or (mask is not None and mask.ndim == 2):
        padding_mask = torch.ones_like(slots) if mask is None else mask.to(slots.device)[rows[:, None], slots]
        return padding_mask if valid is None else padding_mask * valid
    places = places.to(slots.device)
    if mask is None:
        chosen = slots[:, None] <= past + places[:, :, None]  # [B, K, T]
    elif mask.ndim == 4 and mask.shape[1] == 1:
        whole = mask.to(slots.device).expand(len(slots), -1, -1, -1)[:, 0]
        chosen = whole[rows[:, None, None], places[:, :, None], slots[:, None]]
    else:
        raise _unknown_form(mask)
    return _hidden_where(chosen, ~valid[:, None] if valid is not None else None)[:, None]


def _unknown_form(mask: object) -> BackendError:
    kind = f"{type(mask).__name__} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    return BackendError(
        f"an attention mask of type {kind} cannot follow reduced tokens: "
        "use attn_implementation sdpa, eager or flash_attention_2"
    )


def buffer_mask(mask: Tensor | None, places: Tensor) -> Tensor:
    """The mask of one new token over all tokens as one over a buffer, made of nothing but tensors of fixed shape.

    mask [B, 1, 1, T], [B, T] or None; places [B, C] of what the buffer holds, -1: nothing  -> [B, 1, 1, C] or [B, C]
    """
    empty = places < 0
    slots = places.clamp(min=0)
    if mask is None:
        return ~empty[:, None, None]
    if mask.ndim == 2:
        return mask.gather(1, slots.clamp(max=mask.shape[1] - 1)) * ~empty
    return _hidden_where(mask[:, 0, 0].expand(len(slots), -1).gather(1, slots), empty)[:, None, None]


def _hidden_where(mask: Tensor, padding: Tensor | None) -> Tensor:
    """A bool or additive mask that lets nobody attend to padding."""
    if padding is None:
        return mask
    return mask.masked_fill(padding, torch.finfo(mask.dtype).min if mask.is_floating_point() else False)
