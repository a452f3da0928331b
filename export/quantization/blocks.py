"""A matrix in 4 or 8 bits: whole numbers, and a scale (and zero point) for each block of a row.

    weight[n, k] = (code[n, k] - zero_point[n, k // block]) * scale[n, k // block]

n counts outputs and k inputs, as checkpoints store a linear map. Codes are unsigned, from 0 to 2^bits - 1; a symmetric
matrix has the zero point 2^(bits - 1) everywhere and stores none. This is exactly what ONNX Runtime's MatMulNBits
multiplies by, so whatever a checkpoint holds in this form goes to a graph without a rounding.

Packed, as a graph holds it (B blocks in a row, the last one filled up with zeros' codes):

    weights       uint8 [out, B, block * bits / 8]    in 4 bits two codes a byte, the first in the lower half
    scales        float [out, B]
    zero_points   uint8 [out, ceil(B * bits / 8)]     the same, a row by itself

Knows no checkpoint, no graph and no way to choose codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.ops.quantized import unpack_bits

BITS = (4, 8)
LEAST_BLOCK = 16
MOST_BLOCK = 256
"""Sizes of a block are powers of two from the one to the other, as MatMulNBits takes them."""

Part = Literal["packed", "scales", "zero_points"]
"""A parameter of a quantized linear map, by its name in the graph."""


@dataclass(frozen=True)
class BlockFormat:
    """How a matrix is stored.

    Attributes:
        bits: of a code, one of BITS.
        block: inputs that share a scale, a power of two.
        symmetric: no zero points.
        signed: packed codes are in two's complement, code - 2^(bits - 1), as TensorRT reads INT4 and INT8; symmetric.

    Raises:
        CheckpointError: no kernel has this format.
    """

    bits: int
    block: int
    symmetric: bool = True
    signed: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise CheckpointError(f"weights of {self.bits} bits: {' and '.join(map(str, BITS))} are known")
        if not LEAST_BLOCK <= self.block <= MOST_BLOCK or self.block & (self.block - 1):
            raise CheckpointError(
                f"blocks of {self.block} weights: powers of two from {LEAST_BLOCK} to {MOST_BLOCK} are known"
            )
        if self.signed and not self.symmetric:
            raise CheckpointError("signed codes have no zero points: take unsigned ones")

    @property
    def middle(self) -> int:
        """The code of zero where there are no zero points."""
        return 1 << (self.bits - 1)

    @property
    def largest(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def blocks(self, inputs: int) -> int:
        """B, blocks of a row of so many weights."""
        return -(-inputs // self.block)

    @property
    def positive(self) -> bool:
        """Whether scales have to be above 0: TensorRT takes others of INT4 alone."""
        return self.signed and self.bits == 8

    @property
    def parts(self) -> tuple[Part, ...]:
        """Parameters of a linear map."""
        return ("packed", "scales") if self.symmetric else ("packed", "scales", "zero_points")

    def shapes(self, outputs: int, inputs: int) -> dict[Part, tuple[int, ...]]:
        """Packed parameters and their shapes: see the module.

        Raises:
            CheckpointError: signed codes end within a block, which their graphs cannot say.
        """
        if self.signed and inputs % self.block:
            raise CheckpointError(
                f"rows of {inputs} weights end within a block of {self.block}, which the portable dialect cannot say: "
                "take a size that divides them (--weights int4:16), or --dialect gqa"
            )
        count = self.blocks(inputs)
        shapes: dict[Part, tuple[int, ...]] = {
            "packed": (outputs, count, self.block * self.bits // 8),
            "scales": (outputs, count),
        }
        return shapes if self.symmetric else shapes | {"zero_points": (outputs, -(-count * self.bits // 8))}

    def __str__(self) -> str:
        return f"int{self.bits}, blocks of {self.block}, {'symmetric' if self.symmetric else 'with zero points'}"


class Packed(NamedTuple):
    """Parameters of a quantized linear map as a graph holds them: see the module."""

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None


@dataclass(frozen=True, eq=False)
class BlockQuantized:
    """A quantized matrix, one code a byte.

    Attributes:
        codes: uint8 [out, in], each at most 2^bits - 1.
        scales: float [out, ceil(in / block)], finite; negative ones are right.
        zero_points: uint8 [out, ceil(in / block)]; None: 2^(bits - 1).
        bits, block: see `BlockFormat`.

    Raises:
        CheckpointError: shapes, types or values are not of this form.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    block: int

    def __post_init__(self) -> None:
        form = self.format
        if self.codes.ndim != 2 or self.codes.dtype != torch.uint8:
            raise CheckpointError(
                f"codes are {self.codes.dtype} {tuple(self.codes.shape)}, uint8 [out, in] is expected"
            )
        expected = (self.codes.shape[0], form.blocks(self.codes.shape[1]))
        if tuple(self.scales.shape) != expected or not self.scales.is_floating_point():
            raise CheckpointError(
                f"scales are {self.scales.dtype} {tuple(self.scales.shape)}, floats {expected} are expected"
            )
        if not bool(torch.isfinite(self.scales).all()):
            raise CheckpointError("a scale is not finite: the file is damaged, download it again")
        zeros = self.zero_points
        if zeros is not None and (tuple(zeros.shape) != expected or zeros.dtype != torch.uint8):
            raise CheckpointError(f"zero points are {zeros.dtype} {tuple(zeros.shape)}, uint8 {expected} is expected")
        for what, numbers in (("code", self.codes), ("zero point", zeros)):
            if numbers is not None and numbers.numel() and int(numbers.max()) > form.largest:
                raise CheckpointError(
                    f"a {what} is {int(numbers.max())}, of {self.bits} bits {form.largest} is the end"
                )

    @property
    def format(self) -> BlockFormat:
        """How it is stored."""
        return BlockFormat(self.bits, self.block, self.zero_points is None)

    @property
    def farthest(self) -> float:
        """What scales are multiplied with at most: the code that is furthest from any zero point."""
        return self.format.middle if self.zero_points is None else self.format.largest

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix in floats, computed in fp32 and rounded once.  [out, in]"""
        count = self.scales.shape[1]
        inputs = self.codes.shape[1]
        zeros = self.format.middle if self.zero_points is None else self.zero_points.float()[..., None]
        blocked = _in_blocks(self.codes, count, self.block).float() - zeros
        return (blocked * self.scales.float()[..., None]).flatten(1)[:, :inputs].to(dtype)

    def rows(self, part: slice) -> BlockQuantized:
        """Some of its outputs."""
        zeros = None if self.zero_points is None else self.zero_points[part]
        return BlockQuantized(self.codes[part], self.scales[part], zeros, self.bits, self.block)

    def pack(self, *, signed: bool = False) -> Packed:
        """The parameters of a graph: see the module.

        Args:
            signed: see `BlockFormat.signed`.

        Raises:
            CheckpointError: signed codes of 8 bits have a scale below 0.
        """
        form = BlockFormat(self.bits, self.block, self.zero_points is None, signed)
        count = self.scales.shape[1]
        # 1. what fills the last block up stands for zero
        codes = _in_blocks(self.codes, count, self.block, form.middle)
        tail = count * self.block - self.codes.shape[1]
        if tail and self.zero_points is not None:
            codes[:, -1, self.block - tail :] = self.zero_points[:, -1:]
        scales = self.scales
        if signed:
            if form.positive and bool((scales < 0).any()):
                raise CheckpointError("a scale of INT8 is below 0, which TensorRT refuses: build with --dialect gqa")
            codes = torch.where((scales == 0)[..., None], form.middle, codes)  # 0 times a scale that is none
            scales = torch.where(scales == 0, 1, scales)
        # 2. two's complement is the same bits with the highest turned
        packed = pack_bits(codes ^ form.middle if signed else codes, self.bits)
        zeros = None if self.zero_points is None else pack_bits(self.zero_points, self.bits)
        return Packed(packed, scales, zeros)


def unpack(packed: Packed, form: BlockFormat, inputs: int) -> BlockQuantized:
    """The reverse of `BlockQuantized.pack`, for rows of so many weights."""
    codes = unpack_bits(packed.packed, form.bits, form.block)
    codes = codes ^ form.middle if form.signed else codes
    count = form.blocks(inputs)
    zeros = None if packed.zero_points is None else unpack_bits(packed.zero_points, form.bits, count)
    return BlockQuantized(codes.flatten(1)[:, :inputs].contiguous(), packed.scales, zeros, form.bits, form.block)


def joined(parts: Iterable[Packed], outputs: int) -> Packed:
    """One matrix of parts of its rows, in their order; beside it one part at a time is in memory.

    Args:
        parts: [n, ...] each, `outputs` rows in all.
        outputs: rows of the matrix.
    """
    whole: Packed | None = None
    filled = 0
    for part in parts:
        rows = slice(filled, filled + len(part.packed))
        if len(part.packed) == outputs:
            return part
        if whole is None:
            zeros = part.zero_points
            room = None if zeros is None else _room(zeros, outputs)
            whole = Packed(_room(part.packed, outputs), _room(part.scales, outputs), room)
        whole.packed[rows] = part.packed
        whole.scales[rows] = part.scales
        if whole.zero_points is not None and part.zero_points is not None:
            whole.zero_points[rows] = part.zero_points
        filled = rows.stop
    if whole is None or filled != outputs:
        raise ValueError(f"{filled} rows of {outputs}")
    return whole


def _room(values: Tensor, rows: int) -> Tensor:
    """Memory for so many rows; the system gives its pages when they are written."""
    return values.new_empty((rows, *values.shape[1:]))


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes of a byte each as `bits` a code, along the last axis.  uint8 [..., n] -> uint8 [..., ceil(n * bits / 8)]"""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=8)  # as ONNX Runtime's quantizer fills up
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _in_blocks(codes: Tensor, count: int, block: int, fill: int = 0) -> Tensor:
    """[out, in] -> [out, count, block], what is missing filled."""
    missing = count * block - codes.shape[1]
    padded = torch.nn.functional.pad(codes, (0, missing), value=fill) if missing else codes
    return padded.reshape(-1, count, block)
