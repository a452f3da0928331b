"""The custom torch op of attention over a KV cache in int8, whose scales are fixed when a bundle is built.

    op                         shapes                                                                     result
    quantized_cache_attention  q [B, S, H*hd], k and v [B, S, Hkv*hd], caches int8 [B, Hkv, C, hd],
                               scales [1, Hkv, 1, hd], kv_len [B]                                         out, caches

    code[n, c] = round(value[n, c] / scale[c]), clipped to -128 .. 127;  a value is read as code * scale

One scale for each channel of a head: some channels of keys are many times larger than the others in all tokens, and
one scale for all would leave the others few steps (KIVI, arXiv 2402.02750). Every token is read as its codes stand for,
those of the same call as well: so a prompt gives the same in one part, in several, and in turns of a conversation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framefusion.ops.kernels import attend_last, declared, split_heads

LEAST_CODE = -128
MOST_CODE = 127


def quantize(values: Tensor, scale: Tensor) -> Tensor:
    """Codes of values in any floating type: the nearest step, the even one in the middle.  [..., hd] -> int8"""
    return torch.round(values.float() / scale.float()).clamp(LEAST_CODE, MOST_CODE).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """What codes stand for, in fp32.  int8 [..., hd] -> [..., hd]"""
    return codes.float() * scale.float()


@declared
def quantized_cache_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    kv_len: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cache_attention`, over the codes of the module's table; what is computed with them is in the query's type."""
    keys = past_key.clone()
    values = past_value.clone()
    length = query.shape[1]
    outputs = []
    for row, total in enumerate(kv_len.tolist()):
        part = slice(row, row + 1)
        # 1. The new rows take their slots as codes.
        new = slice(total - length, total)
        keys[part, :, new] = quantize(split_heads(key[part], num_kv_heads), key_scale)
        values[part, :, new] = quantize(split_heads(value[part], num_kv_heads), value_scale)
        # 2. Attention over what all codes stand for.
        read_keys = dequantize(keys[part, :, :total], key_scale).to(query.dtype)
        read_values = dequantize(values[part, :, :total], value_scale).to(query.dtype)
        outputs.append(attend_last(query[part], read_keys, read_values, num_heads))
    return torch.cat(outputs), keys, values


@quantized_cache_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    kv_len: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(past_key), torch.empty_like(past_value)
