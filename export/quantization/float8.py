"""A matrix in floats of 8 bits, e4m3 as OCP and ONNX define it (float8e4m3fn): 4 bits of exponent, 3 of mantissa.

    weight[n, k] = value[n, k] * scale[n, k // block]          a row has one scale where there are no blocks

A value is from -448 to 448, its half step at most 2^-4 of it, and below 2^-6 2^-10: so a scale need not be narrow, as
that of whole numbers has to be, and a row does with one. There is no infinity; two of the codes are no number.

    weights    uint8 [out, in]     the bits of the values
    scales     float [out, B]      B = 1, or blocks of a row, which are full

The search tries some scales within a factor of 2, which is where the codes of floats repeat, and takes the one of least
squared error: a value's error goes by where it lies between two powers of 2. Knows no checkpoint and no graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.export.quantization.blocks import LEAST_BLOCK, MOST_BLOCK, BlockFormat, BlockQuantized, Packed, Part
from framefusion.ops.quantized import FLOAT8_LARGEST

LARGEST = FLOAT8_LARGEST
NOT_NUMBERS = (0x7F, 0xFF)  # of the codes
PHASES = 8  # scales that are tried, from the narrowest to before its double
ROUNDED_SCALE = 2.0**-8
"""Largest change of a checkpoint's scale by the bundle's type: bfloat16 changes none by more, float16 those that are
far below 2^-14."""
_ROWS = 1 << 20  # weights that are searched at a time


@dataclass(frozen=True)
class Float8Format:
    """How a matrix is stored.

    Attributes:
        block: inputs that share a scale, a power of two; None: all of a row.
        rounds: products round activations to the same type, by a scale of each token; without blocks alone, as
            TensorRT's kernels have it.

    Raises:
        CheckpointError: no graph has such blocks.
    """

    block: int | None = None
    rounds: bool = False

    bits: ClassVar[int] = 8
    parts: ClassVar[tuple[Part, ...]] = ("packed", "scales")

    def __post_init__(self) -> None:
        block = self.block
        if block is not None and (not LEAST_BLOCK <= block <= MOST_BLOCK or block & (block - 1)):
            raise CheckpointError(
                f"blocks of {block} floats of 8 bits: powers of two from {LEAST_BLOCK} to {MOST_BLOCK} are known"
            )
        if block is not None and self.rounds:
            raise CheckpointError("activations are rounded to floats of 8 bits where a row has one scale alone")

    def blocks(self, inputs: int) -> int:
        """B, scales of a row of so many weights."""
        return 1 if self.block is None else -(-inputs // self.block)

    def shapes(self, outputs: int, inputs: int) -> dict[Part, tuple[int, ...]]:
        """Parameters and their shapes: see the module.

        Raises:
            CheckpointError: a row ends within a block, which graphs cannot say.
        """
        if self.block is not None and inputs % self.block:
            raise CheckpointError(
                f"rows of {inputs} floats of 8 bits end within a block of {self.block}, which graphs cannot say: build "
                "with --weights fp8 (a scale a row) or dequantized"
            )
        return {"packed": (outputs, inputs), "scales": (outputs, self.blocks(inputs))}

    def __str__(self) -> str:
        activations = ", activations too" if self.rounds else ""
        return f"fp8, {'a scale a row' if self.block is None else f'blocks of {self.block}'}{activations}"


@dataclass(frozen=True, eq=False)
class Float8Quantized:
    """A matrix of floats of 8 bits.

    Attributes:
        codes: uint8 [out, in], the bits of e4m3 numbers.
        scales: float [out, B], finite.
        format: see `Float8Format`.

    Raises:
        CheckpointError: shapes or types are not of this form, a code is no number, or a scale is not finite.
    """

    codes: Tensor
    scales: Tensor
    format: Float8Format

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != torch.uint8:
            raise CheckpointError(
                f"codes are {self.codes.dtype} {tuple(self.codes.shape)}, uint8 [out, in] is expected"
            )
        expected = self.format.shapes(*self.codes.shape)["scales"]
        if tuple(self.scales.shape) != expected or not self.scales.is_floating_point():
            raise CheckpointError(
                f"scales are {self.scales.dtype} {tuple(self.scales.shape)}, floats {expected} are expected"
            )
        if not bool(torch.isfinite(self.scales).all()):
            raise CheckpointError("a scale is not finite: the file is damaged, download it again")
        if has_not_numbers(self.codes):
            raise CheckpointError("a float of 8 bits is no number: the file is damaged, download it again")

    @property
    def farthest(self) -> float:
        """What scales are multiplied with at most."""
        return LARGEST

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix in floats, computed in fp32 and rounded once.  [out, in]"""
        outputs, inputs = self.codes.shape
        values = self.codes.view(torch.float8_e4m3fn).float().reshape(outputs, self.scales.shape[1], -1)
        return (values * self.scales.float()[..., None]).reshape(outputs, inputs).to(dtype)

    def rows(self, part: slice) -> Float8Quantized:
        """Some of its outputs."""
        return Float8Quantized(self.codes[part], self.scales[part], self.format)

    def packed(self) -> Packed:
        """The parameters of a graph: see the module."""
        return Packed(self.codes.contiguous(), self.scales.contiguous(), None)


