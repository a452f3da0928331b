"""The custom torch ops of the decoder and tower graphs, with fake kernels so that torch.export sees static shapes.

Each op marks a place where the targets differ: a dialect (export/graphs/tracing/dialects.py) translates it into that
target's own node. The eager kernels here are the reference each translation is tested against. Nothing here decides
anything.

    op                 shapes                                                                     result
    rms_norm           x [B, S, D], weight [D]                                                    [B, S, D]
    swish              x [...]; alpha 1 is SiLU, 1.702 is quick GELU                              [...]
    rotary             x [B, S, H*hd], cos and sin [B, S, hd/2], rotate-half layout               [B, S, H*hd]
    cache_attention    q [B, S, H*hd], k and v [B, S, Hkv*hd], caches [B, Hkv, C, hd], kv_len [B] out, caches
    full_attention     q [B, S, H*hd], k and v [B, T, H*hd], each of S sees all of T              [B, S, H*hd]
    masked_attention   q, k, v [B, S, H*hd], bias [1 or B, 1, S, S] added to the scores           [B, S, H*hd]
    similarity         hidden [B, S, D], previous [S] (-1: first of its track)                    fp32 [S]
    importance         q [B, S, H*hd], k [B, S, Hkv*hd], last [1]                                 fp32 [S]

The product with weights in 4 or 8 bits is in quantized.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload

from framefusion.reduction.tracks import DISSIMILAR

NAMESPACE = "framefusion"
KERNELS: dict[OpOverload, Callable[..., Any]] = {}
"""Each op's own kernel, for a compiler that is to see plain torch in its place."""


def declared(kernel: Callable[..., Any]) -> CustomOpDef:
    """Register a kernel as the op of its name."""
    op = torch.library.custom_op(f"{NAMESPACE}::{kernel.__name__}", kernel, mutates_args=())
    KERNELS[getattr(torch.ops.framefusion, kernel.__name__).default] = kernel
    return op


@declared
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis, the statistics in fp32 (Zhang and Sennrich, arXiv 1910.07467).

    x [B, S, D], weight [D] -> [B, S, D]
    """
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (x.float() * scale).to(x.dtype) * weight


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@declared
def swish(x: Tensor, alpha: float) -> Tensor:
    """x * sigmoid(alpha * x), element by element: SiLU for alpha 1, quick GELU for 1.702.  [...] -> [...]"""
    return x * torch.sigmoid(alpha * x)


@swish.register_fake
def _(x: Tensor, alpha: float) -> Tensor:
    return torch.empty_like(x)


@declared
def rotary(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864), rotate-half layout.

    x [B, S, H*hd]; cos and sin [B, S, hd/2], a value for each pair of channels -> [B, S, H*hd]
    """
    batch, length, width = x.shape
    first, second = x.view(batch, length, num_heads, width // num_heads).chunk(2, -1)
    cos = cos[:, :, None]
    sin = sin[:, :, None]  # [B, S, 1, hd/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).reshape(x.shape)


@rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    return torch.empty_like(x)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, S, H*hd] -> [B, H, S, hd]"""
    return x.view(x.shape[0], x.shape[1], num_heads, -1).transpose(1, 2)


def attend_last(query: Tensor, keys: Tensor, values: Tensor, num_heads: int) -> Tensor:
    """Causal attention of one row's last S tokens over all T that it holds, each up to itself.

    query [1, S, H*hd], keys and values [1, Hkv, T, hd] -> [1, S, H*hd]
    """
    total = keys.shape[2]
    frontier = torch.arange(total - query.shape[1], total, device=query.device)[:, None]
    mask = torch.arange(total, device=query.device)[None] <= frontier  # [S, T]
    out = torch.nn.functional.scaled_dot_product_attention(
        split_heads(query, num_heads), keys, values, attn_mask=mask, enable_gqa=True
    )
    return out.transpose(1, 2).reshape(query.shape)


@declared
def cache_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    kv_len: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of S new tokens over a cache that holds `kv_len` tokens once they are in it, row by row.

    The new tokens take the slots kv_len - S .. kv_len - 1; a compiled dialect writes them in place, this kernel copies.

    query [B, S, H*hd], key and value [B, S, Hkv*hd], past_key and past_value [B, Hkv, C, hd], kv_len [B] int64 ->
    output [B, S, H*hd] and both caches.
    """
    keys = past_key.clone()
    values = past_value.clone()
    length = query.shape[1]
    outputs = []
    for row, total in enumerate(kv_len.tolist()):
        part = slice(row, row + 1)
        keys[part, :, total - length : total] = split_heads(key[part], num_kv_heads)
        values[part, :, total - length : total] = split_heads(value[part], num_kv_heads)
        outputs.append(attend_last(query[part], keys[part, :, :total], values[part, :, :total], num_heads))
    return torch.cat(outputs), keys, values


