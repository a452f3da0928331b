"""KV caches whose length differs from segment to segment, because tokens were dropped between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


@dataclass
class SegmentCache:
    """The keys and values of one segment's attention layers.

    `lengths[j]` tokens of layer j are valid; the slots behind them may hold padding and are overwritten or masked. In a
    segment of the adaptive mode all layers have one length; the graphs of the fixed mode reduce inside.
    """

    keys: list[Floats]  # each [1, Hkv, C_j, hd]
    values: list[Floats]
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def empty(
        cls, num_kv_heads: int, head_dim: int, capacities: list[int], float_type: type[np.floating[Any]] = np.float32
    ) -> SegmentCache:
        """Zeroed caches; the operating system gives the pages only when a slot is written."""
        shapes = [(1, num_kv_heads, capacity, head_dim) for capacity in capacities]
        return cls(
            [np.zeros(shape, float_type) for shape in shapes],
            [np.zeros(shape, float_type) for shape in shapes],
            np.zeros(len(capacities), np.int64),
        )

    @property
    def capacities(self) -> list[int]:
        """Slots of each layer."""
        return [keys.shape[2] for keys in self.keys]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))
