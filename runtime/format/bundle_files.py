"""The files of a bundle as a stranger may have left them: within the folder, regular, of the recorded size and hash.

A hash is not computed again while the very file stands: its device, inode, size and times are those that were hashed.
That is kept in the user's own cache, never in the bundle, so it neither travels with a copy nor can a bundle bring it.
Times alone prove nothing: anyone may set the time of a modification, but not the time at which that was done (ctime).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from framefusion.errors import BundleError
from framefusion.runtime.machine.user_cache import read_private, user_cache, write_private
from framefusion.storage.bounded_json import JsonError, parse_json
from framefusion.storage.records import name_problem

if TYPE_CHECKING:
    from framefusion.runtime.format.manifest import FileRecord

VERIFIED = "verified"  # folder of the user's cache
MOST_MEMOS = 512  # bundles whose hashes are remembered
_MEMO_BYTES = 1 << 24
_CHUNK = 1 << 22
_WAITLESS = 0  # how small files are opened: no FIFO is waited for; Windows has O_BINARY alone
for _name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
    _WAITLESS |= getattr(os, _name, 0)
_STABLE_AFTER = 2 * 10**9
"""Nanoseconds since its last change after which a file that changes again gets another ctime: clocks tick coarsely."""


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hash a file chunk by chunk; `progress` gets the number of bytes of each.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def place(folder: Path, name: str) -> Path:
    """The file that a manifest or a graph names, without a look at its size.

    Raises:
        BundleError: the name leaves the folder, by itself or through a link; or nothing is there, or no regular file.
    """
    problem = name_problem(name)
    if problem is not None:
        raise BundleError(
            f"{folder} names the file {ascii(name)[:80]}, {problem}: take the bundle from its source again"
        )
    path = folder / name
    root = os.path.realpath(folder)
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        raise BundleError(f"{path} is missing: copy the bundle again or rebuild it") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read ({error}): copy the bundle again or rebuild it") from None
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise BundleError(
            f"{path} is a link to {os.path.realpath(path)}, outside the bundle: copy the bundle with its files in it "
            "(cp -rL)"
        )
    if not stat.S_ISREG(kind):
        raise BundleError(f"{path} is no regular file: copy the bundle again or rebuild it")
    return path


def read_small(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file of bounded size; a FIFO or a device is refused and never waited for.

    Raises:
        OSError: it cannot be read.
        BundleError: it is too long, or no regular file.
    """
    handle = os.open(path, os.O_RDONLY | _WAITLESS)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise BundleError(f"{path} is no regular file: copy the bundle again or rebuild it")
        with open(handle, "rb", closefd=False) as file:
            content = file.read(most_bytes + 1)
    finally:
        os.close(handle)
    if len(content) > most_bytes:
        raise BundleError(f"{path} has more than {most_bytes} bytes, which is the limit: it is not of this package")
    return content


def check_sizes(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Compare the sizes of files with their records: at once, nothing is read.

    Raises:
        BundleError: a file is not there, not within the folder, or of another size.
    """
    for name, record in files.items():
        path = place(folder, name)
        size = path.stat().st_size
        if size != record.size:
            kind = "truncated" if size < record.size else "altered"
            raise BundleError(f"{path} is {kind}: {size} bytes, {record.size} expected; copy it again or rebuild")


def verify_files(folder: Path, files: Mapping[str, FileRecord], *, trust_stamps: bool = True) -> None:
    """Compare every file with its record; sizes of all first, because that is instant.

    Args:
        folder: the bundle.
        files: name -> record.
        trust_stamps: spare the hash of files that were right before and are the very same since.

    Raises:
        BundleError: a file is missing, truncated, altered, or not within the folder.
    """
    # 1. Sizes: a copy that broke off is refused before anything is read.
    check_sizes(folder, files)
    # 2. Hashes, but of files that were hashed before and are the very same since.
    memo = _memo(folder)
    known = _read(memo)
    stamps: dict[str, str] = {}
    for name, record in files.items():
        path = folder / name
        stamp = _stamp(path, record.sha256)
        if trust_stamps and known.get(name) == stamp:
            continue
        if sha256_of(path) != record.sha256:
            raise BundleError(f"{path} is altered: its sha256 is not the manifest's; copy it again or rebuild")
        # 3. A hash is remembered only where a later change would show in the stamp.
        if _is_stable(path) and _stamp(path, record.sha256) == stamp:
            stamps[name] = stamp
    if any(known.get(name) != stamp for name, stamp in stamps.items()):
        write_private(memo, json.dumps(known | stamps).encode(), MOST_MEMOS)


def _stamp(path: Path, sha256: str) -> str:
    """Device, inode, size, mtime and ctime in nanoseconds, and the hash that these bytes had."""
    status = path.stat()
    times = f"{status.st_mtime_ns}:{status.st_ctime_ns}"
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{times}:{sha256}"


def _is_stable(path: Path) -> bool:
    """Whether a change from now on gives the file another ctime."""
    return time.time_ns() - path.stat().st_ctime_ns > _STABLE_AFTER


def _memo(folder: Path) -> Path:
    """The file of the user's cache that remembers the hashes of a bundle."""
    place_of = os.path.realpath(folder).encode("utf-8", "surrogateescape")
    return user_cache(VERIFIED) / f"{hashlib.sha256(place_of).hexdigest()[:32]}.json"


def _read(memo: Path) -> dict[str, str]:
    content = read_private(memo, _MEMO_BYTES)
    try:
        known = {} if content is None else parse_json(content)
    except JsonError:
        return {}
    return known if isinstance(known, dict) else {}
