"""The CUDA driver API over one GPU: every call is checked, and what can fail says so in a sentence.

cuda-bindings is the C API one to one, the same in its versions 12 and 13; docs/cuda.md says why it is not cuda.core.
Knows no kernel and no tensor.
"""

from __future__ import annotations

import importlib
import threading
from types import ModuleType
from typing import Any, SupportsInt

from framefusion.errors import BackendError
from framefusion.installation import install_command
from framefusion.runtime.machine.gpu import GPU, find_gpu

Handle = SupportsInt
"""What the driver gives for a stream, an event, a pool or a graph: an object of cuda-bindings over an address."""

EXTRA = "gpu"  # of this package: what a GPU needs, for the newest CUDA and for CUDA 12
EXTRA_CUDA_12 = "gpu-cuda12"


def cuda_module(name: str) -> ModuleType:
    """A module of cuda-bindings: "driver" or "nvrtc".

    Raises:
        BackendError: the package is missing.
    """
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise BackendError(
            f"the package cuda-bindings cannot be imported ({error}): {install_command(EXTRA)}"
        ) from None


class OutOfMemoryError(BackendError):
    """The GPU, or the memory that the host can pin, is full."""


class _Thread(threading.local):
    """What is known of the thread that calls."""

    entered = False  # the context is current in it


class Cuda:
    """One GPU's primary context, made current in each thread that calls.

    Args:
        ordinal: of the GPU among those that CUDA_VISIBLE_DEVICES shows.

    Raises:
        BackendError: no GPU, no driver, no package, or a driver too old for the package.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self.gpu = _require_gpu(ordinal)
        self.ordinal = ordinal
        self.api = cuda_module("driver")
        _require_driver(self.gpu)
        self._thread = _Thread()
        self._context: Any = None
        self.call("cuInit", 0)
        self._device = self.call("cuDeviceGet", ordinal)
        self._context = self.call("cuDevicePrimaryCtxRetain", self._device)

    def call(self, name: str, *arguments: object) -> Any:
        """Call a function of the driver: its one result, a tuple of them, or None."""
        if not self._thread.entered:
            self._enter()
        result = getattr(self.api, name)(*arguments)  # the status, then what the function returns
        if result[0]:  # anything but CUDA_SUCCESS, which is 0
            raise self._error(name, result[0])
        return result[1] if len(result) == 2 else result[1:] or None

    def _enter(self) -> None:
        """Make the context current in this thread, once there is one."""
        if self._context is not None:
            (status,) = self.api.cuCtxSetCurrent(self._context)
            if status:
                raise self._error("cuCtxSetCurrent", status)
            self._thread.entered = True

    def _error(self, name: str, status: object) -> BackendError:
        if status == self.api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            return OutOfMemoryError(f"{name} finds no memory on {self.gpu.name}")
        _, description = self.api.cuGetErrorString(status)
        reason = description.decode() if description else "no description"
        return BackendError(
            f"{name} failed on {self.gpu.name}: {self.api.CUresult(status).name} ({reason}). Start the process again; "
            "if it stays so, see nvidia-smi and update the driver"
        )

    def attribute(self, name: str) -> int:
        """An attribute of the GPU, by the end of its name in CUdevice_attribute."""
        which = getattr(self.api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self.call("cuDeviceGetAttribute", which, self._device))

    def free_memory(self) -> int:
        """Bytes nobody has."""
        free, _ = self.call("cuMemGetInfo")
        return int(free)

    def stream(self) -> Handle:
        """A new stream, which does not wait for the default one."""
        stream: Handle = self.call("cuStreamCreate", int(self.api.CUstream_flags.CU_STREAM_NON_BLOCKING))
        return stream

    def event(self, *, timed: bool = False) -> Handle:
        """A new event."""
        flags = self.api.CUevent_flags.CU_EVENT_DEFAULT if timed else self.api.CUevent_flags.CU_EVENT_DISABLE_TIMING
        event: Handle = self.call("cuEventCreate", int(flags))
        return event


def _require_gpu(ordinal: int) -> GPU:
    gpu = find_gpu(ordinal=ordinal)
    if gpu is None:
        raise BackendError(
            f"there is no NVIDIA GPU {ordinal} with a working driver on this machine (nvidia-smi and "
            "CUDA_VISIBLE_DEVICES show what there is): take the backend onnxruntime, which runs on the CPU"
        )
    return gpu


def _require_driver(gpu: GPU) -> None:
    version = importlib.import_module("cuda.bindings").__version__
    if gpu.cuda[0] < int(version.split(".")[0]):
        raise BackendError(
            f"the NVIDIA driver of {gpu.name} goes up to CUDA {gpu.cuda[0]}.{gpu.cuda[1]}, the installed cuda-bindings "
            f"{version} needs a newer one: update the driver, or {install_command(EXTRA_CUDA_12)}"
        )
