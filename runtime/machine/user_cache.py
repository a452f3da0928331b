"""Where this user keeps what can be made again: $XDG_CACHE_HOME, else ~/.cache. Knows no content.

Small files there may be believed where this user alone can have written them: they are written for nobody else, created
fresh and renamed, and read only where that is still so.
"""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


def user_cache(name: str) -> Path:
    """The folder of one kind of content; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "framefusion-aot" / name


def read_private(path: Path, most_bytes: int) -> bytes | None:
    """A small file that only this user can have written; None where there is none, or it is another's or too long."""
    if not hasattr(os, "getuid"):  # Windows tells no owner here: nothing is believed
        return None
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            is_users = status.st_uid == os.getuid() and not status.st_mode & 0o022  # nobody else may write it
            if not stat.S_ISREG(status.st_mode) or not is_users:
                return None
            content = file.read(most_bytes + 1)
    except (OSError, ValueError):
        return None
    return content if len(content) <= most_bytes else None


def write_private(path: Path, content: bytes, most_files: int | None = None) -> bool:
    """Write a file that others may not change, in one step; whether it could be written.

    Args:
        path: the file; its folder is made.
        content: all of it.
        most_files: of the folder; the oldest ones go where there are more.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, fresh = tempfile.mkstemp(prefix=".", dir=path.parent)  # mode 0600, never through a link
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(fresh, path)
        except OSError:
            with suppress(OSError):
                os.unlink(fresh)
            return False
    except OSError:
        return False
    if most_files is not None:
        _trim(path.parent, most_files)
    return True


def _trim(folder: Path, most: int) -> None:
    with suppress(OSError):
        files = [(entry.stat().st_mtime_ns, entry.path) for entry in os.scandir(folder) if entry.is_file()]
        for _, path in sorted(files)[: max(len(files) - most, 0)]:
            with suppress(OSError):
                os.unlink(path)
