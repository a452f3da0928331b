"""Codes that are chosen for some rows at a time: those of the whole matrix, and no more in memory than these rows."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from framefusion.export.checkpoints.tensors.tensor_file import TensorFile
from framefusion.export.checkpoints.tensors.weights import LatestBlocks, Source, packed_as
from framefusion.export.quantization import recipes
from framefusion.export.quantization.blocks import BlockFormat, joined
from framefusion.export.quantization.float8 import Float8Format, WeightFormat, search_float8
from framefusion.export.quantization.recipes import Made
from framefusion.export.quantization.search import search

ROWS = 4  # read at a time here
INPUTS = 100  # the last block of a row is not full
FORMATS = [BlockFormat(4, 32), BlockFormat(4, 16, symmetric=False), BlockFormat(8, 64)]


class Stored:
    """A file of tensors that counts the rows of each read."""

    def __init__(self, path: Path) -> None:
        self._file = TensorFile(path)
        self.rows: list[int] = []

    def tensor(self, key: str, rows: slice | None = None) -> Tensor:
        tensor = self._file.read(key, rows)
        self.rows.append(len(tensor))
        return tensor

    def shape(self, key: str) -> tuple[int, ...]:
        return self._file.entries[key].shape


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stored:
    weight = torch.randn(18, INPUTS, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    weight[3] = 0  # blocks without a scale
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    monkeypatch.setattr(recipes, "WEIGHTS_AT_ONCE", ROWS * INPUTS + 1)
    return Stored(tmp_path / "model.safetensors")


def recipe_of(form: WeightFormat, rows: tuple[int, int] | None, *, by_rows: bool) -> Made:
    source = Source("weight", rows, transpose=True)
    quantizer = search_float8 if isinstance(form, Float8Format) else search
    return Made(source, form, torch.float16, partial(quantizer, dtype=torch.float16), by_rows)


@pytest.mark.parametrize("rows", [None, (5, 18)])
@pytest.mark.parametrize("form", [*FORMATS, BlockFormat(8, 32, signed=True), Float8Format()])
def test_some_rows_at_a_time_are_packed_as_all_of_them(
    stored: Stored, form: WeightFormat, rows: tuple[int, int] | None
) -> None:
    whole = packed_as(recipe_of(form, rows, by_rows=False).blocks(stored), form)
    assert stored.rows.pop() == 18 if rows is None else 13
    stored.rows.clear()
    packed = LatestBlocks().packed(recipe_of(form, rows, by_rows=True), stored)
    assert max(stored.rows) == ROWS
    for ours, theirs in zip(packed, whole, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))


def test_a_quantizer_that_needs_all_rows_gets_them(stored: Stored) -> None:
    list(recipe_of(FORMATS[0], None, by_rows=False).parts(stored))
    assert stored.rows == [18]


def test_parts_that_are_not_the_matrix_are_refused(stored: Stored) -> None:
    parts = (packed_as(part, FORMATS[0]) for part in recipe_of(FORMATS[0], (0, 8), by_rows=True).parts(stored))
    with pytest.raises(ValueError, match="8 rows of 18"):
        joined(parts, 18)
