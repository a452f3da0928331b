"""A quantized checkpoint written as one of floats, a tensor at a time: for programs that read no quantized one.

One safetensors file in each folder of weights, with each config.json less what it says of the quantization; tokenizer
and processors stay behind. All floats get one type, the widest that any has, so that whoever maps the files converts
nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from framefusion.export.checkpoints.quantized.setting import KEYS
from framefusion.export.checkpoints.tensors.tensor_file import DTYPES
from framefusion.export.checkpoints.tensors.weight_formats import SINGLE

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint

CONFIG = "config.json"
_ROWS_AT_ONCE = 1 << 24  # numbers


def dequantized_type(checkpoint: Checkpoint) -> str:
    """The type of all floats of a dequantized checkpoint, as safetensors names it."""
    types = {checkpoint.dtype(key) for key in checkpoint.files}
    floats = {name for name in types if name in DTYPES and DTYPES[name].is_floating_point}
    return floats.pop() if len(floats) == 1 else "F32"


def dequantized_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the files that `write_dequantized` writes, headers left out."""
    size = DTYPES[dequantized_type(checkpoint)].itemsize
    return sum(math.prod(checkpoint.shape(key)) * size for key in checkpoint.files)


def write_dequantized(checkpoint: Checkpoint, folder: Path, on_bytes: Callable[[int], object] = lambda _: None) -> None:
    """Write a checkpoint without its quantization into an empty folder.

    Args:
        checkpoint: quantized.
        folder: gets config.json and weights, those of parts in folders of the same names.
        on_bytes: called with the bytes of each write.

    Raises:
        CheckpointError: a tensor cannot be read.
        OSError: the folder cannot be written.
    """
    homes = {path: name for name, path in checkpoint.parts.items()}
    groups: dict[Path, list[str]] = {checkpoint.folder: []}
    for key, path in checkpoint.files.items():
        groups.setdefault(path.parent if path.parent in homes else checkpoint.folder, []).append(key)
    described = (path.parent for pattern in ("*", "*/*") for path in checkpoint.folder.glob(f"{pattern}/{CONFIG}"))
    for home in {checkpoint.folder, *homes, *described}:
        target = folder / home.relative_to(checkpoint.folder)
        target.mkdir(parents=True, exist_ok=True)
        config = _without_quantization(checkpoint.read_config(home))
        with (target / CONFIG).open("x", encoding="utf-8") as file:
            json.dump(config, file)
    for home, keys in groups.items():
        if keys:
            prefix = f"{homes[home]}." if home in homes else ""
            _write_file(checkpoint, sorted(keys), prefix, folder / home.relative_to(checkpoint.folder), on_bytes)


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration less what it says of the quantization, in its own keys and in those of its parts."""
    return {
        key: _without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in KEYS
    }


def _write_file(
    checkpoint: Checkpoint, keys: list[str], prefix: str, folder: Path, on_bytes: Callable[[int], object]
) -> None:
    floats = dequantized_type(checkpoint)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        stored = checkpoint.dtype(key)
        name = floats if stored in DTYPES and DTYPES[stored].is_floating_point else stored
        shape = checkpoint.shape(key)
        begin = end
        end += math.prod(shape) * DTYPES[name].itemsize
        header[key.removeprefix(prefix)] = {"dtype": name, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / SINGLE).open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            dtype = DTYPES[header[key.removeprefix(prefix)]["dtype"]]
            for part in _parts(checkpoint, key):
                content = part.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data
                on_bytes(file.write(content))


def _parts(checkpoint: Checkpoint, key: str) -> Iterator[Tensor]:
    """A tensor in some of its rows at a time; one that has no rows, or is quantized, as a whole."""
    shape = checkpoint.shape(key)
    if not shape or checkpoint.is_quantized(key):
        yield checkpoint.tensor(key)
        return
    step = max(1, _ROWS_AT_ONCE // max(math.prod(shape[1:]), 1))
    for start in range(0, shape[0], step):
        yield checkpoint.tensor(key, slice(start, start + step))
