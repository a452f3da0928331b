"""Error feedback against the paper's equations, written out plainly: one column, one inverse, nothing shared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.export.quantization import feedback
from framefusion.export.quantization.blocks import BlockFormat, BlockQuantized
from framefusion.export.quantization.feedback import DAMPING, Gram, feed_back
from framefusion.export.quantization.search import search


def drawn(outputs: int, inputs: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix, and rows whose inputs go together and differ in size, as activations do."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn((rows, inputs), generator=random) @ torch.randn((inputs, inputs), generator=random)
    sizes = torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=random)]
    return torch.randn((outputs, inputs), generator=random), mixed * sizes


def gram_of(rows: Tensor) -> Gram:
    gram = Gram(rows.shape[1])
    for part in torch.split(rows, 50):  # as films come one after the other
        gram.add(part[None])
    return gram


def by_the_paper(weight: Tensor, rows: Tensor, grid: BlockQuantized) -> Tensor:
    """Codes by equation 2 of arXiv 2210.17323 (equation 3 of OBQ), in fp64 and O(n^4): the remaining weights move by
    -(w_q - quant(w_q)) / [H^-1]_qq times column q of H^-1, H being that of the columns that are left."""
    products = rows.double().T @ rows.double()
    hessian = products + DAMPING * products.diagonal().mean() * torch.eye(len(products))
    left = torch.argsort(products.diagonal(), descending=True, stable=True).tolist()
    moved = weight.double().clone()
    codes = torch.zeros_like(weight)
    zeros = torch.full_like(grid.scales, grid.format.middle) if grid.zero_points is None else grid.zero_points
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        column = left[0]
        scale = grid.scales[:, column // grid.block].double()
        zero = zeros[:, column // grid.block].double()
        codes[:, column] = (moved[:, column] / scale + zero).round().clamp(0, grid.format.largest)
        error = moved[:, column] - (codes[:, column] - zero) * scale
        moved[:, left] -= torch.outer(error / inverse[0, 0], inverse[0])
        left = left[1:]
    return codes.to(torch.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("form", [BlockFormat(4, 32), BlockFormat(4, 64, symmetric=False), BlockFormat(8, 32)], ids=str)
def test_codes_are_those_of_the_paper(form: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "BATCH", 16)  # several, and the last one not full
    weight, rows = drawn(24, 72, 300)
    gram = gram_of(rows)
    ours = feed_back(weight, form, gram=gram)
    grid = search(weight, form, importance=gram.importance)
    assert torch.equal(ours.scales, grid.scales)
    theirs = by_the_paper(weight, rows, grid)
    assert (ours.codes != theirs).float().mean() < 0.005  # a weight between two codes goes either way
    assert (grid.codes != theirs).float().mean() > 0.1


@pytest.mark.slow
def test_outputs_err_less_than_by_searching_alone() -> None:
    weight, rows = drawn(48, 128, 400)
    _, others = drawn(48, 128, 400)
    form = BlockFormat(4, 128)
    expected = others @ weight.T

    def error(blocks: BlockQuantized) -> float:
        return float((others @ blocks.dequantize().T - expected).norm() / expected.norm())

    gram = gram_of(rows)
    plain = error(search(weight, form))
    weighed = error(search(weight, form, importance=gram.importance))
    fed_back = error(feed_back(weight, form, gram=gram))
    assert weighed < plain
    assert fed_back < 0.7 * weighed


@pytest.mark.slow
def test_large_matrices_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded; each part is by itself, and gets what it would get alone."""
    monkeypatch.setattr(feedback, "MOST", 64)
    weight, rows = drawn(16, 160, 300)
    form = BlockFormat(4, 32)
    gram = gram_of(rows)
    assert [len(part) for part in gram.parts] == [64, 64, 32]
    whole = feed_back(weight, form, gram=gram)
    for start, end in ((0, 64), (64, 128), (128, 160)):
        alone = feed_back(weight[:, start:end], form, gram=gram_of(rows[:, start:end]))
        assert torch.equal(whole.codes[:, start:end], alone.codes)


def test_rows_that_say_nothing_change_nothing() -> None:
    weight, _ = drawn(8, 64, 1)
    form = BlockFormat(4, 32)
    gram = gram_of(torch.zeros((5, 64)))
    assert torch.equal(feed_back(weight, form, gram=gram).codes, search(weight, form).codes)
    single = gram_of(torch.ones((1, 64)))  # of rank 1: damping alone makes it invertible
    assert feed_back(weight, form, gram=single).codes.shape == weight.shape


def test_activations_that_are_no_numbers_are_refused() -> None:
    weight, rows = drawn(8, 64, 20)
    rows[3, 5] = torch.inf
    with pytest.raises(CheckpointError, match="infinite or no number"):
        feed_back(weight, BlockFormat(4, 32), gram=gram_of(rows))
