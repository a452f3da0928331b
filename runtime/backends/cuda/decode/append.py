"""New rows of keys and values behind those that caches hold, where engines give rows and not whole caches.

One launch for all layers of a segment, at places that the device's own lengths say: nothing comes from the host, so a
step with it can be captured. Knows no engine and no segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from framefusion.runtime.backends.cuda.array import DeviceArray
from framefusion.runtime.backends.cuda.buffers import CudaBuffers
from framefusion.runtime.backends.cuda.kernels import WORDS, Kernels, count, row_geometry, width


class AppendedRows(NamedTuple):
    """What goes where."""

    rows: DeviceArray  # [1, Hkv, S, hd]
    cache: DeviceArray  # [1, Hkv, C, hd], of the same type
    layer: int  # whose length in kv_len counts


class CudaAppend:
    """Appends rows to caches: those of layer j to the slots from kv_len[j] - S on.

    Args:
        device: of all buffers.
        kernels: of that device.
        appended: what goes where; all of as many heads and channels.
        kv_len: tokens in each cache with the rows.  [L] int64

    Raises:
        TypeError, ValueError: buffers are not of one type, without gaps, and of fitting shapes: nothing would notice.
    """

    def __init__(
        self, device: CudaBuffers, kernels: Kernels, appended: Sequence[AppendedRows], kv_len: DeviceArray
    ) -> None:
        arrays = [array for each in appended for array in (each.rows, each.cache)]
        if len({array.dtype for array in arrays}) != 1 or not all(array.contiguous for array in (*arrays, kv_len)):
            raise TypeError(f"rows and caches are of one type and without gaps, not {arrays}")
        if len({(array.ndim, array.shape[0], array.shape[1], array.shape[-1]) for array in arrays}) != 1:
            raise ValueError(f"rows and caches have as many heads and channels, not {arrays}")
        if kv_len.dtype != np.int64 or any(not 0 <= each.layer < kv_len.size for each in appended):
            raise ValueError(f"{kv_len!r} does not say the lengths of {[each.layer for each in appended]}")
        (_, heads, _, channels) = arrays[0].shape
        if any(each.rows.shape[2] > each.cache.shape[2] for each in appended):
            raise ValueError(f"{arrays} are more rows than slots")
        row = channels * arrays[0].dtype.itemsize
        word = next(size for size in WORDS if all(place % size == 0 for place in (row, *(a.address for a in arrays))))
        entries = [
            (each.rows.address, each.cache.address, each.cache.shape[2], each.rows.shape[2], each.layer)
            for each in appended
        ]
        self._held = arrays
        self._kernels = kernels
        self._name = f"append_{word}"
        self._geometry = row_geometry(
            heads * max(each.rows.shape[2] for each in appended), row // word, tables=len(appended)
        )
        self._table = device.upload(np.array(entries, np.int64))
        self._arguments = (self._table, kv_len, count(heads), width(row // word))

    @property
    def key(self) -> object:
        """Equal for launches that are interchangeable where all buffers have the same addresses."""
        return self._table.address

    def run(self) -> None:
        """Enqueue it."""
        self._kernels.launch(self._name, self._geometry, *self._arguments)
