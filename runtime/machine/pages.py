"""Memory of files that this process has mapped: giving it back once nobody will read there. Linux; knows no engine."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MADV_DONTNEED = 4
_SMAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) [0-9a-f]+ \S+ \d+ *(.*)")


def give_back(file: Path) -> int:
    """Let go of a mapped file's pages: they stop counting as this process's memory.

    What is read there again comes from the system's cache, or from the disk. A mapping in which anything was written
    stays as it is. Where the system has no list of mappings, nothing happens.

    Args:
        file: that is mapped, privately.

    Returns:
        bytes of memory that were given back.
    """
    if not sys.platform.startswith("linux"):
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    given = 0
    for start, end, resident in _unwritten(str(file.resolve())):
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(MADV_DONTNEED)) == 0:
            given += resident
    return given


def _unwritten(path: str) -> Iterator[tuple[int, int, int]]:
    """Begin, end and resident bytes of each mapping of a file that holds nothing but what the file does."""
    try:
        lines = _SMAPS.read_text(errors="replace").splitlines()
    except OSError:
        return
    mapping: tuple[int, int] | None = None
    resident = 0
    for line in lines:
        found = _MAPPING.match(line)
        if found is not None:
            is_ours = found[4] == path and found[3].endswith("p")
            mapping = (int(found[1], 16), int(found[2], 16)) if is_ours else None
        elif mapping is not None and line.startswith("Rss:"):
            resident = 1024 * int(line.split()[1])
        elif mapping is not None and line.startswith("Anonymous:") and line.split()[1] == "0":
            yield (*mapping, resident)
