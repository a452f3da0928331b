"""A device of torch: buffers are its tensors, and what is done to rows between segments is said in its operators.

For graphs that run in libtorch on a GPU. torch is imported when a device is made and by nothing before; on the CPU the
same code is compared with HostDevice. No GPU has run it yet. Knows no graph.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from framefusion.errors import BackendError
from framefusion.reduction import tracks
from framefusion.reduction.plan import Plan
from framefusion.runtime.backends.base import StepBuffers
from framefusion.runtime.backends.buffer import Array, Buffer
from framefusion.runtime.backends.inductor.tokens import TorchGreedyTokens, tensor_of

BFLOAT16 = "bfloat16"  # numpy has it from ml_dtypes, torch reads no array of it: both see 16-bit integers


def load_torch() -> ModuleType:
    """The module `torch`.

    Raises:
        BackendError: it is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise BackendError(
            "torch is not installed, and inductor engines run in its libraries: pip install torch"
        ) from None


def as_tensor(torch: ModuleType, array: Array) -> Any:
    """A tensor over the memory of an array."""
    if array.dtype.name == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(torch: ModuleType, tensor: Buffer, dtype: np.dtype[Any]) -> Array:
    """An array of this type over the memory of a tensor of the host."""
    if dtype.name == BFLOAT16:
        return np.asarray(tensor_of(tensor).view(torch.int16).numpy()).view(dtype)
    return np.asarray(tensor_of(tensor).numpy())


class TorchMirror:
    """A tensor of the device and its pinned twin."""

    def __init__(self, device: TorchDevice, shape: Sequence[int], dtype: DTypeLike) -> None:
        self._torch = device.torch
        self.buffer = device.zeros(shape, dtype)
        tensor = tensor_of(self.buffer)
        self._is_host = tensor.device.type == "cpu"
        self._twin = tensor if self._is_host else self._torch.zeros_like(tensor, device="cpu").pin_memory()
        self.host = as_array(self._torch, self._twin, np.dtype(dtype))
        self._arrival: Any = None  # event behind the last copy to the host

    def push(self) -> None:
        """See `Mirror.push`. The host must not write again before what reads it was waited for."""
        if not self._is_host:
            tensor_of(self.buffer).copy_(self._twin, non_blocking=True)

    def request(self) -> None:
        """See `Mirror.request`."""
        if not self._is_host:
            self._twin.copy_(self.buffer, non_blocking=True)
            self._arrival = self._torch.cuda.Event()
            self._arrival.record()

    def pull(self) -> Array:
        """See `Mirror.pull`."""
        if not self._is_host:
            if self._arrival is None:
                self.request()
            self._arrival.synchronize()
            self._arrival = None
        return self.host


