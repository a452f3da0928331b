"""Which checkpoint transformers' classes run where the given one is quantized, and who dequantized it.

    1. transformers' own quantizer, where it dequantizes on a CPU and memory holds the whole model: then it reads codes
       and scales for itself, and a reading of ours that differs shows
    2. else its classes over the matrices that this package reads, which are written to the disk as a checkpoint of
       floats; that they are the format's is for the tests of the formats

Knows no family.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from framefusion.errors import FrameFusionError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.quantized.dequantized import (
    dequantized_bytes,
    dequantized_type,
    write_dequantized,
)
from framefusion.export.checkpoints.quantized.linear import FloatLinear
from framefusion.export.machine import available_memory, free_disk
from framefusion.storage import files

FLOAT = 4  # bytes
SPARE = 1 << 28  # bytes of the disk that stay free


class NoReferenceError(FrameFusionError):
    """Nothing of transformers can run this checkpoint here; the message says why."""


@dataclass(frozen=True)
class ReadableCheckpoint:
    """What transformers' classes are given.

    Attributes:
        checkpoint: quantized only if `by_itself`.
        by_itself: transformers' own quantizer dequantizes it.
        types: of the tensors, as safetensors names them; none: those of the checkpoint.
        how: who dequantized it, for people; "" where nothing is quantized.
    """

    checkpoint: Checkpoint
    by_itself: bool = False
    types: frozenset[str] = frozenset()
    how: str = ""


@contextmanager
def readable(
    checkpoint: Checkpoint, place: Path | None, doing: Callable[[str], object], *, whole: bool
) -> Iterator[ReadableCheckpoint]:
    """The checkpoint for transformers' classes; what was written for them is gone when the body ends.

    Args:
        checkpoint: of a build.
        place: folder on whose disk a dequantized one may lie; None takes the system's for temporary files.
        doing: called with what runs now.
        whole: a class of transformers reads the whole format, so that its quantizer applies.

    Raises:
        NoReferenceError: the disk has no room for it.
    """
    quantization = checkpoint.quantization
    if quantization is None:
        yield ReadableCheckpoint(checkpoint)
        return
    if whole and _dequantizes(checkpoint):
        yield ReadableCheckpoint(
            checkpoint, True, how=f"dequantized by transformers' own quantizer ({quantization.title})"
        )
        return
    size = scratch_bytes(checkpoint, whole=whole)
    place = Path(tempfile.gettempdir()) if place is None else place
    free = free_disk(place)
    if size + SPARE > free:
        raise NoReferenceError(
            f"its weights are quantized, and dequantized they take {size / 1e9:.1f} GB of the disk at {place}, where "
            f"{free / 1e9:.1f} GB are free"
        )
    doing("dequantizing the checkpoint for transformers")
    folder = Path(tempfile.mkdtemp(prefix=".check-", dir=place))
    try:
        write_dequantized(checkpoint, folder)
        types = frozenset({dequantized_type(checkpoint)})
        yield ReadableCheckpoint(
            Checkpoint(folder), False, types, f"dequantized by this package ({quantization.title})"
        )
    finally:
        files.remove_scratch(folder)


def scratch_bytes(checkpoint: Checkpoint, *, whole: bool) -> int:
    """Bytes of the disk that `readable` takes meanwhile; 0 where it writes nothing. Arguments are its."""
    if checkpoint.quantization is None or (whole and _dequantizes(checkpoint)):
        return 0
    return dequantized_bytes(checkpoint)


def _dequantizes(checkpoint: Checkpoint) -> bool:
    """Whether transformers dequantizes such a checkpoint when it loads it on a CPU, and memory holds the result."""
    quantization = checkpoint.quantization
    assert quantization is not None
    numbers = sum(math.prod(checkpoint.shape(key)) for key in checkpoint.files)
    if 2 * FLOAT * numbers > available_memory() or importlib.util.find_spec("accelerate") is None:
        return False
    method = quantization.setting.method
    if method == "compressed-tensors":  # of several groups it takes the first one's scheme for all
        groups = quantization.setting.values["config_groups"]
        return len(groups) == 1 and importlib.util.find_spec("compressed_tensors") is not None
    linears = quantization.linears.values()
    return method == "fp8" and all(  # it reads no blocks that are not full, and scales of one name
        isinstance(linear, FloatLinear)
        and linear.scale.endswith("_inv")
        and not any(size % side for size, side in zip(linear.shape, linear.block, strict=True))
        for linear in linears
    )
