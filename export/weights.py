"""Where a graph's parameters come from in a checkpoint, and the way of their bytes into one external-data file.

One tensor is in memory at a time. Knows no family: a family hands over the `Source` of each parameter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from framefusion.errors import CheckpointError

if TYPE_CHECKING:
    from framefusion.export.checkpoint import Checkpoint

ALIGNMENT = 4096  # a page, so that a runtime can map each tensor


@dataclass(frozen=True)
class Source:
    """A parameter's place in the checkpoint."""

    key: str
    rows: tuple[int, int] | None = None  # part of a stacked tensor
    transpose: bool = False  # checkpoints hold [out, in], graphs [in, out]
    flatten: bool = False  # a convolution used as a matrix: [out, ...] -> [out, n]

    def as_matrix(self) -> Source:
        """The same source, turned to [in, out]."""
        return replace(self, transpose=True)


@dataclass(frozen=True)
class Placement:
    """Where a tensor lies in its external-data file."""

    offset: int
    length: int
    shape: tuple[int, ...]


def read_parameter(checkpoint: Checkpoint, source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor of a parameter, in the graph's layout and type.

    Raises:
        CheckpointError: its shape is not the one that the configuration says.
    """
    tensor = checkpoint.tensor(source.key, None if source.rows is None else slice(*source.rows))
    if source.flatten:
        tensor = tensor.flatten(1)
    if source.transpose:
        tensor = tensor.T
    if tuple(tensor.shape) != shape:
        found = tuple(checkpoint.shape(source.key))
        raise CheckpointError(
            f"{source.key} has shape {found}, the graph needs {shape}, [in, out]: is config.json of another model?"
        )
    return tensor.to(dtype).contiguous()


def load_parameters(
    module: nn.Module, checkpoint: Checkpoint, sources: Mapping[str, Source], dtype: torch.dtype
) -> nn.Module:
    """Give a module that was made on the meta device its values, for running it in eager torch."""
    module.to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        tensor = read_parameter(checkpoint, sources[name], tuple(parameter.shape), dtype)
        parameter.data = tensor
    return module


def write_parameters(
    module: nn.Module, checkpoint: Checkpoint, sources: Mapping[str, Source], dtype: torch.dtype, path: Path
) -> dict[str, Placement]:
    """Write every parameter of a (meta) module to one aligned file and return where each lies."""
    placements: dict[str, Placement] = {}
    with path.open("wb") as file:
        for name, parameter in module.named_parameters():
            tensor = read_parameter(checkpoint, sources[name], tuple(parameter.shape), dtype)
            file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
            offset = file.tell()
            file.write(_bytes(tensor))
            placements[name] = Placement(offset, tensor.numel() * tensor.element_size(), tuple(tensor.shape))
    return placements


def parameter_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Size of the file `write_parameters` would write, its alignment included."""
    sizes = (parameter.numel() * dtype.itemsize for parameter in module.parameters())
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def write_rows(checkpoint: Checkpoint, key: str, path: Path, rows_at_once: int = 8192) -> None:
    """Write a matrix as it is stored, some rows at a time."""
    count = checkpoint.shape(key)[0]
    with path.open("wb") as file:
        for start in range(0, count, rows_at_once):
            rows = checkpoint.tensor(key, slice(start, min(start + rows_at_once, count)))
            file.write(_bytes(rows.contiguous()))
