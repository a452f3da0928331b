"""One safetensors file by plain reads: its header at once, tensors or some of their rows when they are needed.

A memory map would count every page it touched as memory of this process and keep it until somebody else needs room;
a read leaves the process with the tensor and nothing else. Knows no checkpoint and no model.

The format: 8 bytes with the header's length (little endian), the header as JSON (name -> dtype, shape, data_offsets),
then the tensors, which fill the rest of the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LARGEST_HEADER = 32_000_000  # bytes; the format allows 100 MB, 100,000 tensors take 12
_AT_ONCE = 1 << 26  # bytes of one read: the kernel takes no more than 2 GiB
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class TensorFileError(ValueError):
    """The file is truncated or no safetensors file; the message says why."""


class TensorEntry(NamedTuple):
    """A tensor as the header describes it."""

    dtype: str  # as safetensors writes it: F32, BF16
    shape: tuple[int, ...]
    begin: int  # byte of the file
    end: int  # byte behind it


class TensorFile:
    """A file whose header was read and checked against its size.

    Raises:
        FileNotFoundError, OSError: it cannot be opened.
        TensorFileError: it is not what it says.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise TensorFileError(f"a header of {length} bytes in a file of {size}")
            self.entries: Mapping[str, TensorEntry] = _entries(file.read(length), size)
        self.path = path

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows, as new memory.

        Raises:
            TensorFileError: the file became shorter, or its type is not known to torch.
        """
        entry = self.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise TensorFileError(f"{name} is stored as {entry.dtype}, which torch does not know")
        first, last, _ = (rows or slice(None)).indices(entry.shape[0]) if entry.shape else (0, 1, 1)
        count = max(last - first, 0)
        row = (entry.end - entry.begin) // max(entry.shape[0] if entry.shape else 1, 1)
        flat = torch.empty(count * row, dtype=torch.uint8)
        self._fill(flat, entry.begin + first * row, name)
        return flat.view(dtype).view(count, *entry.shape[1:]) if entry.shape else flat.view(dtype)[0]

    def raw(self, name: str) -> Tensor:
        """The bytes of a tensor as uint8, [n], whatever their type.

        Raises:
            TensorFileError: the file became shorter.
        """
        entry = self.entries[name]
        flat = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        self._fill(flat, entry.begin, name)
        return flat

    def _fill(self, flat: Tensor, begin: int, name: str) -> None:
        target = flat.numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(begin)
            done = 0
            while done < len(target):
                got = file.readinto(target[done : done + _AT_ONCE])
                if not got:
                    raise TensorFileError(f"{name} ends after {done} of {len(target)} bytes")
                done += got


def _entries(header: bytes, size: int) -> dict[str, TensorEntry]:
    """What the header of a file of `size` bytes promises, as far as it can be true."""
    data = 8 + len(header)
    try:
        fields_of = json.loads(header, object_pairs_hook=_unique)
        fields_of.pop("__metadata__", None)
        entries = {name: _entry(fields, data) for name, fields in fields_of.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TensorFileError(f"its header is not readable ({type(error).__name__}: {error})") from None
    for name, entry in entries.items():
        _check(name, entry, data, size)
    end = max((entry.end for entry in entries.values()), default=data)
    if end != size:
        raise TensorFileError(f"its tensors end at byte {end}, the file has {size}")
    return entries


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of the header; a name that stands there twice would hide a tensor."""
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name stands there twice")
    return unique


def _entry(fields: Mapping[str, Any], data: int) -> TensorEntry:
    """A tensor of the header, whose offsets count from byte `data` of the file."""
    dtype = fields["dtype"]
    shape = fields["shape"]
    offsets = fields["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or not isinstance(dtype, str) or not dtype.isprintable():
        raise TypeError("dtype, shape or data_offsets of another type")
    if any(type(number) is not int or number < 0 for number in (*shape, *offsets)):
        raise TypeError("a size that is no whole number")
    return TensorEntry(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _check(name: str, entry: TensorEntry, data: int, size: int) -> None:
    """Refuse a tensor that lies outside the file or has another length than its shape says."""
    if not data <= entry.begin <= entry.end <= size:
        raise TensorFileError(f"{name} lies at bytes {entry.begin} to {entry.end} of {size}")
    dtype = DTYPES.get(entry.dtype)
    if dtype is not None and entry.end - entry.begin != math.prod(entry.shape) * dtype.itemsize:
        raise TensorFileError(f"{name} {entry.dtype} {entry.shape} takes {entry.end - entry.begin} bytes")
