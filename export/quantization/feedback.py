"""Codes by error feedback: what rounding one weight changes of a matrix's outputs, the weights behind it make up.

GPTQ (Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv 2210.17323, algorithm 1), for inputs X of calibration rows:

    1. H = X^T X + damping x its mean diagonal; U is the upper Cholesky factor of its inverse
    2. scales of all blocks first, by our search, an error counting what the mean square of its input says; so columns
       may be rounded in any order, and are, those of the largest inputs first ("act order" with static groups)
    3. column by column: the nearest code on the block's grid, and the columns behind it are moved by the error times
       the column's row of U; the columns of a batch at once, the others behind each batch

A matrix of more than MOST inputs is taken in parts, each with its own part of H, and errors stay within a part: memory
is that of MOST^2 numbers, whatever the model. Knows no model and no film.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.export.quantization.blocks import BlockFormat, BlockQuantized
from framefusion.export.quantization.search import search

MOST = 4096  # inputs whose products with each other are in memory; a multiple of every block
BATCH = 128  # columns whose errors are carried on together
DAMPING = 0.01  # of the mean diagonal, as the paper has it


class Gram:
    """X^T X of the rows that entered a linear map, its diagonal parts of at most MOST inputs.

    Args:
        inputs: of the linear map.
    """

    def __init__(self, inputs: int) -> None:
        self.rows = 0
        sizes = [min(MOST, inputs - start) for start in range(0, inputs, MOST)]
        self.parts = [torch.zeros((size, size)) for size in sizes]

    def add(self, rows: Tensor) -> None:
        """Count rows in.  [..., in]"""
        flat = rows.reshape(-1, rows.shape[-1]).float()
        self.rows += flat.shape[0]
        start = 0
        for part in self.parts:
            inputs = flat[:, start : start + len(part)]
            part.addmm_(inputs.T, inputs)
            start += len(part)

    @property
    def importance(self) -> Tensor:
        """Mean square of each input.  [in]"""
        return torch.cat([part.diagonal() for part in self.parts]) / max(self.rows, 1)


def feed_back(
    weight: Tensor, form: BlockFormat, dtype: torch.dtype = torch.float32, *, gram: Gram, damping: float = DAMPING
) -> BlockQuantized:
    """The codes of a matrix by error feedback.

    Args:
        weight: floats [out, in].
        form: how it is to be stored.
        dtype: that scales are rounded to.
        gram: of the rows that enter it.
        damping: see the module.

    Raises:
        CheckpointError: the rows hold numbers that are infinite or none.
    """
    if not all(bool(torch.isfinite(part).all()) for part in gram.parts):
        raise CheckpointError("the calibration films make activations that are infinite or no number: give other films")
    grid = search(weight, form, dtype, gram.importance if bool(gram.importance.any()) else None)
    codes = grid.codes
    start = 0
    for part in gram.parts:
        columns = slice(start, start + len(part))
        codes[:, columns] = _part(weight[:, columns].float(), grid, start, part, damping)
        start += len(part)
    return BlockQuantized(codes, grid.scales, grid.zero_points, form.bits, form.block)


def _part(weight: Tensor, grid: BlockQuantized, start: int, gram: Tensor, damping: float) -> Tensor:
    """Codes of some columns, by the part of H that is theirs.

    Args:
        weight: [out, n]
        grid: with the scales of the whole matrix.
        start: the first of these columns.
        gram: [n, n]
        damping: see the module.
    """
    # 1. columns of large inputs first: what is behind them can make up for them
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    factor = _factor(gram[order][:, order].double(), damping)
    blocks = (order + start) // grid.block
    scales = grid.scales.float()[:, blocks]
    middle = torch.full_like(scales, grid.format.middle)
    zeros = middle if grid.zero_points is None else grid.zero_points.float()[:, blocks]
    steps = torch.where(scales == 0, 1, scales)
    # 2. column by column, a batch at a time
    moved = weight[:, order]
    codes = torch.empty_like(moved)
    for first in range(0, len(order), BATCH):
        last = min(first + BATCH, len(order))
        batch = moved[:, first:last]
        errors = torch.empty_like(batch)
        for column in range(first, last):
            at = column - first
            code = (batch[:, at] / steps[:, column] + zeros[:, column]).round_().clamp_(0, grid.format.largest)
            codes[:, column] = code
            rounded = (code - zeros[:, column]) * scales[:, column]
            errors[:, at] = (batch[:, at] - rounded) / factor[column, column]
            batch[:, at:] -= torch.outer(errors[:, at], factor[column, column:last])
        # 3. what is behind the batch
        moved[:, last:] -= errors @ factor[first:last, last:]
    found = torch.empty_like(codes)
    found[:, order] = codes
    return found.to(torch.uint8)


def _factor(gram: Tensor, damping: float) -> Tensor:
    """U, the upper Cholesky factor of the inverse of H with as much damping as that takes, in fp32.  [n, n]"""
    mean = float(gram.diagonal().mean()) or 1.0
    for attempt in range(6):
        damped = gram + torch.eye(len(gram), dtype=gram.dtype) * (damping * 10**attempt * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(failed) == 0 and bool(torch.isfinite(upper).all()):
                factor: Tensor = upper.float()
                return factor
    raise CheckpointError("the calibration films' activations do not differ enough to be worked with: give more films")
