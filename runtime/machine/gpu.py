"""Which NVIDIA GPU this machine has, told by the driver's own library. Knows no CUDA package, no engine, no bundle."""

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
        known, device, major, minor = (ctypes.c_int() for _ in range(4))
        memory = ctypes.c_size_t()
        name = ctypes.create_string_buffer(256)
        steps = (
            driver.cuInit(0),
            driver.cuDriverGetVersion(ctypes.byref(known)),
            driver.cuDeviceGet(ctypes.byref(device), ordinal),
            driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
            driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
            driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
            driver.cuDeviceGetName(name, len(name), device),
        )
    except (OSError, AttributeError):
        return None
    if any(steps):  # every call gives 0, CUDA_SUCCESS
        return None
    cuda = divmod(known.value, 1000)
    return GPU(name.value.decode(), f"{major.value}.{minor.value}", memory.value, (cuda[0], cuda[1] // 10))
