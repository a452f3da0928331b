"""One linear map of a quantized checkpoint: its tensors as they are stored, and the matrix that they stand for.

    whole numbers   weight[n, k] = (code[n, k] - zero_point[n, k // group]) * scale[n, k // group]
    floats of 8 b.  weight[n, k] = value[n, k] * scale[n // rows, k // columns]

Products are computed in fp32 and rounded once, to the type that the format computes in. Packed tensors are in memory as
they are stored, a quarter or an eighth of the matrix; codes are unpacked some rows at a time. Shapes and types are
proven from headers by whoever makes an object of these classes (formats/). Knows no configuration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from framefusion.console.plain_text import printable
from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.tensors.tensor_file import DTYPES, TensorEntry
from framefusion.export.quantization.blocks import BITS, LEAST_BLOCK, MOST_BLOCK, BlockFormat, BlockQuantized
from framefusion.export.quantization.float8 import Float8Format, Float8Quantized, has_not_numbers

USUAL_BLOCK = 128  # for a scale that serves a whole row
_AT_ONCE = 1 << 22  # bytes of fp32 that are computed at a time


class Stored(Protocol):
    """The tensors of a checkpoint as its files have them."""

    def entry(self, key: str) -> TensorEntry | None:
        """Type and shape by the header; None where there is no such tensor."""

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its first axis."""


