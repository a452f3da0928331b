"""Which NVIDIA GPU this machine has, asked of the driver's own library. Knows no CUDA package, no engine, no bundle."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

DRIVER_LIBRARY = "libcuda.so.1"
_MAJOR = 75
_MINOR = 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class GPU:
    """One device, as the driver describes it."""

    name: str
    capability: str  # compute capability, "8.6"
    memory: int  # bytes in all, not those that are free
    cuda: tuple[int, int]  # newest CUDA that the driver knows


def find_gpu(library: str = DRIVER_LIBRARY, ordinal: int = 0) -> GPU | None:
    """The device that a process gets, None without a driver or without a device.

    Args:
        library: the driver's library, by name or path.
        ordinal: among the devices that CUDA_VISIBLE_DEVICES leaves.
    """
    try:
        driver = ctypes.CDLL(library)
        version = ctypes.c_int()
        device = ctypes.c_int()
        major = ctypes.c_int()
        minor = ctypes.c_int()
        memory = ctypes.c_size_t()
        name = ctypes.create_string_buffer(256)
        results = (
            driver.cuInit(0),
            driver.cuDriverGetVersion(ctypes.byref(version)),
            driver.cuDeviceGet(ctypes.byref(device), ordinal),
            driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
            driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
            driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
            driver.cuDeviceGetName(name, len(name), device),
        )
    except (OSError, AttributeError):
        return None
    if any(results):  # every call gives 0, CUDA_SUCCESS
        return None
    cuda = (version.value // 1000, version.value % 1000 // 10)  # 12080 is 12.8
    return GPU(name.value.decode(), f"{major.value}.{minor.value}", memory.value, cuda)