@cache_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    kv_len: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(past_key), torch.empty_like(past_value)


@declared
def full_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Attention without a mask, as a vision tower uses it within one temporal grid.

    query [B, S, H*hd], key and value [B, T, H*hd] -> [B, S, H*hd]
    """
    out = torch.nn.functional.scaled_dot_product_attention(
        split_heads(query, num_heads), split_heads(key, num_heads), split_heads(value, num_heads)
    )
    return out.transpose(1, 2).reshape(query.shape)


@full_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    return torch.empty_like(query)


@declared
def masked_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """Attention with an additive mask, as a vision tower with windows of unequal size uses it.

    query, key and value [B, S, H*hd], bias [1 or B, 1, S, S] -> [B, S, H*hd]
    """
    out = torch.nn.functional.scaled_dot_product_attention(
        split_heads(query, num_heads),
        split_heads(key, num_heads),
        split_heads(value, num_heads),
        attn_mask=bias.to(query.dtype),
    )
    return out.transpose(1, 2).reshape(query.shape)


@masked_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    return torch.empty_like(query)


@declared
def similarity(hidden: Tensor, previous: Tensor) -> Tensor:
    """Cosine of each token to the previous token of its track, in fp32 (fp16 products overflow).

    hidden [1, S, D], previous [S] int64, -1 for the first of a track -> [S] fp32, DISSIMILAR where there is no previous
    token or one of the two is zero. The numpy twin is tracks.track_similarity (FrameFusion, arXiv 2501.01986).
    """
    rows = hidden[0].float()
    before = rows[previous.clamp(min=0)]
    norms = rows.norm(dim=-1)
    scale = norms * norms[previous.clamp(min=0)]
    comparable = (previous >= 0) & (scale > 0)
    cosine = (rows * before).sum(-1) / scale.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(comparable, cosine, torch.full_like(cosine, DISSIMILAR))


@similarity.register_fake
def _(hidden: Tensor, previous: Tensor) -> Tensor:
    return hidden.new_empty((hidden.shape[1],), dtype=torch.float32)


@declared
def importance(query: Tensor, key: Tensor, last: Tensor, rows: int, num_heads: int, num_kv_heads: int) -> Tensor:
    """Attention that the last `rows` tokens pay to each token, mean over heads and rows; every row is causal.

    `last` [1] is the index of the last real token: what lies behind it is padding and gets 0. Rows before the first
    token of a shorter chunk repeat token 0.

    query [1, S, H*hd], key [1, S, Hkv*hd] -> [S] fp32
    """
    length = query.shape[1]
    head_dim = query.shape[2] // num_heads
    chosen = (last - torch.arange(rows, device=query.device)).clamp(min=0)  # [rows]
    q = query[0, chosen].view(rows, num_kv_heads, num_heads // num_kv_heads, head_dim).float()
    k = key[0].view(length, num_kv_heads, head_dim).float()
    scores = torch.einsum("rkgd,skd->rkgs", q, k) * head_dim**-0.5
    visible = torch.arange(length, device=query.device)[None] <= chosen[:, None]  # [rows, S]
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    mean: Tensor = scores.softmax(-1).mean((0, 1, 2))
    return mean


@importance.register_fake
def _(query: Tensor, key: Tensor, last: Tensor, rows: int, num_heads: int, num_kv_heads: int) -> Tensor:
    return query.new_empty((query.shape[1],), dtype=torch.float32)