class Grouped(NamedTuple):
    """Whole numbers as they are stored, one code a byte.

    Attributes:
        codes: uint8 [out, in].
        scales: [out, ceil(in / group)], in the type they are stored in.
        zero_points: uint8 as scales; None: 2^(bits - 1).
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None


@dataclass(frozen=True)
class QuantizedLinear(ABC):
    """A linear map by the tensors that stand for its weight.

    Attributes:
        module: its name; the matrix is `{module}.weight`.
        keys: the tensors that are read or proven for it.
        shape: (out, in).
        dtype: of the matrix, as safetensors names it.
        activations: how the format rounds what is multiplied with it; "": not at all.
    """

    module: str
    keys: tuple[str, ...]
    shape: tuple[int, int]
    dtype: str
    activations: str

    @property
    def weight(self) -> str:
        """The key of the matrix."""
        return f"{self.module}.weight"

    @property
    @abstractmethod
    def description(self) -> str:
        """How the weights are stored, for people."""

    @abstractmethod
    def rows(self, stored: Stored, first: int, last: int) -> Iterator[Tensor]:
        """Rows from `first` to before `last`, some at a time, in fp32.  [n, in]"""

    def read(self, stored: Stored, rows: slice | None = None) -> Tensor:
        """The matrix, or some of its rows, in `dtype`.

        Raises:
            CheckpointError: scales or weights are no numbers, or the values contradict config.json.
        """
        first, last, _ = (rows or slice(None)).indices(self.shape[0])
        result = torch.empty(max(last - first, 0), self.shape[1], dtype=DTYPES[self.dtype])
        place = 0
        for block in self.rows(stored, first, last):
            target = result[place : place + len(block)]
            target.copy_(block)
            if not bool(torch.isfinite(target).all()):
                raise self.damaged(f"{self.weight} becomes infinite or no number in {self.dtype}")
            place += len(block)
        return result

    def damaged(self, why: str) -> CheckpointError:
        """The error for values that cannot be weights."""
        return CheckpointError(f"{printable(why)}: the checkpoint is damaged, download it again")

    def checked_scales(self, key: str, scales: Tensor) -> Tensor:
        """Scales that are finite and not all zero."""
        if not bool(torch.isfinite(scales).all()):
            raise self.damaged(f"{key} holds a scale that is infinite or no number")
        if scales.numel() and not bool((scales != 0).any()):
            raise self.damaged(f"{key} holds scales of 0 alone, so that nothing is left of {self.weight}")
        return scales


@dataclass(frozen=True)
class GroupedLinear(QuantizedLinear):
    """Whole numbers of 4 or 8 bits with a scale for each group of a row.

    Attributes:
        bits: of a code.
        group: inputs that share a scale, as stored: the row's length where a row has one.
        symmetric: all zero points are 2^(bits - 1).
    """

    bits: int
    group: int
    symmetric: bool

    @property
    def description(self) -> str:
        """See `QuantizedLinear`."""
        grouped = "a scale a row" if self.group >= self.shape[1] else f"groups of {self.group}"
        return f"{self.bits} bits, {grouped}, {'symmetric' if self.symmetric else 'with zero points'}"

    @abstractmethod
    def opened(self, stored: Stored) -> tuple[Callable[[int, int], Tensor], Tensor, Tensor | None]:
        """Read the stored tensors.

        Returns:
            what unpacks rows from the first to before the second number to codes, uint8 [n, in]; the scales and zero
            points of all rows, see `Grouped`.
        """

    def grouped(self, stored: Stored) -> Grouped:
        """Codes, scales and zero points of the whole matrix, as they are stored."""
        codes, scales, zeros = self.opened(stored)
        return Grouped(codes(0, self.shape[0]), scales, zeros)

    @property
    def form(self) -> BlockFormat | None:
        """Blocks that kernels multiply by and these groups consist of, their scale repeated; None: there are none.

        A scale of a whole row serves blocks of any size, the last one filled up.
        """
        if self.bits not in BITS:
            return None
        block = USUAL_BLOCK if self.group >= self.shape[1] else min(self.group & -self.group, MOST_BLOCK)
        return BlockFormat(self.bits, block, self.symmetric) if block >= LEAST_BLOCK else None

    def blocks(self, stored: Stored) -> BlockQuantized | None:
        """The matrix as kernels take it, its codes, scales and zero points as they are stored; see `form`.

        Raises:
            CheckpointError: see `read`.
        """
        form = self.form
        if form is None:
            return None
        found = self.grouped(stored)
        count = form.blocks(self.shape[1])
        repeated = count if self.group >= self.shape[1] else self.group // form.block

        def spread(values: Tensor) -> Tensor:
            return values.repeat_interleave(repeated, 1)[:, :count].contiguous()

        zeros = None if found.zero_points is None else spread(found.zero_points)
        return BlockQuantized(found.codes.contiguous(), spread(found.scales), zeros, form.bits, form.block)

    def rows(self, stored: Stored, first: int, last: int) -> Iterator[Tensor]:
        """See `QuantizedLinear`."""
        codes, scales, zeros = self.opened(stored)
        middle = 1 << (self.bits - 1)
        for start, end in row_blocks(first, last, self.shape[1]):
            part = grouped_view(codes(start, end), self.group).float()
            part -= middle if zeros is None else zeros[start:end, :, None].float()
            part *= scales[start:end, :, None].float()
            yield part.flatten(1)[:, : self.shape[1]]

    def checked_zeros(self, key: str, zeros: Tensor) -> Tensor | None:
        """Zero points, or None where the map is symmetric, which they must bear out."""
        if not self.symmetric:
            return zeros
        if bool((zeros != 1 << (self.bits - 1)).any()):
            raise CheckpointError(
                f"{key} holds zero points though config.json says that the weights are symmetric: one of the two is of "
                "another model, download the checkpoint again"
            )
        return None


@dataclass(frozen=True)
class FloatLinear(QuantizedLinear):
    """Floats of 8 bits with a scale for each rectangle of the matrix.

    Attributes:
        block: rows and columns that share a scale.
        scale: key of the scales, [ceil(out / rows), ceil(in / columns)] once `grid` has them.
        by_token: activations are rounded to the same type, each token by its own scale.
    """

    block: tuple[int, int]
    scale: str
    by_token: bool = False

    @property
    def description(self) -> str:
        """See `QuantizedLinear`."""
        rows, columns = self.block
        if rows >= self.shape[0] and columns >= self.shape[1]:
            return "floats of 8 bits, a scale a matrix"
        return f"floats of 8 bits, {'a scale a row' if columns >= self.shape[1] else f'blocks of {rows} x {columns}'}"

    @property
    def form(self) -> Float8Format | None:
        """What graphs have of equal numbers, each row with scales of its own; None: nothing."""
        width = self.block[1]
        if width >= self.shape[1]:
            return Float8Format(None, self.by_token)
        whole = self.shape[1] % width == 0 and width & (width - 1) == 0
        return Float8Format(width) if whole and LEAST_BLOCK <= width <= MOST_BLOCK else None

    def blocks(self, stored: Stored) -> Float8Quantized | None:
        """The matrix as it is stored, the scales of its blocks repeated for each of their rows; see `form`.

        Raises:
            CheckpointError: see `read`.
        """
        form = self.form
        if form is None:
            return None
        outputs = self.shape[0]
        height = self.block[0]
        scales = self.checked_scales(self.scale, stored.read(self.scale).float())
        scales = scales.reshape(-(-outputs // height), -1).repeat_interleave(min(height, outputs), 0)[:outputs]
        codes = stored.read(self.weight).view(torch.uint8)  # never as floats, which take four times as much
        if has_not_numbers(codes):
            raise self.damaged(f"{self.weight} holds what is no number")
        return Float8Quantized(codes, scales.contiguous(), form)

    def rows(self, stored: Stored, first: int, last: int) -> Iterator[Tensor]:
        """See `QuantizedLinear`."""
        height, width = self.block
        grid = self.checked_scales(self.scale, stored.read(self.scale).float())
        grid = grid.reshape(-(-self.shape[0] // height), -(-self.shape[1] // width))
        for start, end in row_blocks(first, last, self.shape[1]):
            part = stored.read(self.weight, slice(start, end)).float()
            if not bool(torch.isfinite(part).all()):
                raise self.damaged(f"{self.weight} holds what is no number")
            scales = grid[torch.arange(start, end) // height]
            yield (grouped_view(part, width) * scales[..., None]).flatten(1)[:, : self.shape[1]]


def grouped_view(rows: Tensor, group: int) -> Tensor:
    """[n, in] -> [n, ceil(in / group), group], what is missing of the last one 0."""
    group = min(group, rows.shape[1])
    missing = -rows.shape[1] % group
    padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    return padded.reshape(len(rows), -1, group)


def row_blocks(first: int, last: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each of at most _AT_ONCE bytes of fp32 or of one row."""
    step = max(1, _AT_ONCE // (4 * width))
    for start in range(first, last, step):
        yield start, min(start + step, last)


def unpacked(packed: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Codes of a byte each out of words of 32 bits, the lowest bits first.  int32 [m, n] -> uint8 [m, n * 32 / bits]

    Args:
        packed: each holds 32 / bits codes.
        bits: 4 or 8.
        order: place of a code in its word; None: one after the other.
    """
    octets = packed.contiguous().view(torch.uint8)
    codes = octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(1)
    if order is None:
        return codes
    return codes.reshape(len(codes), -1, len(order))[..., list(order)].flatten(1)
