"""The graphs of building blocks that the installed ONNX Runtime can run on a device, each with a backend for it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from framefusion.runtime.backends.base import BlockGraph
from framefusion.runtime.backends.buffer import float_type
from framefusion.runtime.backends.fit import release
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend, OnnxRuntimeCudaBackend
from framefusion.runtime.backends.onnxruntime.fit import PORTABLE_SINCE
from framefusion.runtime.backends.table import Device
from framefusion.runtime.machine.machine import Machine

_DTYPES = {"cpu": ("float32", "float16"), "cuda": ("float16", "bfloat16")}  # as bundles are built for them


def block_graphs(device: Device, machine: Machine, folder: Path) -> Iterator[BlockGraph]:
    """Both dialects; portable only where the library's attention is known to mask as the standard says.

    Args:
        device: where they run.
        machine: this one.
        folder: of the graphs.

    Raises:
        BackendError: the GPU cannot be used after all.
    """
    has_portable = release(machine.onnxruntime or "0") >= PORTABLE_SINCE[device]
    dialects = ("gqa", "portable") if has_portable else ("gqa",)
    for dialect, dtype in product(dialects, _DTYPES[device]):
        yield BlockGraph(dialect, dtype, _backend(device, dtype, folder))


def _backend(device: Device, dtype: str, folder: Path) -> OnnxRuntimeBackend:
    if device == "cpu":
        return OnnxRuntimeBackend(folder)
    from framefusion.runtime.backends.cuda.device import CudaDevice

    return OnnxRuntimeCudaBackend(folder, CudaDevice(float_type(dtype).type))
