"""The custom torch ops of a linear map whose weights are in 4 or 8 bits, by blocks of a row.

    op             shapes                                                                             result
    matmul_nbits   x [..., in], packed uint8 [out, B, block * bits / 8], scales [out, B],
                   zero_points uint8 [out, ceil(B * bits / 8)] or None                                [..., out]
    matmul_float8  x [..., in], packed uint8 [out, in], the bits of e4m3, scales [out, B]             [..., out]

    weight[n, k] = (code[n, k] - zero_point[n, k // block]) * scale[n, k // block],  B = ceil(in / block)

In 4 bits two codes share a byte, the first in its lower half. Without zero points zero is the code 2^(bits - 1); signed
codes are in two's complement. The format is that of com.microsoft.MatMulNBits in ONNX Runtime.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framefusion.ops.kernels import declared

AT_ONCE = 1 << 24  # weights that are floats at a time
FLOAT8_LARGEST = 448.0  # of e4m3


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


@declared
def matmul_float8(x: Tensor, packed: Tensor, scales: Tensor, rounds: bool) -> Tensor:
    """x @ weight.T with weight[n, k] = e4m3(packed[n, k]) * scales[n, k * B // in].  -> [..., out]

    Args:
        x: [..., in].
        packed: bits of float8_e4m3fn, uint8 [out, in].
        scales: [out, B], B divides `in`.
        rounds: graphs round x to e4m3, too, each row by its own scale. Not here: see `rounded_to_float8`.
    """
    (outputs, inputs) = packed.shape
    result = x.new_empty((*x.shape[:-1], outputs))
    rows = max(1, AT_ONCE // max(inputs, 1))
    for start in range(0, outputs, rows):
        part = slice(start, start + rows)
        values = packed[part].view(torch.float8_e4m3fn).float().reshape(-1, scales.shape[1], inputs // scales.shape[1])
        weight = (values * scales[part].float()[..., None]).flatten(1)
        result[..., part] = x @ weight.to(x.dtype).T
    return result


@matmul_float8.register_fake
def _(x: Tensor, packed: Tensor, scales: Tensor, rounds: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def rounded_to_float8(x: Tensor) -> Tensor:
    """Each row rounded to e4m3 by a scale that takes its largest number to the largest there is.  [..., in]"""
    largest = x.abs().amax(-1, keepdim=True)
    steps = torch.where(largest == 0, 1, largest / FLOAT8_LARGEST)
    return (x / steps).clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST).to(torch.float8_e4m3fn).to(x.dtype) * steps


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
