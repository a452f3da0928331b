"""A device of torch: buffers are its tensors, and what is done to rows between segments is said in its operators.

For graphs that run in libtorch on a GPU. torch is imported when a device is made and by nothing before; on the CPU the
same code is compared with HostDevice. No GPU has run it yet. Knows no graph.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BackendError
from framefusion.reduction import tracks
from framefusion.reduction.plan import Plan
from framefusion.runtime.backends.base import Array

BFLOAT16 = "bfloat16"  # numpy has it from ml_dtypes, torch reads no array of it: both see 16-bit integers


def load_torch() -> Any:
    """The module.

    Raises:
        BackendError: it is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise BackendError(
            "torch is not installed, and inductor engines run in its libraries: pip install torch"
        ) from None


def as_tensor(torch: Any, array: Array) -> Any:
    """A tensor over the memory of an array."""
    if array.dtype.name == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(torch: Any, tensor: Any, dtype: np.dtype[Any]) -> Array:
    """An array of this type over the memory of a tensor of the host."""
    if dtype.name == BFLOAT16:
        return np.asarray(tensor.view(torch.int16).numpy()).view(dtype)
    return np.asarray(tensor.numpy())


class TorchMirror:
    """A tensor of the device and its pinned twin."""

    def __init__(self, device: TorchDevice, shape: Sequence[int], dtype: Any) -> None:
        self._torch = device.torch
        self.there = device.zeros(shape, dtype)
        on_host = self.there.device.type == "cpu"
        twin = self.there if on_host else self._torch.zeros_like(self.there, device="cpu").pin_memory()
        self.host = as_array(self._torch, twin, np.dtype(dtype))
        self._twin = twin
        self._same = on_host
        self._arrival: Any = None

    def push(self) -> None:
        """See `Mirror.push`. The host must not write again before what reads it was waited for."""
        if not self._same:
            self.there.copy_(self._twin, non_blocking=True)

    def request(self) -> None:
        """See `Mirror.request`."""
        if not self._same:
            self._twin.copy_(self.there, non_blocking=True)
            self._arrival = self._torch.cuda.Event()
            self._arrival.record()

    def pull(self) -> Array:
        """See `Mirror.pull`."""
        if not self._same:
            if self._arrival is None:
                self.request()
            self._arrival.synchronize()
            self._arrival = None
        return self.host


class TorchDevice:
    """See `Device`. Rows have one type on their whole way; their sums are in fp32 and rounded each time.

    Args:
        name: as torch names it, "cuda" or "cpu".
        row_type: numpy's type of rows.

    Raises:
        BackendError: torch is missing, or has no such device.
    """

    def __init__(self, name: str, row_type: type[np.generic]) -> None:
        self.torch = load_torch()
        self.row_type = row_type
        if name != "cpu" and not self.torch.cuda.is_available():
            built = self.torch.version.cuda
            why = "this build of it is without CUDA" if built is None else "it finds no GPU that it can use"
            raise BackendError(
                f"torch {self.torch.__version__} cannot run on {name}: {why}; run engines of the CPU with --device cpu"
            )
        self._device = self.torch.device(name)

    def _dtype(self, dtype: Any) -> Any:
        """torch's name of numpy's type; its own types stay."""
        return dtype if isinstance(dtype, self.torch.dtype) else getattr(self.torch, np.dtype(dtype).name)

    def _index(self, index: NDArray[np.int64]) -> Any:
        return self.torch.from_numpy(np.ascontiguousarray(index)).to(self._device, non_blocking=True)

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """See `Device.empty`."""
        return self.torch.empty(tuple(shape), dtype=self._dtype(dtype), device=self._device)

    def zeros(self, shape: Sequence[int], dtype: Any) -> Any:
        """See `Device.zeros`."""
        return self.torch.zeros(tuple(shape), dtype=self._dtype(dtype), device=self._device)

    def mirror(self, shape: Sequence[int], dtype: Any) -> TorchMirror:
        """See `Device.mirror`."""
        return TorchMirror(self, shape, dtype)

    def upload(self, array: Array) -> Any:
        """See `Device.upload`."""
        return as_tensor(self.torch, np.ascontiguousarray(array)).to(self._device)

    def download(self, buffer: Any) -> Array:
        """See `Device.download`; bfloat16 comes as fp32, which holds it exactly."""
        tensor = buffer.float() if buffer.dtype == self.torch.bfloat16 else buffer
        return np.asarray(tensor.cpu().numpy())

    def typed(self, buffer: Any, dtype: Any) -> Any:
        """See `Device.typed`."""
        return buffer.to(self._dtype(dtype))

    def contiguous(self, buffer: Any) -> Any:
        """See `Device.contiguous`."""
        return buffer.contiguous()

    def copy(self, target: Any, source: Any) -> None:
        """See `Device.copy`."""
        target.copy_(source)

    def put(self, target: Any, index: NDArray[np.int64], rows: Any) -> None:
        """See `Device.put`."""
        target.index_copy_(0, self._index(index), rows)

    def take(self, rows: Any, index: NDArray[np.int64]) -> Any:
        """See `Device.take`."""
        return rows.index_select(0, self._index(index))

    def mix(self, rows: Any, index: NDArray[np.int64], weight: NDArray[np.float32]) -> Any:
        """See `Device.mix`."""
        weights = self.torch.from_numpy(np.ascontiguousarray(weight)).to(self._device)
        total = weights[:, :1] * self.take(rows, index[:, 0]).float()
        for k in range(1, index.shape[1]):
            total += weights[:, k : k + 1] * self.take(rows, index[:, k]).float()
        return total.to(rows.dtype)

    def padded(self, rows: Any, length: int, size: int) -> Any:
        """See `Device.padded`."""
        if rows.shape[-2] == size:
            return rows
        return self.torch.nn.functional.pad(rows[..., :length, :], (0, 0, 0, size - length))

    def reduced(self, rows: Any, plan: Plan) -> Any:
        """See `Device.reduced`: the order of the sums is plan.apply_plan's."""
        stacked = rows if rows.ndim == 3 else rows[None]
        reduced = stacked.index_select(1, self._index(plan.kept))
        runs = plan.runs_longest_first()
        means = stacked.index_select(1, self._index(runs.heads)).float()
        for members in runs.followers:
            means[:, : members.size] += stacked.index_select(1, self._index(members)).float()
        means /= self.torch.from_numpy(runs.lengths.astype(np.float32)).to(self._device)[None, :, None]
        reduced.index_copy_(1, self._index(runs.slots), means.to(rows.dtype))
        return reduced if rows.ndim == 3 else reduced[0]

    def similarity(self, rows: Any, labels: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Device.similarity`: tokens without a previous one, and pairs with a zero token, get DISSIMILAR."""
        previous = tracks.previous_in_track(labels)
        hidden = rows[: labels.size].float()
        before = hidden.index_select(0, self._index(np.maximum(previous, 0)))
        scale = hidden.norm(dim=-1) * before.norm(dim=-1)
        comparable = self._index((previous >= 0).astype(np.int64)).bool() & (scale > 0)
        cosine = (hidden * before).sum(-1) / scale.clamp(min=np.finfo(np.float32).tiny)
        told = self.torch.where(comparable, cosine, self.torch.full_like(cosine, tracks.DISSIMILAR))
        return np.asarray(told.cpu().numpy())
