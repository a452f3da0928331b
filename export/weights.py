"""Where a graph's parameters come from in a checkpoint, and the way of their bytes into one external-data file.

One tensor is in memory at a time. Knows no family: a family hands over the `Source` of each parameter.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from framefusion.errors import CheckpointError

if TYPE_CHECKING:
    from framefusion.export.checkpoint import Checkpoint

ALIGNMENT = 4096  # a page, so that a runtime can map each tensor
STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # by the names of safetensors

OnBytes = Callable[[int], object]
"""Told the bytes of each write."""


def ignore(_: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Source:
    """A parameter's place in the checkpoint."""

    key: str
    rows: tuple[int, int] | None = None  # part of a stacked tensor
    transpose: bool = False  # checkpoints hold [out, in], graphs [in, out]
    flatten: bool = False  # a convolution used as a matrix: [out, ...] -> [out, n]


@dataclass(frozen=True)
class Placement:
    """Where a tensor lies in its external-data file."""

    offset: int
    length: int
    shape: tuple[int, ...]


def read_parameter(checkpoint: Checkpoint, source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor of a parameter, in the graph's layout and type.

    Raises:
        CheckpointError: see `check_parameter`.
    """
    check_parameter(checkpoint, source, shape)
    tensor = checkpoint.tensor(source.key, None if source.rows is None else slice(*source.rows))
    if source.flatten:
        tensor = tensor.flatten(1)
    if source.transpose:
        tensor = tensor.T
    return tensor.to(dtype).contiguous()


def check_parameter(checkpoint: Checkpoint, source: Source, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that cannot be this parameter, from the header alone.

    Raises:
        CheckpointError: it is missing, its shape is not the one that the configuration says, or its type is not known.
    """
    stored = found = checkpoint.shape(source.key)
    if source.rows is not None:
        found = (max(min(source.rows[1], stored[0]) - source.rows[0], 0), *found[1:])
    if source.flatten:
        found = (found[0], math.prod(found[1:]))
    if source.transpose:
        found = found[::-1]
    if found != shape:
        raise CheckpointError(
            f"{source.key} has shape {stored}, the graph needs {shape}, [in, out]: is config.json of another model?"
        )
    if checkpoint.dtype(source.key) not in STORED:
        raise CheckpointError(
            f"{source.key} is stored as {checkpoint.dtype(source.key)}, known are {', '.join(STORED)}: "
            "give the checkpoint before it was quantized"
        )


def check_parameters(module: nn.Module, checkpoint: Checkpoint, sources: Mapping[str, Source]) -> None:
    """`check_parameter` for all parameters of a (meta) module."""
    for name, parameter in module.named_parameters():
        check_parameter(checkpoint, sources[name], tuple(parameter.shape))


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
    module: nn.Module,
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    dtype: torch.dtype,
    path: Path,
    on_bytes: OnBytes = ignore,
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
            on_bytes(placements[name].length)
    return placements


def parameter_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Size of the file `write_parameters` would write, its alignment included."""
    sizes = (parameter.numel() * dtype.itemsize for parameter in module.parameters())
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def write_rows(
    checkpoint: Checkpoint, key: str, path: Path, on_bytes: OnBytes = ignore, rows_at_once: int = 8192
) -> None:
    """Write a matrix as it is stored, some rows at a time."""
    count = checkpoint.shape(key)[0]
    with path.open("wb") as file:
        for start in range(0, count, rows_at_once):
            rows = checkpoint.tensor(key, slice(start, min(start + rows_at_once, count)))
            on_bytes(file.write(_bytes(rows.contiguous())))
