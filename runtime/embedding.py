"""The embedding table: rows of a memory-mapped file as fp32. Only the pages of the rows asked for are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError
from framefusion.runtime.bundle import EmbeddingRecord

_STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}  # numpy has no bfloat16


class Embedding:
    """Token ids to rows."""

    def __init__(self, folder: Path, record: EmbeddingRecord) -> None:
        self._bfloat16 = record.dtype == "bfloat16"
        path, shape = folder / record.file, (record.rows, record.width)
        try:
            self._table: NDArray[Any] = np.memmap(path, _STORED[record.dtype], mode="r", shape=shape)
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} is missing or truncated ({error}): copy it again or rebuild") from None

    def __call__(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[S] -> [S, D]. Ids beyond the table (placeholders of videos) give zeros."""
        known = token_ids < self._table.shape[0]
        rows = self._table[np.where(known, token_ids, 0)]
        # bfloat16 is the upper half of a float32
        values = (rows.astype(np.uint32) << 16).view(np.float32) if self._bfloat16 else rows.astype(np.float32)
        values[~known] = 0
        return values
