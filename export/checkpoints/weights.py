"""Where a graph's parameters come from in a checkpoint, and the way of their bytes into one external-data file.

One tensor is in memory at a time, as it is stored; it is converted and turned in blocks. Knows no family: a family
hands over the `Source` of each parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from framefusion.errors import CheckpointError

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.writing.hashed_file import HashedFile

ALIGNMENT = 4096  # a page, so that a runtime can map each tensor
_BLOCK = 1 << 25  # bytes converted at a time
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

    @property
    def keys(self) -> tuple[str, ...]:
        """Tensors that are read."""
        return (self.key,)

    def make(self, checkpoint: Reader) -> Tensor:
        """The parameter in the graph's layout."""
        tensor = checkpoint.tensor(self.key, None if self.rows is None else slice(*self.rows))
        if self.flatten:
            tensor = tensor.flatten(1)
        return tensor.T if self.transpose else tensor


@dataclass(frozen=True)
class Computed:
    """A parameter worked out from tensors of the checkpoint: unpacked, or several layers folded into one."""

    keys: tuple[str, ...]
    function: Callable[..., Tensor]  # of the tensors; it runs on meta tensors too, which is how shapes are checked

    def make(self, checkpoint: Reader) -> Tensor:
        """The parameter in the graph's layout."""
        return self.function(*(checkpoint.tensor(key) for key in self.keys))


AnySource = Source | Computed


class Reader(Protocol):
    """What a source reads from: a checkpoint, or its headers alone."""

    def tensor(self, key: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows."""


class Headers:
    """A checkpoint's tensors without their values: on the meta device, read from the headers alone."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def tensor(self, key: str, rows: slice | None = None) -> Tensor:
        """See `Reader`."""
        empty = torch.empty(self._checkpoint.shape(key), device="meta")
        return empty if rows is None else empty[rows]


@dataclass(frozen=True)
class Placement:
    """Where a tensor lies in its external-data file."""

    offset: int
    length: int
    shape: tuple[int, ...]


def read_parameter(checkpoint: Checkpoint, source: AnySource, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor of a parameter, in the graph's layout and type.

    Raises:
        CheckpointError: see `check_parameter`.
    """
    check_parameter(checkpoint, source, shape)
    return source.make(checkpoint).to(dtype).contiguous()


def check_parameter(checkpoint: Checkpoint, source: AnySource, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that cannot be this parameter, from the header alone.

    Raises:
        CheckpointError: it is missing, its shape is not the one that the configuration says, or its type is not known.
    """
    stored = ", ".join(f"{key} {checkpoint.shape(key)}" for key in source.keys)
    try:
        found = tuple(source.make(Headers(checkpoint)).shape)
    except (RuntimeError, IndexError) as error:  # torch's words for a shape that a function cannot take
        raise CheckpointError(f"{stored} cannot become {shape} ({error}): is config.json of another model?") from None
    if found != shape:
        raise CheckpointError(
            f"{stored} becomes {found}, the graph needs {shape}, [in, out]: is config.json of another model?"
        )
    for key in source.keys:
        if checkpoint.dtype(key) not in STORED:
            wide = checkpoint.dtype(key) == "F64"
            remedy = "save it again as float32 or bfloat16" if wide else "give the checkpoint before it was quantized"
            raise CheckpointError(
                f"{checkpoint.folder}: {key} is stored as {checkpoint.dtype(key)}, known are {', '.join(STORED)}: "
                f"{remedy}"
            )


def check_parameters(module: nn.Module, checkpoint: Checkpoint, sources: Mapping[str, AnySource]) -> None:
    """`check_parameter` for all parameters of a (meta) module."""
    for name, parameter in module.named_parameters():
        check_parameter(checkpoint, sources[name], tuple(parameter.shape))


def load_parameters(
    module: nn.Module, checkpoint: Checkpoint, sources: Mapping[str, AnySource], dtype: torch.dtype
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
    sources: Mapping[str, AnySource],
    dtype: torch.dtype,
    file: HashedFile,
    on_bytes: OnBytes = ignore,
) -> dict[str, Placement]:
    """Write every parameter of a (meta) module to one file, aligned, and return where each lies."""
    placements: dict[str, Placement] = {}
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        check_parameter(checkpoint, sources[name], shape)
        tensor = sources[name].make(checkpoint)
        check_range(tensor, dtype, sources[name])
        end = file.position
        offset = file.align(ALIGNMENT)
        on_bytes(offset - end)
        for block in blocks_of(tensor, dtype):
            on_bytes(file.write(_bytes(block)))
        placements[name] = Placement(offset, file.position - offset, shape)
    return placements


def blocks_of(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of a tensor in another type, some at a time: beside the tensor itself no more than that is in memory."""
    rows = tensor if tensor.ndim > 1 else tensor[None]
    at_once = max(1, _BLOCK // max(rows[0].numel() * dtype.itemsize, 1))
    turned = _is_turned(rows)
    for start in range(0, rows.shape[0], at_once):
        if turned:  # converting in the order they lie in and turning the result is several times faster
            yield rows.T[:, start : start + at_once].to(dtype).contiguous().T.contiguous()
        else:
            yield rows[start : start + at_once].to(dtype).contiguous()


def _is_turned(tensor: Tensor) -> bool:
    """Whether it is a transposed view of a tensor that lies in order."""
    return tensor.ndim == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()


def check_range(tensor: Tensor, dtype: torch.dtype, source: AnySource) -> None:
    """Refuse a tensor with numbers that the type cannot hold.

    Raises:
        CheckpointError: one would become infinite.
    """
    limit = torch.finfo(dtype).max
    if tensor.numel() == 0 or torch.finfo(tensor.dtype).max <= limit:
        return
    dense = tensor.T if _is_turned(tensor) else tensor  # of another order torch would make a copy first
    largest = max(abs(float(bound)) for bound in dense.aminmax())
    if limit < largest < float("inf"):
        name = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{' and '.join(source.keys)} holds numbers up to {largest:.6g}, {name} ends at {limit:.6g}: "
            "build with a wider --dtype"
        )


def parameter_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Size of the file `write_parameters` would write, its alignment included."""
    sizes = (parameter.numel() * dtype.itemsize for parameter in module.parameters())
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def write_rows(
    checkpoint: Checkpoint, keys: Sequence[str], file: HashedFile, on_bytes: OnBytes = ignore, rows_at_once: int = 8192
) -> None:
    """Write a matrix as it is stored, some rows at a time, and single rows of the same type behind it."""
    table, *extra = keys
    count = checkpoint.shape(table)[0]
    for start in range(0, count, rows_at_once):
        rows = checkpoint.tensor(table, slice(start, min(start + rows_at_once, count)))
        on_bytes(file.write(_bytes(rows.contiguous())))
    for key in extra:
        on_bytes(file.write(_bytes(checkpoint.tensor(key).to(rows.dtype).contiguous())))
