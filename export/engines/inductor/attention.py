"""Attention over a cache in plain torch, in several forms: which one is compiled, is measured where it will run.

    form          what it is                                                      caches are shown    devices
    masked        all slots, what is not to be seen masked                        whole or cut        any, the reference
    split         the tokens before without a mask, the new ones causal, merged   cut to what is held CPU
    flash         flash attention, causal from the lower right                    cut to what is held CUDA
    varlen        the same, over as many keys as kv_len says on the device        whole               CUDA
    cudnn         the tokens before by varlen, the new ones by cuDNN, merged      whole               CUDA

A mask costs twice on a CPU, whose kernel computes the half that nobody sees, and far more on a GPU, where no fused
kernel takes both a mask and heads that share keys: what is left is a product of all pairs in memory (the math path).
A form whose caches are whole has one length for every step, so that a step can be captured as a CUDA graph.

Merging takes the logarithm of each part's sum of weights: softmax over both is the mean of the two by those sums.
Knows no module and no compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from framefusion.ops.kernels import split_heads

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""query [1, H, S, hd], new keys and values [1, Hkv, S, hd], all keys and values [1, Hkv, C, hd], kv_len [1] ->
[1, H, S, hd]."""

_ATEN: Any = torch.ops.aten


class Form(NamedTuple):
    """One form of attention.

    Attributes:
        attend: computes it.
        device: that it is for, as torch names it.
        is_cut: the caches hold kv_len slots and no more, so their shape says it.
    """

    attend: Attend
    device: str
    is_cut: bool


def masked(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor) -> Tensor:
    """See the table; shapes that no value decides."""
    length = query.shape[2]
    places = kv_len - length + torch.arange(length, device=query.device)
    visible = torch.arange(keys.shape[2], device=query.device)[None] <= places[:, None]  # [S, C]
    return nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=visible, enable_gqa=query.shape[1] > keys.shape[1]
    )


def split(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor) -> Tensor:
    """See the table. Heads that share keys are rows of one product over the tokens before."""
    (_, heads, length, width) = query.shape
    groups = keys.shape[1]
    before = keys.shape[2] - length
    # the kernel divides by the number of keys; what it makes of one too many is left out below
    shown = torch.sym_max(before, 1)  # type: ignore[no-untyped-call]
    grouped = query.reshape(1, groups, heads // groups * length, width)
    flash = _ATEN._scaled_dot_product_flash_attention_for_cpu
    (past, past_sum) = flash(grouped, keys[:, :, :shown], values[:, :, :shown])
    (new, new_sum) = flash(query, *_alike(key, value, heads), 0.0, True)
    any_before = (kv_len > length)[:, None, None]
    past_sum = past_sum.reshape(1, heads, length)
    return merged(past.reshape(query.shape), torch.where(any_before, past_sum, -torch.inf), new, new_sum)


def _alike(key: Tensor, value: Tensor, heads: int) -> list[Tensor]:
    """Keys and values with as many heads as queries: not every release of torch checks that they are as many."""
    repeats = heads // key.shape[1]
    return [tensor.repeat_interleave(repeats, 1) if repeats > 1 else tensor for tensor in (key, value)]


def merged(past: Tensor, past_sum: Tensor, new: Tensor, new_sum: Tensor) -> Tensor:
    """Attention over two sets of keys from that over each, and the logarithms of their sums [1, H, S]."""
    share = torch.sigmoid(past_sum - new_sum)[..., None]
    mean: Tensor = (past.float() * share + new.float() * (1 - share)).to(new.dtype)
    return mean


def flash(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor) -> Tensor:
    """See the table."""
    out: Tensor = _ATEN._scaled_dot_product_flash_attention(query, keys, values, 0.0, True)[0]
    return out


def varlen(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor) -> Tensor:
    """See the table."""
    return _over_held(query, keys, values, kv_len, is_causal=True)[0]


def cudnn(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor) -> Tensor:
    """See the table. Where no key is before, flash attention calls the sum infinite."""
    (heads, length) = query.shape[1:3]
    held = kv_len - length
    (past, past_sum) = _over_held(query, keys, values, held, is_causal=False)
    alike = _alike(key, value, heads)
    (new, new_sum, *_) = _ATEN._scaled_dot_product_cudnn_attention(query, *alike, None, True, 0.0, True)
    past_sum = torch.where((held > 0)[:, None, None], past_sum, -torch.inf)
    return merged(past, past_sum, new, new_sum.reshape(1, heads, length))


def _over_held(query: Tensor, keys: Tensor, values: Tensor, held: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Attention over the first `held` [1] slots, and the logarithm of its sums; causal from the lower right."""
    length = query.shape[2]
    slots = keys.shape[2]
    rows = [tensor.transpose(1, 2)[0] for tensor in (query, keys, values)]  # [S, H, hd], [C, Hkv, hd]
    steps = torch.arange(2, device=query.device, dtype=torch.int32)
    (out, sums, *_) = _ATEN._flash_attention_forward(
        *rows, steps * length, steps * slots, length, slots, 0.0, is_causal, False, seqused_k=held.to(torch.int32)
    )
    return out.transpose(0, 1)[None], sums[None]


FORMS: Mapping[str, Form] = {
    "masked": Form(masked, "any", is_cut=False),
    "split": Form(split, "cpu", is_cut=True),
    "flash": Form(flash, "cuda", is_cut=True),
    "varlen": Form(varlen, "cuda", is_cut=False),
    "cudnn": Form(cudnn, "cuda", is_cut=False),
}


def cache_attention(form: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """ops.cache_attention in a form, which needs no value of kv_len to know a shape.

    Writing to the caches becomes an update in place, because nothing reads what they held before.
    """
    attend = FORMS[form].attend

    def over_cache(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        kv_len: Tensor,
        num_heads: int,
        num_kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        length = query.shape[1]
        places = kv_len - length + torch.arange(length, device=query.device)
        new = [split_heads(rows, num_kv_heads) for rows in (key, value)]
        keys = past_key.index_copy(2, places, new[0])
        values = past_value.index_copy(2, places, new[1])
        out = attend(split_heads(query, num_heads), new[0], new[1], keys, values, kv_len)
        return out.transpose(1, 2).reshape(query.shape), keys, values

    return over_cache
