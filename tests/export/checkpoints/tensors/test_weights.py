"""The way of a parameter from a checkpoint's tensors into a graph's file: layout, proof by header, blocks, pages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors import weights
from framefusion.export.checkpoints.tensors.hashed_file import HashedFile
from framefusion.export.checkpoints.tensors.weights import (
    ALIGNMENT,
    AnySource,
    Computed,
    Headers,
    Placement,
    Source,
    aligned_bytes,
    check_parameter,
    load_parameters,
    read_parameter,
    write_parameters,
    write_rows,
)

STORED = {
    "stacked": torch.arange(12 * 40, dtype=torch.float32).reshape(12, 40) / 7,
    "patches": torch.arange(6 * 2 * 3, dtype=torch.float32).reshape(6, 2, 3),
    "scale": torch.full((40,), 1.5, dtype=torch.bfloat16),
    "counts": torch.ones(40, dtype=torch.int8),
    "wide": torch.ones(40, dtype=torch.float64),
}
SOURCES: dict[str, AnySource] = {
    "first": Source("stacked", rows=(2, 6), transpose=True),
    "second": Source("stacked"),
    "bias": Source("scale"),
    "folded": Computed(("stacked", "scale"), lambda matrix, scale: (matrix * scale).T),
}


@pytest.fixture
def stored(tmp_path: Path) -> Checkpoint:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    save_file(STORED, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


class Module(nn.Module):
    """On the meta device, in the order in which parameters are written."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("first", (40, 4)), ("second", (12, 40)), ("bias", (40,)), ("folded", (40, 12))):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))


def expected(dtype: torch.dtype) -> dict[str, Tensor]:
    matrix = STORED["stacked"]
    values = {"first": matrix[2:6].T, "second": matrix, "bias": STORED["scale"], "folded": (matrix * 1.5).T}
    return {name: value.to(dtype).contiguous() for name, value in values.items()}


def write(stored: Checkpoint, path: Path, dtype: torch.dtype) -> tuple[Mapping[str, Placement], list[int]]:
    reported: list[int] = []
    with HashedFile(path) as file:
        return write_parameters(Module(), stored, SOURCES, dtype, file, reported.append), reported


@pytest.mark.parametrize(
    ("source", "value"),
    [
        (Source("stacked"), STORED["stacked"]),
        (Source("stacked", rows=(3, 5)), STORED["stacked"][3:5]),
        (Source("stacked", rows=(3, 5), transpose=True), STORED["stacked"][3:5].T),
        (Source("patches", flatten=True), STORED["patches"].reshape(6, 6)),
        (Source("patches", flatten=True, transpose=True), STORED["patches"].reshape(6, 6).T),
        (Computed(("scale", "stacked"), lambda scale, matrix: matrix - scale), STORED["stacked"] - 1.5),
    ],
)
def test_a_source_has_its_layout_and_its_shape_by_the_header_alone(
    stored: Checkpoint, source: AnySource, value: Tensor
) -> None:
    assert torch.equal(source.make(stored), value)
    header = source.make(Headers(stored))
    assert header.device.type == "meta"
    assert header.shape == value.shape
    check_parameter(stored, source, tuple(value.shape))


def test_a_parameter_is_read_in_the_graphs_type_and_in_order(stored: Checkpoint) -> None:
    read = read_parameter(stored, SOURCES["first"], (40, 4), torch.float16)
    assert (read.dtype, read.is_contiguous()) == (torch.float16, True)
    assert torch.equal(read, expected(torch.float16)["first"])


@pytest.mark.parametrize(
    ("source", "shape", "message"),
    [
        (Source("stacked"), (40, 12), r"stacked \(12, 40\) becomes \(12, 40\), the graph needs \(40, 12\)"),
        (Source("stacked", rows=(10, 14)), (4, 40), r"becomes \(2, 40\), the graph needs \(4, 40\)"),
        (Source("scale", flatten=True), (40,), r"scale \(40,\) cannot become \(40,\)"),
        (Computed(("stacked", "patches"), torch.add), (12, 40), r"patches \(6, 2, 3\) cannot become \(12, 40\)"),
        (Source("counts"), (40,), "counts is stored as I8, known are F32, F16, BF16: give the checkpoint before"),
        (Source("wide"), (40,), "wide is stored as F64.*save it again as float32 or bfloat16"),
        (Source("scales"), (40,), "scales.*scale"),
    ],
)
def test_what_cannot_be_the_parameter_is_refused_by_the_header(
    stored: Checkpoint, monkeypatch: pytest.MonkeyPatch, source: AnySource, shape: tuple[int, ...], message: str
) -> None:
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match=message):
        check_parameter(stored, source, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_lies_where_it_is_said_on_pages_of_its_own(
    stored: Checkpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    placements, reported = write(stored, tmp_path / "weights.bin", dtype)
    content = (tmp_path / "weights.bin").read_bytes()
    assert sum(reported) == len(content)
    assert list(placements) == [name for name, _ in Module().named_parameters()]
    for name, value in expected(dtype).items():
        place = placements[name]
        assert place.offset % ALIGNMENT == 0
        assert place.shape == value.shape
        written = bytearray(content[place.offset : place.offset + place.length])
        assert torch.equal(torch.frombuffer(written, dtype=dtype).reshape(place.shape), value), name
    for before, after in pairwise(placements.values()):
        assert after.offset == before.offset + aligned_bytes(before.length)
        assert not any(content[before.offset + before.length : after.offset])


def test_a_file_is_the_same_however_little_is_converted_at_a_time(
    stored: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, reported = write(stored, tmp_path / "whole.bin", torch.float16)
    monkeypatch.setattr(weights, "_BLOCK", 100)  # a row or two
    _, in_blocks = write(stored, tmp_path / "blocks.bin", torch.float16)
    assert len(in_blocks) > 2 * len(reported)
    assert (tmp_path / "blocks.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_a_module_in_memory_has_the_values_that_a_file_has(stored: Checkpoint) -> None:
    loaded = load_parameters(Module(), stored, SOURCES, torch.bfloat16)
    for name, value in expected(torch.bfloat16).items():
        assert torch.equal(loaded.get_parameter(name), value), name


@pytest.mark.parametrize("rows_at_once", [1, 5, 12, 100])
def test_a_table_is_written_as_it_is_stored_and_single_rows_behind_it_in_its_type(
    stored: Checkpoint, tmp_path: Path, rows_at_once: int
) -> None:
    reported: list[int] = []
    with HashedFile(tmp_path / "table.bin") as file:
        write_rows(stored, ("stacked", "scale"), file, reported.append, rows_at_once)
    content = bytearray((tmp_path / "table.bin").read_bytes())
    rows = torch.cat([STORED["stacked"], STORED["scale"].float()[None]])
    assert torch.equal(torch.frombuffer(content, dtype=torch.float32).reshape(13, 40), rows)
    assert len(reported) == -(-12 // rows_at_once) + 1
    assert sum(reported) == len(content)
