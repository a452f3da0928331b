"""KV caches whose length differs from segment to segment, because tokens were dropped between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class SegmentCache:
    """The keys and values of one segment's attention layers.

    `lengths[j]` tokens of layer j are valid; the slots behind them may hold padding and are overwritten or masked. In a
    segment of the adaptive mode all layers have one length; the graphs of the fixed mode reduce inside.
    """

    keys: list[Any]  # buffers of the backend's device, each [1, Hkv, C_j, hd]
    values: list[Any]
    lengths: NDArray[np.int64]

    @property
    def capacities(self) -> list[int]:
        """Slots of each layer."""
        return [int(keys.shape[2]) for keys in self.keys]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(int(buffer.nbytes) for buffer in (*self.keys, *self.values))
