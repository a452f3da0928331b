"""Where a graph's parameters come from in a checkpoint, and the way of their bytes into one external-data file.

One tensor is in memory at a time, as it is stored; it is converted and transposed in blocks. Knows no family: a family
hands over the `Source` of each parameter. The main path is `write_parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor, nn

from framefusion.errors import CheckpointError
from framefusion.export.quantization.blocks import BlockFormat, Packed, Part, joined
from framefusion.export.quantization.float8 import Float8Quantized, Quantized, WeightFormat

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.checkpoints.tensors.hashed_file import HashedFile

ALIGNMENT = 4096  # a page, so that a runtime can map each tensor
_BLOCK = 1 << 25  # bytes converted at a time
STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # by the names of safetensors

Module = TypeVar("Module", bound=nn.Module)

OnBytes = Callable[[int], object]
"""Called after each write with the bytes that it wrote."""


def ignore(_: int) -> None:
    """Report to nobody."""


@dataclass(frozen=True)
class Source:
    """A parameter that is a tensor of the checkpoint, or some of its rows."""

    key: str
    rows: tuple[int, int] | None = None  # part of a stacked tensor
    transpose: bool = False  # checkpoints hold [out, in], graphs [in, out]
    flatten: bool = False  # a convolution used as a matrix: [out, ...] -> [out, n]

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tensors that are read."""
        return (self.key,)

    def make(self, checkpoint: Reader) -> Tensor:
        """The parameter in the graph's layout: [in, out] for a matrix, in the type that is stored."""
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
        """See `Source.make`."""
        return self.function(*(checkpoint.tensor(key) for key in self.keys))


class Recipe(Protocol):
    """The quantized weight of one linear map: made of a matrix of floats, or a checkpoint's own codes."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tensors that are read."""

    @property
    def form(self) -> WeightFormat:
        """How it is stored."""

    @property
    def types(self) -> Collection[str]:
        """Types, as safetensors names them, that these tensors may have."""

    def shape(self, headers: Reader) -> tuple[int, int]:
        """Outputs and inputs, from the headers alone."""

    def parts(self, checkpoint: Reader) -> Iterator[Quantized]:
        """The matrix in parts of some rows, in their order: [n, in], of `form` but for `signed` of whole numbers.

        Only packing knows of the latter. No part is kept: whoever takes the next one lets go of the last.
        """


class LatestBlocks:
    """The last matrix that was quantized: its parameters are read one after the other, and it is made once."""

    def __init__(self) -> None:
        self._latest: tuple[Recipe, Reader, Packed] | None = None

    def packed(self, recipe: Recipe, checkpoint: Reader) -> Packed:
        """The parameters of a linear map."""
        latest = self._latest
        if latest is None or latest[0] is not recipe or latest[1] is not checkpoint:
            self._latest = None  # gone before the next is made: one matrix is in memory
            outputs, _inputs = recipe.shape(Headers(checkpoint))
            parts = (packed_as(part, recipe.form) for part in recipe.parts(checkpoint))
            latest = (recipe, checkpoint, joined(parts, outputs))
            self._latest = latest
        return latest[2]


def packed_as(matrix: Quantized, form: WeightFormat) -> Packed:
    """A matrix as a graph holds it."""
    if isinstance(matrix, Float8Quantized):
        return matrix.packed()
    assert isinstance(form, BlockFormat)
    return matrix.pack(signed=form.signed)


@dataclass(frozen=True, eq=False)
class QuantizedPart:
    """One parameter of a quantized linear map: its packed codes, its scales, or its zero points."""

    recipe: Recipe
    part: Part
    latest: LatestBlocks  # that of all parameters of a plan

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tensors that are read."""
        return self.recipe.keys

    def make(self, checkpoint: Reader) -> Tensor:
        """See `Source.make`: uint8, but for scales."""
        if isinstance(checkpoint, Headers):
            shape = self.recipe.form.shapes(*self.recipe.shape(checkpoint))[self.part]
            return torch.empty(shape, device="meta")
        tensor = getattr(self.latest.packed(self.recipe, checkpoint), self.part)
        assert isinstance(tensor, Tensor), self.part
        return tensor


AnySource = Source | Computed | QuantizedPart


class Reader(Protocol):
    """What a source reads from: a checkpoint, or its headers alone."""

    def tensor(self, key: str, rows: slice | None = None) -> Tensor:
        """A tensor of that name, or some of its first axis."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the tensor of that name, from the header alone."""


class Headers:
    """A checkpoint's tensors without their values: on the meta device, read from the headers alone."""

    def __init__(self, checkpoint: Reader) -> None:
        self._checkpoint = checkpoint

    def tensor(self, key: str, rows: slice | None = None) -> Tensor:
        """See `Reader`."""
        empty = torch.empty(self.shape(key), device="meta")
        return empty if rows is None else empty[rows]

    def shape(self, key: str) -> tuple[int, ...]:
        """See `Reader`."""
        return self._checkpoint.shape(key)


@dataclass(frozen=True)
class Placement:
    """Where a tensor lies in its external-data file."""

    offset: int  # bytes from the begin of the file
    length: int  # bytes
    shape: tuple[int, ...]


