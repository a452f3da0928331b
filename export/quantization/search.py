"""Codes by a search for the scale: for each block those whose squared error is the least, inputs weighed or alike.

    1. rounding to the nearest over the whole range of a block is one candidate, and its scale the start of the others
    2. a narrower range clips a few large weights and rounds all others finer: some ranges are tried, and with zero
       points the ones beside each
    3. for the codes of a candidate the best scale is known in closed form, sum(w x q) / sum(w q q)
    4. scales are rounded to the bundle's type before their codes are chosen for good, and errors are those of these

The idea is that of k-quants (ggml's make_qx_quants) and of AWQ's clipping. No candidate is worse than 1, so the result
is never worse than rounding to the nearest. Knows no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from framefusion.export.quantization.blocks import BlockFormat, BlockQuantized

AT_ONCE = 1 << 17  # weights that are searched at a time: what the candidates need stays in the cache
RANGES = {4: tuple(1 - 0.04 * step for step in range(-2, 12)), 8: (1.0, 0.995, 0.99, 0.98, 0.96)}
"""Bits -> shares of a block's range that are tried; 8 bits lose more by clipping than by rounding."""


class _Grid(NamedTuple):
    """A scale, and a zero point in whole codes, for each block.  [n, 1] each"""

    scales: Tensor
    zeros: Tensor


class _Candidate(NamedTuple):
    """A grid, the codes on it, and the squared error of each block."""

    grid: _Grid
    codes: Tensor  # [n, block], as floats
    error: Tensor  # [n, 1]


def search(
    weight: Tensor, form: BlockFormat, dtype: torch.dtype = torch.float32, importance: Tensor | None = None
) -> BlockQuantized:
    """The codes and scales of least error.

    Args:
        weight: floats [out, in].
        form: how it is to be stored.
        dtype: that scales are rounded to.
        importance: [in], what an error of each input's weight counts, such as its mean square; None: all the same.
    """
    outputs, inputs = weight.shape
    count = form.blocks(inputs)
    missing = count * form.block - inputs
    weighed = None if importance is None else _padded(importance[None].float(), missing).reshape(count, form.block)
    codes = torch.empty((outputs, inputs), dtype=torch.uint8)
    scales = torch.empty((outputs, count))
    zeros = None if form.symmetric else torch.empty((outputs, count), dtype=torch.uint8)
    rows = max(1, AT_ONCE // max(inputs, 1))

    def search_rows(start: int) -> None:
        part = slice(start, start + rows)
        blocks = _padded(weight[part].float(), missing).reshape(-1, form.block)
        best = _best(blocks, form, dtype, None if weighed is None else weighed.repeat(len(blocks) // count, 1))
        codes[part] = best.codes.to(torch.uint8).reshape(-1, count * form.block)[:, :inputs]
        scales[part] = best.grid.scales.reshape(-1, count)
        if zeros is not None:
            zeros[part] = best.grid.zeros.to(torch.uint8).reshape(-1, count)

    _in_threads(search_rows, range(0, outputs, rows))
    return BlockQuantized(codes, scales, zeros, form.bits, form.block)


def _in_threads(work: Callable[[int], None], items: Sequence[int]) -> None:
    """Do independent work on all cores, a piece on one: torch's own threads wait for each other in each operation."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, items):
                pass
    finally:
        torch.set_num_threads(threads)


def _padded(rows: Tensor, missing: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


def _best(blocks: Tensor, form: BlockFormat, dtype: torch.dtype, importance: Tensor | None) -> _Candidate:
    """The candidate of least error, block by block.

    Args:
        blocks: [n, block].
        form: how they are to be stored.
        dtype: of scales.
        importance: [n, block].
    """
    best: _Candidate | None = None
    for start in _starts(blocks, form):
        grid = _rounded(start, dtype)
        tried = _on_grid(blocks, grid, form, importance)
        best = tried if best is None else _better(best, tried)
        fitted = _rounded(_fitted(blocks, tried, importance), dtype)
        best = _better(best, _on_grid(blocks, fitted, form, importance))
    assert best is not None
    return best


def _starts(blocks: Tensor, form: BlockFormat) -> Iterator[_Grid]:
    """Grids over the range of each block and parts of it; the first is that of rounding to the nearest."""
    shares = sorted(RANGES[form.bits], key=lambda share: abs(share - 1))
    if form.symmetric:
        high = blocks.amax(-1, keepdim=True)
        low = blocks.amin(-1, keepdim=True)
        extreme = torch.where(high >= -low, high, low)
        if form.positive:  # the extra code is always below
            extreme = -torch.maximum(-low, high * (form.middle / (form.middle - 1)))
        middle = torch.full_like(extreme, form.middle)
        for share in shares:
            yield _Grid(extreme * (share / -form.middle), middle)  # the further side takes the extra code
        if not form.positive:
            yield _Grid(extreme / (form.middle - 1), middle)  # nothing is clipped
        return
    high = blocks.amax(-1, keepdim=True).clamp(min=0)
    low = blocks.amin(-1, keepdim=True).clamp(max=0)
    for share in shares:
        scales = (high - low) * (share / form.largest)
        zeros = (-low * share / _nonzero(scales)).round()
        for beside in (0, -1, 1):
            yield _Grid(scales, (zeros + beside).clamp(0, form.largest))


def _fitted(blocks: Tensor, tried: _Candidate, importance: Tensor | None) -> _Grid:
    """The best scale for the codes of a candidate."""
    steps = tried.codes - tried.grid.zeros
    weighed = steps if importance is None else steps * importance
    norm = (weighed * steps).sum(-1, keepdim=True)
    scales = (weighed * blocks).sum(-1, keepdim=True) / _nonzero(norm)
    return _Grid(torch.where(norm == 0, tried.grid.scales, scales), tried.grid.zeros)


def _on_grid(blocks: Tensor, grid: _Grid, form: BlockFormat, importance: Tensor | None) -> _Candidate:
    """The nearest codes on a grid."""
    codes = torch.addcdiv(grid.zeros, blocks, _nonzero(grid.scales)).round_().clamp_(0, form.largest)
    squares = ((codes - grid.zeros).mul_(grid.scales)).sub_(blocks).square_()
    error = (squares if importance is None else squares.mul_(importance)).sum(-1, keepdim=True)
    return _Candidate(grid, codes, error)


def _better(best: _Candidate, tried: _Candidate) -> _Candidate:
    """Block by block the one of less error."""
    less = tried.error < best.error
    grid = _Grid(*(torch.where(less, *pair) for pair in zip(tried.grid, best.grid, strict=True)))
    return _Candidate(grid, torch.where(less, tried.codes, best.codes), torch.where(less, tried.error, best.error))


def _rounded(grid: _Grid, dtype: torch.dtype) -> _Grid:
    return _Grid(grid.scales.to(dtype).float(), grid.zeros)


def _nonzero(numbers: Tensor) -> Tensor:
    """The same with 1 in place of 0, to divide by."""
    return torch.where(numbers == 0, 1, numbers)
