"""What this machine has for a build: memory, disk, and what the process took of it. Linux; knows no build."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from framefusion.runtime.machine.control_groups import PROC, groups_above

TRACING_PROCESS = 650_000_000
"""Bytes of a process that traces, without a tensor in it, measured: torch, its exporter and onnx_ir."""
CHECKING_PROCESS = 900_000_000
"""Bytes of a process that checks, without a tensor in it, measured: ONNX Runtime and transformers beside torch."""
MADV_PAGEOUT = 21  # of Linux 5.4 and newer: unlike MADV_DONTNEED it never loses what was written


class _GroupFiles(NamedTuple):
    """Where a version of control groups has what it says of memory."""

    limit: str
    used: str
    cached: str  # prefix of what is counted with the groups below


GROUP_FILES: Mapping[int, _GroupFiles] = MappingProxyType(
    {
        1: _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: _GroupFiles("memory.max", "memory.current", ""),
    }
)
"""Version of control groups -> its files."""


def available_memory() -> int:
    """Bytes that could be allocated now: what the machine has, within the limits that this process is under.

    These are the limits of its control groups, as a container has them, RLIMIT_DATA and RLIMIT_AS.
    """
    return max(0, min([_free_memory(), *_left_of_groups(), *_left_of_process()]))


def _free_memory() -> int:
    """Bytes that the whole machine could give."""
    try:
        return 1024 * _numbers(PROC / "meminfo")["MemAvailable"]
    except (OSError, KeyError):
        page = os.sysconf("SC_PAGE_SIZE")
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            return page * os.sysconf("SC_AVPHYS_PAGES")
        return page * os.sysconf("SC_PHYS_PAGES") // 2  # macOS says only what there is in all


def _left_of_groups() -> Iterator[int]:
    """What each control group above this process leaves it; files in the system's cache are given back."""
    for group, version in groups_above("memory"):
        yield from _left_of_group(group, GROUP_FILES[version])


def _left_of_group(group: Path, kind: _GroupFiles) -> Iterator[int]:
    try:
        limit = int((group / kind.limit).read_text())  # "max" where there is none
        used = int((group / kind.used).read_text())
        cached = _numbers(group / "memory.stat")
    except (OSError, ValueError):
        return
    yield limit - used + sum(cached.get(kind.cached + name, 0) for name in ("active_file", "inactive_file"))


def _left_of_process() -> Iterator[int]:
    """What the limits of a process leave it."""
    try:
        used = _numbers(PROC / "self" / "status")
        for limit, name in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
            most, _hard = resource.getrlimit(limit)
            if most != resource.RLIM_INFINITY:
                yield most - 1024 * used[name]
    except (OSError, KeyError):
        return


def _numbers(path: Path) -> dict[str, int]:
    """The numbers of a file of the kernel's, a name before each, by their names."""
    fields = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {name: int(number) for name, number, *_ in (line for line in fields if len(line) > 1) if number.isdigit()}


def peak_memory() -> int:
    """Most bytes that this process had resident so far; what its parent had before it does not count on Linux."""
    status = PROC / "self" / "status"
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
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
