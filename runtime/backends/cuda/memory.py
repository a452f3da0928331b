"""What is allocated on both sides, and kept: a stream-ordered pool on the GPU, pinned blocks and a ring on the host.

Nothing goes back to the driver before the process ends or memory is short, so a request like the one before allocates
nothing. A buffer that Python drops is free for whatever is enqueued later; a pinned block serves again when no array
over it is left.
"""

from __future__ import annotations

import ctypes
import threading
import weakref

import numpy as np
from numpy.typing import NDArray

from framefusion.runtime.backends.buffer import Array
from framefusion.runtime.backends.cuda.driver import Cuda, Handle, OutOfMemoryError

RING = 4 << 20  # bytes for what is uploaded: indices and small inputs; half of it is the most at a time
STAGING = 32 << 20  # the same for what is larger, pictures of a film and rows of a prompt: they go in pieces of half
SMALLEST_BLOCK = 4096
_KEEP_ALL = (1 << 64) - 1


class Allocation:
    """Memory on the GPU for as long as somebody holds this."""

    def __init__(self, address: int) -> None:
        self.address = address


class DeviceMemory:
    """Allocations in the order of one stream.

    Args:
        cuda: the GPU.
        stream: on which the memory is used.
        copied: event that the stream of copies records behind each copy: what is freed may still be read by one.
    """

    def __init__(self, cuda: Cuda, stream: Handle, copied: Handle) -> None:
        self._cuda = cuda
        self._stream = stream
        self._copied = copied
        self._pool = self._make_pool() if cuda.attribute("MEMORY_POOLS_SUPPORTED") else None
        self._held_back: list[int] | None = None  # addresses to free behind a capture
        self._lock = threading.RLock()  # the collector may free while this thread holds it

    def _make_pool(self) -> Handle:
        api = self._cuda.api
        properties = api.CUmemPoolProps()
        properties.allocType = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self._cuda.ordinal
        pool: Handle = self._cuda.call("cuMemPoolCreate", properties)
        threshold = api.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        self._cuda.call("cuMemPoolSetAttribute", pool, threshold, api.cuuint64_t(_KEEP_ALL))
        return pool

    def allocate(self, nbytes: int) -> Allocation:
        """Memory with any content.

        Raises:
            OutOfMemoryError: with the bytes requested and free.
        """
        if self._held_back is not None:
            raise RuntimeError("nothing may be allocated while launches are captured: their addresses are to last")
        size = max(nbytes, 1)
        try:
            try:
                address = self._address(size)
            except OutOfMemoryError:
                self._trim()
                address = self._address(size)
        except OutOfMemoryError:
            free = self._cuda.free_memory()
            mega = 1 << 20
            raise OutOfMemoryError(
                f"{self._cuda.gpu.name} has {free / mega:.0f} MiB free of {self._cuda.gpu.memory / mega:.0f}, "
                f"{size / mega:.0f} MiB more were needed: sample fewer frames, lower max_new_tokens or the cost, or "
                "end what else uses the GPU"
            ) from None
        allocation = Allocation(address)
        weakref.finalize(allocation, self._free, address).atexit = False
        return allocation

    def _address(self, size: int) -> int:
        if self._pool is None:
            return int(self._cuda.call("cuMemAlloc", size))
        return int(self._cuda.call("cuMemAllocFromPoolAsync", size, self._pool, self._stream))

    def _trim(self) -> None:
        """Give what is kept but not used back to the driver: it may be of the wrong size, or wait to be freed."""
        self._cuda.call("cuStreamSynchronize", self._stream)
        if self._pool is not None:
            self._cuda.call("cuMemPoolTrimTo", self._pool, 0)

    def _free(self, address: int) -> None:
        with self._lock:
            if self._held_back is not None:
                self._held_back.append(address)
                return
        self._cuda.call("cuStreamWaitEvent", self._stream, self._copied, 0)
        if self._pool is None:
            self._cuda.call("cuStreamSynchronize", self._stream)
            self._cuda.call("cuMemFree", address)
        else:
            self._cuda.call("cuMemFreeAsync", address, self._stream)

    def hold_back(self) -> None:
        """Free nothing from now on: a capture would record it."""
        with self._lock:
            self._held_back = []

    def let_go(self) -> None:
        """Free what was held back."""
        with self._lock:
            addresses = self._held_back or []
            self._held_back = None
        for address in addresses:
            self._free(address)


class PinnedBlock:
    """Page-locked memory of the host, and the event that tells when the last copy into it is done."""

    def __init__(self, address: int, size: int, ready: Handle) -> None:
        self.address = address
        self.size = size
        self.ready = ready
        self.awaited = False  # a copy into it is under way


class _BorrowedBlock:
    """A block lent to arrays, which hold this as their base."""

    def __init__(self, block: PinnedBlock) -> None:
        place = (block.address, False)
        self.__array_interface__ = {"shape": (block.size,), "typestr": "|u1", "data": place, "version": 3}


class PinnedMemory:
    """Pinned blocks by size, lent until the last array over one is gone."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._free: dict[int, list[PinnedBlock]] = {}

    def lend(self, nbytes: int) -> tuple[PinnedBlock, NDArray[np.uint8]]:
        """A block and its first `nbytes` bytes."""
        size = max(SMALLEST_BLOCK, 1 << (max(nbytes, 1) - 1).bit_length())
        free = self._free.setdefault(size, [])
        block = free.pop() if free else self._make(size)
        borrowed = _BorrowedBlock(block)
        weakref.finalize(borrowed, self._back, block).atexit = False
        return block, np.asarray(borrowed)[:nbytes]

    def _make(self, size: int) -> PinnedBlock:
        try:
            return PinnedBlock(int(self._cuda.call("cuMemHostAlloc", size, 0)), size, self._cuda.event())
        except OutOfMemoryError:
            raise OutOfMemoryError(
                f"the host cannot pin {size} bytes more: see `ulimit -l` and its free memory"
            ) from None

    def _back(self, block: PinnedBlock) -> None:
        if block.awaited:
            self._cuda.call("cuEventSynchronize", block.ready)
            block.awaited = False
        self._free[block.size].append(block)


class Ring:
    """Pinned memory through which arrays are uploaded, so that the caller may change them at once.

    One half is filled while the copies out of the other one run; on the way back into a half they are waited for.
    """

    def __init__(self, cuda: Cuda, stream: Handle, pinned: PinnedMemory, size: int = RING) -> None:
        self._cuda = cuda
        self._stream = stream
        self.most = size // 2  # bytes at a time
        block, self._bytes = pinned.lend(size)
        self._address = block.address
        self._half = 0
        self._at = 0
        self._left = [cuda.event(), cuda.event()]  # recorded when a half was left

    def place(self, array: Array) -> int:
        """Copy a contiguous array of at most half the ring into it: the address, for a copy enqueued right after."""
        half = self.most
        if self._at + array.nbytes > half:
            self._cuda.call("cuEventRecord", self._left[self._half], self._stream)
            self._half = 1 - self._half
            self._at = 0
            self._cuda.call("cuEventSynchronize", self._left[self._half])
        address = self._address + self._half * half + self._at
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        self._at += -(-array.nbytes // 16) * 16
        return address
