"""The embedding table: rows of a memory-mapped file as fp32. Only the pages of the rows asked for are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError
from framefusion.runtime.format.bundle_files import place
from framefusion.runtime.format.manifest import EmbeddingRecord
from framefusion.runtime.text.prompt import FIRST_EXTRA

_STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}  # numpy has no bfloat16


class Embedding:
    """Token ids to rows."""

    def __init__(self, folder: Path, record: EmbeddingRecord) -> None:
        self._bfloat16 = record.dtype == "bfloat16"
        self._rows = record.rows
        self._extra = len(record.extra)
        path = folder / record.file
        shape = (record.rows + self._extra, record.width)
        expected = shape[0] * shape[1] * np.dtype(_STORED[record.dtype]).itemsize
        try:
            found = place(folder, record.file).stat().st_size
            if found != expected:
                raise BundleError(f"it has {found} bytes, its rows are {expected}")
            self._table: NDArray[Any] = np.memmap(path, _STORED[record.dtype], mode="r", shape=shape)
        except (OSError, ValueError, BundleError) as error:
            raise BundleError(f"{path} is missing or truncated ({error}): copy it again or rebuild") from None

    def __call__(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[S] -> [S, D]. Ids beyond the table and rows of the tower give zeros; prompt.py says what is below 0."""
        extra = FIRST_EXTRA - token_ids
        places = np.where(token_ids < 0, self._rows + extra, token_ids)
        known = np.where(token_ids < 0, (extra >= 0) & (extra < self._extra), token_ids < self._rows)
        rows = self._table[np.where(known, places, 0)]
        # bfloat16 is the upper half of a float32
        values = (rows.astype(np.uint32) << 16).view(np.float32) if self._bfloat16 else rows.astype(np.float32)
        values[~known] = 0
        return values
