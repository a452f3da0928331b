"""The tokens of one answer, chosen on the GPU: what a decode step ends with, so that no logit leaves the device.

Two launches: the largest logit of each block's share, then one block that takes the largest of all, puts it where the
host reads it, and writes what the next step reads. Two places for results, in turn, let the host read one token while
the next step is running. Knows no segment and no stop.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np

from framefusion.runtime.backends.base import StepBuffers
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.cuda.array import DeviceArray, device_array
from framefusion.runtime.backends.cuda.buffers import CudaBuffers
from framefusion.runtime.backends.cuda.kernels import NOTHING, THREADS, Geometry, Kernels, Number, count, width

PARTS = 64  # blocks that look at a share of the logits
_ONE = Geometry((1, 1), (THREADS, 1))


class CudaGreedyTokens:
    """See `GreedyTokens`.

    Args:
        device: of all buffers.
        kernels: of that device.
        step: see `StepBuffers`.
        rotary: see `Device.greedy_tokens`.
        table: likewise.
        limit: likewise.

    Raises:
        TypeError, ValueError: buffers are not of one type and without gaps: nothing would notice later.
    """

    runs_ahead = True
    capturable = True

    def __init__(
        self,
        device: CudaBuffers,
        kernels: Kernels,
        step: StepBuffers,
        rotary: tuple[Buffer, Buffer],
        table: Buffer | None,
        limit: int,
    ) -> None:
        self._kernels = kernels
        (hidden, cos, sin) = (device_array(buffer) for buffer in (step.hidden, step.cos, step.sin))
        (cos_rows, sin_rows) = (device_array(rows) for rows in rotary)
        rows = None if table is None else device_array(table)
        logits = device_array(step.logits)
        lengths = device_array(step.lengths)
        like_rows = [hidden, cos, sin, cos_rows, sin_rows, *([] if rows is None else [rows])]
        if any(buffer.dtype != hidden.dtype or not buffer.contiguous for buffer in like_rows):
            raise TypeError(f"a step's rows and tables are of one type and without gaps, not {like_rows}")
        if logits.dtype != np.float32 or lengths.dtype != np.int64 or not lengths.contiguous:
            raise TypeError(f"logits are float32 and lengths int64 without gaps, not {logits!r} and {lengths!r}")
        half = cos.shape[-1]
        fits = rows is None or rows.shape[1] == hidden.shape[-1]
        if not fits or cos_rows.shape != sin_rows.shape or cos_rows.shape[1] != half or not 0 < limit <= logits.size:
            raise ValueError(f"{like_rows} and {limit} of {logits!r} do not belong together")
        self.feeds_rows = rows is not None
        self.inputs: Mapping[str, Buffer] = {"logits": logits}
        self.outputs: Mapping[str, Buffer] = {"hidden": hidden, "cos": cos, "sin": sin, "lengths": lengths}
        self._results = [device.mirror((2,), np.int64) for _ in range(2)]
        self._counter = device.zeros((1,), np.int64)
        self._values = device.empty((PARTS,), np.float32)
        self._places = device.empty((PARTS,), np.int32)
        self._held = like_rows
        self._requested = 0
        self._pulled = 0
        shares = min(PARTS, -(-limit // THREADS))
        self._geometry = Geometry((shares, 1), (THREADS, 1))
        self._choose: list[DeviceArray | Number] = [logits, count(limit), self._values, self._places]
        (even, odd) = (device_array(result.buffer) for result in self._results)
        self._feed: list[DeviceArray | Number] = [self._values, self._places, count(shares), self._counter, even, odd]
        self._feed += [NOTHING if rows is None else rows, count(0 if rows is None else len(rows))]
        self._feed += [hidden, width(hidden.shape[-1]), cos_rows, sin_rows, count(len(cos_rows))]
        self._feed += [cos, sin, count(half), lengths, count(lengths.size)]
        self._feed_name = f"feed_{hidden.dtype.itemsize}"

    @property
    def key(self) -> object:
        """Equal for choices whose captured launches are interchangeable."""
        arguments = (*self._choose, *self._feed)
        values = (each.address if isinstance(each, DeviceArray) else each[0] for each in arguments)
        return self._geometry, self._feed_name, tuple(values)

    def run(self) -> None:
        """See `GreedyTokens.run`."""
        self._kernels.launch("choose_parts", self._geometry, *self._choose)
        self._kernels.launch(self._feed_name, _ONE, *self._feed)

    def request(self) -> None:
        """See `GreedyTokens.request`."""
        self._results[self._requested % 2].request()
        self._requested += 1

    def pull(self) -> tuple[int, float]:
        """See `GreedyTokens.pull`."""
        assert self._pulled < self._requested < self._pulled + 3  # of two places, none is written before it is read
        (token, bits) = self._results[self._pulled % 2].pull()
        self._pulled += 1
        return int(token), ctypes.c_float.from_buffer(ctypes.c_uint32(int(bits))).value