class _PlanThere(NamedTuple):
    """A plan as tensors on the device: see `Plan` and `Runs`."""

    kept: Any
    heads: Any
    slots: Any
    lengths: Any
    followers: Sequence[Any]


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

    def _dtype(self, dtype: DTypeLike) -> Any:
        """torch's type of numpy's; its own types, which its buffers have, stay."""
        return dtype if isinstance(dtype, self.torch.dtype) else getattr(self.torch, np.dtype(dtype).name)

    def _index(self, index: NDArray[np.int64]) -> Any:
        """Indices of the host on the device."""
        return self.torch.from_numpy(np.ascontiguousarray(index)).to(self._device, non_blocking=True)

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """See `Device.empty`."""
        buffer: Buffer = self.torch.empty(tuple(shape), dtype=self._dtype(dtype), device=self._device)
        return buffer

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> Buffer:
        """See `Device.zeros`."""
        buffer: Buffer = self.torch.zeros(tuple(shape), dtype=self._dtype(dtype), device=self._device)
        return buffer

    def spare_memory(self) -> int:
        """See `Device.spare_memory`: an eighth, because caches and activations come later."""
        return 0 if self._device.type == "cpu" else int(self.torch.cuda.mem_get_info()[0]) // 8

    def greedy_tokens(
        self, step: StepBuffers, rotary: tuple[Buffer, Buffer], table: Buffer | None, limit: int
    ) -> TorchGreedyTokens:
        """See `Device.greedy_tokens`."""
        return TorchGreedyTokens(self.torch, self, step, rotary, table, limit)

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """What `run` enqueues, as a CUDA graph; what torch allocates for it stays with the graph.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            run()
        replay: Callable[[], None] = graph.replay
        return replay

    def mirror(self, shape: Sequence[int], dtype: DTypeLike) -> TorchMirror:
        """See `Device.mirror`."""
        return TorchMirror(self, shape, dtype)

    def upload(self, array: Array) -> Buffer:
        """See `Device.upload`."""
        uploaded: Buffer = as_tensor(self.torch, np.ascontiguousarray(array)).to(self._device)
        return uploaded

    def upload_together(self, arrays: Mapping[str, Array]) -> dict[str, Buffer]:
        """See `Device.upload_together`; each goes by itself."""
        return {name: self.upload(array) for name, array in arrays.items()}

    def download(self, buffer: Buffer) -> Array:
        """See `Device.download`; bfloat16 comes as fp32, which holds it exactly."""
        tensor = tensor_of(buffer)
        tensor = tensor.float() if tensor.dtype == self.torch.bfloat16 else tensor
        return np.asarray(tensor.cpu().numpy())

    def typed(self, buffer: Buffer, dtype: DTypeLike) -> Buffer:
        """See `Device.typed`."""
        typed: Buffer = tensor_of(buffer).to(self._dtype(dtype))
        return typed

    def contiguous(self, buffer: Buffer) -> Buffer:
        """See `Device.contiguous`."""
        packed: Buffer = tensor_of(buffer).contiguous()
        return packed

    def copy(self, target: Buffer, source: Buffer) -> None:
        """See `Device.copy`."""
        tensor_of(target).copy_(source)

    def put(self, target: Buffer, index: NDArray[np.int64], rows: Buffer) -> None:
        """See `Device.put`."""
        tensor_of(target).index_copy_(0, self._index(index), rows)

    def take(self, rows: Buffer, index: NDArray[np.int64]) -> Buffer:
        """See `Device.take`."""
        picked: Buffer = tensor_of(rows).index_select(0, self._index(index))
        return picked

    def mix(self, rows: Buffer, index: NDArray[np.int64], weight: NDArray[np.float32]) -> Buffer:
        """See `Device.mix`."""
        weights = self.torch.from_numpy(np.ascontiguousarray(weight)).to(self._device)
        total = weights[:, :1] * tensor_of(self.take(rows, index[:, 0])).float()
        for k in range(1, index.shape[1]):
            total += weights[:, k : k + 1] * tensor_of(self.take(rows, index[:, k])).float()
        mixed: Buffer = total.to(rows.dtype)
        return mixed

    def padded(self, rows: Buffer, length: int, size: int) -> Buffer:
        """See `Device.padded`."""
        if rows.shape[-2] == size:
            return rows
        padded: Buffer = self.torch.nn.functional.pad(rows[..., :length, :], (0, 0, 0, size - length))
        return padded

    def reduced(self, rows: Buffer, plan: Plan) -> Buffer:
        """See `Device.reduced`: the order of the sums is plan.apply_plan's."""
        return self._reduced(rows, self._plan_there(plan))

    def reduce_tokens(
        self, hidden: Buffer, rotary: tuple[Buffer, Buffer], features: Buffer | None, plan: Plan
    ) -> tuple[Buffer, tuple[Buffer, Buffer], Buffer | None]:
        """See `Device.reduce_tokens`: one upload for all."""
        there = self._plan_there(plan)
        (cos, sin) = (tensor_of(table).index_select(0, there.kept) for table in rotary)
        merged = None if features is None else self._reduced(features, there)
        return self._reduced(hidden, there), (cos, sin), merged

    def _plan_there(self, plan: Plan) -> _PlanThere:
        """The indices of a plan on the device, in one upload."""
        runs = plan.runs_longest_first()
        parts = (plan.kept, runs.heads, runs.slots, runs.lengths, *runs.followers)
        (kept, heads, slots, lengths, *followers) = self._index(np.concatenate(parts)).split([p.size for p in parts])
        return _PlanThere(kept, heads, slots, lengths, followers)

    def _reduced(self, rows: Buffer, plan: _PlanThere) -> Buffer:
        stacked = tensor_of(rows if len(rows.shape) == 3 else rows[None])
        reduced = stacked.index_select(1, plan.kept)
        means = stacked.index_select(1, plan.heads).float()
        for members in plan.followers:
            means[:, : members.numel()] += stacked.index_select(1, members).float()
        means /= plan.lengths.float()[None, :, None]
        reduced.index_copy_(1, plan.slots, means.to(rows.dtype))
        result: Buffer = reduced if len(rows.shape) == 3 else reduced[0]
        return result

    def similarity(self, rows: Buffer, labels: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Device.similarity`: tokens without a previous one, and pairs with a zero token, get DISSIMILAR."""
        previous = tracks.previous_in_track(labels)
        hidden = tensor_of(rows[: labels.size]).float()
        before = hidden.index_select(0, self._index(np.maximum(previous, 0)))
        scale = hidden.norm(dim=-1) * before.norm(dim=-1)
        comparable = self._index((previous >= 0).astype(np.int64)).bool() & (scale > 0)
        cosine = (hidden * before).sum(-1) / scale.clamp(min=np.finfo(np.float32).tiny)
        scores = self.torch.where(comparable, cosine, self.torch.full_like(cosine, tracks.DISSIMILAR))
        return np.asarray(scores.cpu().numpy())
