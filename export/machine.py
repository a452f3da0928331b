"""What this machine has for a build: memory, disk, and what the process took of it. Linux; knows no build."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

TRACING_PROCESS = 650_000_000
"""Bytes of a process that traces, without a tensor in it, measured: torch, its exporter and onnx_ir."""
CHECKING_PROCESS = 900_000_000
"""Bytes of a process that checks, without a tensor in it, measured: ONNX Runtime and transformers beside torch."""
MADV_PAGEOUT = 21  # of Linux 5.4 and newer: unlike MADV_DONTNEED it never loses what was written


def available_memory() -> int:
    """Bytes that could be allocated now."""
    try:
        lines: Mapping[str, str] = dict(
            line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
        )
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        page = os.sysconf("SC_PAGE_SIZE")
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            return page * os.sysconf("SC_AVPHYS_PAGES")
        return page * os.sysconf("SC_PHYS_PAGES") // 2  # macOS says only what there is in all


def peak_memory() -> int:
    """Most bytes that this process had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_disk(place: Path) -> int:
    """Bytes free where a path is or would be: at the nearest folder that exists."""
    folder = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    return shutil.disk_usage(folder).free


def page_out(address: int, size: int) -> None:
    """Tell the system that mapped memory is not wanted for now; what it held is there again when it is read.

    Without this a process that reads a large file through a mapping seems to hold all of it. Where the system cannot
    be told, nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    page = os.sysconf("SC_PAGE_SIZE")
    start = address - address % page
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), ctypes.c_int(MADV_PAGEOUT))