def has_not_numbers(codes: Tensor) -> bool:
    """Whether one of the codes, uint8, is no number; beside them it takes a byte each."""
    return any(bool((codes == code).any()) for code in NOT_NUMBERS)


WeightFormat = BlockFormat | Float8Format
Quantized = BlockQuantized | Float8Quantized


def check_scales(scales: Tensor, dtype: torch.dtype, what: str) -> None:
    """Refuse scales that a type cannot hold.

    Args:
        scales: of a checkpoint.
        dtype: of the bundle.
        what: they are of, for people.

    Raises:
        CheckpointError: one is changed by more than ROUNDED_SCALE.
    """
    wanted = scales.float()
    moved = (wanted.to(dtype).float() - wanted).abs() > ROUNDED_SCALE * wanted.abs()
    if bool(moved.any()):
        name = str(dtype).removeprefix("torch.")
        value = float(wanted[moved].flatten()[0])
        raise CheckpointError(
            f"{what} has a scale of {value:.3g}, which {name} cannot hold: build with --dtype bfloat16 or float32, or "
            "with --weights fp8, which chooses scales anew"
        )


def search_float8(weight: Tensor, form: Float8Format, dtype: torch.dtype = torch.float32) -> Float8Quantized:
    """The scales of least squared error, and the nearest value for each weight.

    Args:
        weight: floats [out, in], finite.
        form: how it is to be stored.
        dtype: that scales are rounded to before values are chosen; none is below its smallest normal number.
    """
    outputs, inputs = weight.shape
    shapes = form.shapes(outputs, inputs)
    codes = torch.empty((outputs, inputs), dtype=torch.uint8)
    scales = torch.empty(shapes["scales"])
    rows = max(1, _ROWS // max(inputs, 1))
    for start in range(0, outputs, rows):
        part = slice(start, start + rows)
        blocks = weight[part].float().reshape(-1, inputs // shapes["scales"][1])
        found, values = _best(blocks, dtype)
        codes[part] = values.view(torch.uint8).reshape(-1, inputs)
        scales[part] = found.reshape(-1, shapes["scales"][1])
    return Float8Quantized(codes, scales, form)


def _best(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales [n, 1] and values e4m3 [n, block] of least error."""
    largest = blocks.abs().amax(-1, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for phase in range(PHASES):
        # 1. a scale that the type holds, and none that is 0
        scales = (largest * (2 ** (phase / PHASES) / LARGEST)).clamp(min=torch.finfo(dtype).smallest_normal)
        scales = scales.to(dtype).float()
        # 2. the nearest values; rounding of the scale may put the largest weight beyond the last one
        values = (blocks / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        error = (values.float() * scales - blocks).square().sum(-1, keepdim=True)
        if best is None:
            best = scales, values, error
            continue
        # 3. block by block the one of less error
        less = error < best[2]
        chosen = torch.where(less, values.view(torch.uint8), best[1].view(torch.uint8))
        best = torch.where(less, scales, best[0]), chosen.view(torch.float8_e4m3fn), torch.where(less, error, best[2])
    assert best is not None
    return best[0], best[1]