def read_parameter(checkpoint: Checkpoint, source: AnySource, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor of a parameter, in the graph's layout and type.

    Raises:
        CheckpointError: see `check_parameter`.
    """
    check_parameter(checkpoint, source, shape)
    tensor = source.make(checkpoint)
    return tensor.to(stored_type(tensor, dtype)).contiguous()


def stored_type(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type of a tensor in a graph whose floats are of a type: whole numbers, as codes are, keep theirs."""
    return dtype if tensor.is_floating_point() else tensor.dtype


def check_parameter(checkpoint: Checkpoint, source: AnySource, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that cannot be this parameter, from the header alone.

    Raises:
        CheckpointError: it is missing, its shape is not the one that the configuration says, or its type is not known.
    """
    stored = ", ".join(f"{key} {checkpoint.shape(key)}" for key in source.keys)
    try:
        becomes = tuple(source.make(Headers(checkpoint)).shape)
    except (RuntimeError, IndexError) as error:  # what torch raises for a shape that a function cannot take
        raise CheckpointError(f"{stored} cannot become {shape} ({error}): is config.json of another model?") from None
    if becomes != shape:
        raise CheckpointError(
            f"{stored} becomes {becomes}, the graph needs {shape}, [in, out]: is config.json of another model?"
        )
    known: Collection[str] = source.recipe.types if isinstance(source, QuantizedPart) else STORED
    for key in source.keys:
        if checkpoint.dtype(key) not in known:
            wide = checkpoint.dtype(key) == "F64"
            remedy = "save it again as float32 or bfloat16" if wide else "give the checkpoint before it was quantized"
            raise CheckpointError(
                f"{checkpoint.folder}: {key} is stored as {checkpoint.dtype(key)}, known are {', '.join(known)}: "
                f"{remedy}"
            )


def load_parameters(
    module: Module, checkpoint: Checkpoint, sources: Mapping[str, AnySource], dtype: torch.dtype
) -> Module:
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
    """Write every parameter of a module to one file, in the module's order.

    Args:
        module: on the meta device; it says names and shapes.
        checkpoint: where the values are.
        sources: name of a parameter -> where it comes from.
        dtype: to write floats in; codes of quantized weights are written as they are.
        file: the external-data file; it grows by `GraphPlan.weight_bytes`, less the padding of the last.
        on_bytes: see `OnBytes`; padding counts.

    Returns:
        Name of a parameter -> where it lies.

    Raises:
        CheckpointError: see `check_parameter` and `check_range`.
    """
    placements: dict[str, Placement] = {}
    for name, parameter in module.named_parameters():
        source = sources[name]
        # 1. The header alone proves name, shape and type: a checkpoint that does not fit costs no read.
        shape = tuple(parameter.shape)
        check_parameter(checkpoint, source, shape)
        # 2. One tensor, as it is stored: the only one in memory until the next round.
        tensor = source.make(checkpoint)
        # 3. A narrower type would make large values infinite: the build ends rather than the model's answers.
        written = stored_type(tensor, dtype)
        check_range(tensor, written, source)
        # 4. Begin on a page, so that a runtime can map the tensor and leave it on disk.
        end = file.position
        offset = file.align(ALIGNMENT)
        on_bytes(offset - end)
        # 5. Convert and write some rows at a time: beside the stored tensor no second whole one exists.
        for block in blocks_of(tensor, written):
            on_bytes(file.write(_bytes(block)))
        placements[name] = Placement(offset, file.position - offset, shape)
    return placements


def blocks_of(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of a tensor in another type, some at a time: beside the tensor itself no more than that is in memory.

    Yields:
        [n, ...] for a tensor of [m, ...], contiguous, of at most _BLOCK bytes or of one row; [1, m] for a vector of m.
    """
    rows = tensor if tensor.ndim > 1 else tensor[None]
    row_bytes = math.prod(rows.shape[1:]) * dtype.itemsize
    at_once = max(1, _BLOCK // max(row_bytes, 1))
    transposed = _is_transposed(rows)
    for start in range(0, rows.shape[0], at_once):
        if transposed:  # converting in the order they lie in and transposing the result is several times faster
            yield rows.T[:, start : start + at_once].to(dtype).contiguous().T.contiguous()
        else:
            yield rows[start : start + at_once].to(dtype).contiguous()


def _is_transposed(tensor: Tensor) -> bool:
    """Whether it is a transposed view of a tensor that lies in order."""
    return tensor.ndim == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()


def check_range(tensor: Tensor, dtype: torch.dtype, source: AnySource) -> None:
    """Refuse a tensor with numbers that the type cannot hold.

    Raises:
        CheckpointError: one would become infinite.
    """
    if tensor.numel() == 0 or not tensor.is_floating_point() or not dtype.is_floating_point:
        return
    limit = torch.finfo(dtype).max
    if torch.finfo(tensor.dtype).max <= limit:
        return
    dense = tensor.T if _is_transposed(tensor) else tensor  # of another order torch would make a copy first
    largest = max(abs(float(bound)) for bound in dense.aminmax())
    if limit < largest < float("inf"):
        name = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{' and '.join(source.keys)} holds numbers up to {largest:.6g}, {name} ends at {limit:.6g}: "
            "build with a wider --dtype"
        )


def aligned_bytes(size: int) -> int:
    """Bytes that a tensor of `size` bytes takes in a file of `write_parameters`: whole pages."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def write_rows(
    checkpoint: Checkpoint, keys: Sequence[str], file: HashedFile, on_bytes: OnBytes = ignore, rows_at_once: int = 8192
) -> None:
    """Write a matrix as it is stored, some rows at a time, and single rows behind it.

    Args:
        checkpoint: where the tensors are.
        keys: of the matrix, [n, width], then of rows, [width]; these are written in the matrix's type.
        file: it grows by the bytes of all.
        on_bytes: see `OnBytes`.
        rows_at_once: of the matrix in memory.

    Raises:
        CheckpointError: a tensor is missing or cannot be read.
    """
    table, *extra = keys
    count = checkpoint.shape(table)[0]
    for start in range(0, count, rows_at_once):
        rows = checkpoint.tensor(table, slice(start, min(start + rows_at_once, count)))
        on_bytes(file.write(_bytes(rows.contiguous())))
    for key in extra:
        on_bytes(file.write(_bytes(checkpoint.tensor(key).to(rows.dtype).contiguous())))
