"""What this machine has for a build: memory, disk, and what the process took of it. Linux; knows no build."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path


def available_memory() -> int:
    """Bytes that could be allocated now."""
    try:
        lines: Mapping[str, str] = dict(
            line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
        )
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def peak_memory() -> int:
    """Most bytes that this process had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_disk(place: Path) -> int:
    """Bytes free where a path is or would be: at the nearest folder that exists."""
    folder = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    return shutil.disk_usage(folder).free
