"""The custom torch op of a linear map whose weights are in 4 or 8 bits, by blocks of a row.

    op            shapes                                                                              result
    matmul_nbits  x [..., in], packed uint8 [out, B, block * bits / 8], scales [out, B],
                  zero_points uint8 [out, ceil(B * bits / 8)] or None                                 [..., out]

    weight[n, k] = (code[n, k] - zero_point[n, k // block]) * scale[n, k // block],  B = ceil(in / block)

In 4 bits two codes share a byte, the first in its lower half. Without zero points zero is the code 2^(bits - 1); signed
codes are in two's complement. The format is that of com.microsoft.MatMulNBits in ONNX Runtime.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framefusion.ops.kernels import declared

AT_ONCE = 1 << 24  # weights that are floats at a time


@declared
def matmul_nbits(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bits: int,
    block: int,
    inputs: int,
    signed: bool,
) -> Tensor:
    """x @ weight.T with the weight of the module's table, of which some rows are floats at a time.  -> [..., out]

    Activations are not rounded here: a runtime's kernel may do so (accuracy_level of MatMulNBits).
    """
    outputs = packed.shape[0]
    result = x.new_empty((*x.shape[:-1], outputs))
    rows = max(1, AT_ONCE // max(inputs, 1))
    for start in range(0, outputs, rows):
        part = slice(start, start + rows)
        zeros = None if zero_points is None else zero_points[part]
        weight = dequantized(packed[part], scales[part], zeros, bits, block, signed)[:, :inputs]
        result[..., part] = x @ weight.to(x.dtype).T
    return result


@matmul_nbits.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bits: int,
    block: int,
    inputs: int,
    signed: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def dequantized(
    packed: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, block: int, signed: bool
) -> Tensor:
    """Packed weights in fp32.  [out, B * block]"""
    middle = 1 << (bits - 1)
    codes = unpack_bits(packed, bits, block)
    codes = codes ^ middle if signed else codes
    zeros: Tensor | int = middle
    if zero_points is not None:
        zeros = unpack_bits(zero_points, bits, scales.shape[1]).float()[..., None]
    return ((codes.float() - zeros) * scales.float()[..., None]).flatten(1)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of the last axis, a byte each.  uint8 [..., ceil(n * bits / 8)] -> uint8 [..., count]"""
    if bits == 8:
        return packed[..., :count]
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :count]
