"""Memory of one GPU and what travels to and from it, in the order of two streams.

Everything that computes is enqueued on `stream`, in the order of the calls, and the host waits for none of it. Results
go to the host on a second stream that waits for what was computed when they were requested, so their copy runs beside
whatever is enqueued next and does not write them: zeroing of the next caches, uploads, padding. The host waits once a
reduction, in `Mirror.pull`: two vectors requested together arrive together.

Knows no kernel; `device` adds what is done to rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from framefusion.errors import BackendError
from framefusion.installation import install_command
from framefusion.runtime.backends.buffer import Array, Buffer
from framefusion.runtime.backends.cuda.array import DeviceArray, device_array
from framefusion.runtime.backends.cuda.decode.graph import Captured
from framefusion.runtime.backends.cuda.driver import EXTRA, Cuda
from framefusion.runtime.backends.cuda.memory import RING, STAGING, DeviceMemory, PinnedMemory, Ring

ALIGNMENT = 256  # bytes: what TensorRT asks of the address of a tensor


class CudaBuffers:
    """The part of `backends.Device` that needs no kernel, and what backends need beside the protocol.

    Args:
        ordinal: of the GPU among those that CUDA_VISIBLE_DEVICES shows.
    """

    def __init__(self, ordinal: int) -> None:
        self.cuda = cuda = Cuda(ordinal)
        self.gpu = cuda.gpu
        self.ordinal = ordinal
        self._stream = cuda.stream()
        self._copies = cuda.stream()
        self._computed = cuda.event()
        self._copied = cuda.event()
        self._memory = DeviceMemory(cuda, self._stream, self._copied)
        self._pinned = PinnedMemory(cuda)
        self._ring = Ring(cuda, self._stream, self._pinned)
        self._staging: Ring | None = None  # pinned when something large is uploaded first

    @property
    def stream(self) -> int:
        """CUstream of everything that computes."""
        return int(self._stream)

    def synchronize(self) -> None:
        """Wait for all that was enqueued."""
        for stream in (self._stream, self._copies):
            self.cuda.call("cuStreamSynchronize", stream)

    def free_memory(self) -> int:
        """Bytes of the GPU that nobody has."""
        return self.cuda.free_memory()

    def spare_memory(self) -> int:
        """See `Device.spare_memory`: an eighth, because caches and activations come later."""
        return self.free_memory() // 8

    def dtype(self, name: str) -> np.dtype[Any]:
        """numpy's type by its name, bfloat16 included.

        Raises:
            BackendError: bfloat16 without ml_dtypes.
        """
        if name != "bfloat16":
            return np.dtype(name)
        try:
            import ml_dtypes
        except ImportError:
            raise BackendError(f"bfloat16 needs the package ml-dtypes: {install_command(EXTRA)}") from None
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """What `run` enqueues, to be replayed; see `graph`. It may neither allocate, upload nor wait."""
        return Captured(self.cuda, self._stream, self._memory, run)

    # --- Memory and copies ------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> DeviceArray:
        """See `Device.empty`."""
        array = DeviceArray(0, shape, dtype)
        allocation = self._memory.allocate(array.nbytes)
        array.owner = allocation
        array.address = allocation.address
        return array

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> DeviceArray:
        """See `Device.zeros`."""
        array = self.empty(shape, dtype)
        self._clear(array)
        return array

    def _clear(self, array: DeviceArray) -> None:
        if array.nbytes:
            self.cuda.call("cuMemsetD8Async", array.address, 0, array.nbytes, self._stream)

    def mirror(self, shape: Sequence[int], dtype: DTypeLike) -> CudaMirror:
        """See `Device.mirror`."""
        return CudaMirror(self, self.zeros(shape, dtype))

    def upload(self, array: Array) -> DeviceArray:
        """See `Device.upload`; the caller may change the array at once."""
        buffer = self.empty(array.shape, array.dtype)
        self.send(array, buffer)
        return buffer

    def upload_together(self, arrays: Mapping[str, Array]) -> dict[str, Buffer]:
        """See `Device.upload_together`: views of one buffer, each at an address that every library binds."""
        starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays.values())])
        packed = np.zeros(starts[-1], np.uint8)
        for array, start in zip(arrays.values(), starts[:-1], strict=True):
            packed[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        there = self.upload(packed)
        return {
            name: DeviceArray(there.address + int(start), array.shape, array.dtype, there.owner)
            for (name, array), start in zip(arrays.items(), starts[:-1], strict=True)
        }

    def send(self, array: Array, buffer: DeviceArray) -> None:
        """Copy an array of the host into a contiguous buffer of as many bytes, in stream order.

        Nothing is waited for but the copies of the piece before the last one: while a vision tower runs, the host puts
        the next pictures in place. A large array goes in pieces, since memory that is not pinned would be waited for.
        """
        numbers = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        ring = self._ring if numbers.nbytes <= RING // 2 else self._stage()
        for start in range(0, numbers.nbytes, ring.most):
            piece = numbers[start : start + ring.most]
            source = ring.place(piece)
            self.cuda.call("cuMemcpyHtoDAsync", buffer.address + start, source, piece.nbytes, self._stream)

    def _stage(self) -> Ring:
        if self._staging is None:
            self._staging = Ring(self.cuda, self._stream, self._pinned, STAGING)
        return self._staging

    def download(self, buffer: Buffer) -> Array:
        """See `Device.download`."""
        packed = self.contiguous(buffer)
        array = np.empty(packed.shape, packed.dtype)
        if array.nbytes:
            self.cuda.call("cuMemcpyDtoHAsync", array.ctypes.data, packed.address, array.nbytes, self._stream)
            self.cuda.call("cuStreamSynchronize", self._stream)
        return array

    def contiguous(self, buffer: Buffer) -> DeviceArray:
        """See `Device.contiguous`."""
        buffer = device_array(buffer)
        if buffer.contiguous:
            return buffer
        packed = self.empty(buffer.shape, buffer.dtype)
        self.copy(packed, buffer)
        return packed

    def copy(self, target: Buffer, source: Buffer) -> None:
        """See `Device.copy`; both of one type."""
        target = device_array(target)
        source = device_array(source)
        if target.shape != source.shape:
            raise ValueError(f"{source!r} does not fit {target!r}")
        if not (target.contiguous and source.contiguous):
            for place in range(len(target)):
                self.copy(target[place], source[place])
        elif target.dtype != source.dtype:
            raise TypeError(f"{source!r} is not of the type of {target!r}")
        elif target.nbytes:
            self.cuda.call("cuMemcpyDtoDAsync", target.address, source.address, target.nbytes, self._stream)


class CudaMirror:
    """See `backends.Mirror`: pinned memory of the host, and its twin on the GPU.

    Request again after each run that computes the twin; what is pulled is the state of the last request.
    """

    def __init__(self, device: CudaBuffers, buffer: DeviceArray) -> None:
        self._device = device
        self.buffer = buffer
        self._block, raw = device._pinned.lend(buffer.nbytes)
        raw[:] = 0
        self.host: Array = raw.view(buffer.dtype).reshape(buffer.shape)

    def push(self) -> None:
        """See `Mirror.push`; the host may write again at once."""
        self._device.send(self.host, self.buffer)

    def request(self) -> None:
        """See `Mirror.request`: what is enqueued from here on runs beside the copy."""
        device = self._device
        call = self._device.cuda.call
        call("cuEventRecord", device._computed, device._stream)
        call("cuStreamWaitEvent", device._copies, device._computed, 0)
        if self.host.nbytes:
            call("cuMemcpyDtoHAsync", self._block.address, self.buffer.address, self.host.nbytes, device._copies)
        call("cuEventRecord", self._block.ready, device._copies)
        call("cuEventRecord", device._copied, device._copies)
        self._block.awaited = True

    def pull(self) -> Array:
        """See `Mirror.pull`."""
        if not self._block.awaited:
            self.request()
        self._device.cuda.call("cuEventSynchronize", self._block.ready)
        self._block.awaited = False
        return self.host
