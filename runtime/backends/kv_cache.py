"""KV caches whose length differs from segment to segment, because tokens were dropped between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from framefusion.runtime.backends.buffer import Buffer


def cache_names(prefix: str, count: int) -> list[str]:
    """Names of the caches of `count` attention layers as graphs have them: past_key_0, past_value_0, past_key_1, ..."""
    return [f"{prefix}_{part}_{j}" for j in range(count) for part in ("key", "value")]


def rows_name(name: str) -> str:
    """The output of a graph that gives new rows and no whole cache: past_key_0 or present_key_0 -> rows_key_0."""
    return "rows_" + name.partition("_")[2]


@dataclass
class SegmentCache:
    """The keys and values of one segment's attention layers.

    `lengths[j]` tokens of layer j are valid; the slots behind them may hold padding and are overwritten or masked. In a
    segment of the adaptive mode all layers have one length; the graphs of the fixed mode reduce inside.
    """

    keys: list[Buffer]  # of the backend's device, each [1, Hkv, C_j, hd]
    values: list[Buffer]
    lengths: NDArray[np.int64]

    @property
    def capacities(self) -> list[int]:
        """Slots of each layer."""
        return [keys.shape[2] for keys in self.keys]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    def named(self, prefix: str) -> dict[str, Buffer]:
        """The buffers under the names of a graph's inputs ("past") or outputs ("present")."""
        buffers = (buffer for pair in zip(self.keys, self.values, strict=True) for buffer in pair)
        return dict(zip(cache_names(prefix, len(self.keys)), buffers, strict=True))
