"""The only module that creates, replaces and removes files, so that nobody else's are ever harmed.

The rule of the whole project. Removed is only
  - what this run has made, and
  - what a journal or a manifest of ours, read and valid, names inside its own folder (export/writing/journal.py).
New files are created under free names (O_EXCL, O_NOFOLLOW) and get their name when they are complete. A link is never
followed, neither to write nor to remove. An output that would harm something else is refused by name before any work.

Knows no format: who calls says which names are its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from framefusion.errors import StorageError

NAME_BYTES = 255  # of one name, on every file system in use
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What a system says of a file that cannot grow: the disk, a quota or a limit is full."""
_CHUNK = 1 << 20
_CAREFUL = 0  # how files are opened: no link is followed, no FIFO waited for; Windows lacks most of these
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
    _CAREFUL |= getattr(os, _name, 0)
_HANDLES = "/proc/self/fd"
_AT_FDCWD = -100
_NOREPLACE = 1
_EXCHANGE = 2  # of renameat2(2)
_NOT_OFFERED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT})


# --- Names of outputs -------------------------------------------------------------------------------------------------


def output_path(path: Path, longest_suffix: str = "") -> Path:
    """The absolute path of an output whose name can be used.

    Args:
        path: as the user gave it.
        longest_suffix: of the names that stand beside it while it is made.

    Raises:
        StorageError: it is a link, has no name of its own (`.`, `..`, `/`), its name is too long, or what should be its
            folder is none.
    """
    name = path.name
    if name in ("", ".", ".."):
        raise StorageError(f"{str(path)!r} is no name for an output: give it a name of its own, such as {path}/bundle")
    room = NAME_BYTES - len(os.fsencode(longest_suffix))
    size = len(os.fsencode(name))
    if size > room:
        raise StorageError(f"the name {name[:40]}... has {size} bytes, at most {room} fit: choose a shorter one")
    if "\0" in str(path):
        raise StorageError(f"{str(path)!r} is no name of a file: it contains a zero byte")
    try:
        if path.is_symlink():
            raise StorageError(f"{path} is a link to {os.readlink(path)}: give the place itself, or another one")
        folder = path.parent.resolve()
        if ".." in path.parts and not path.parent.is_dir():  # resolved all the same, and then somewhere else
            raise StorageError(f"{path} cannot be written, {path.parent} is no folder: choose another place")
        nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not nearest.is_dir():
            raise StorageError(f"{path} cannot be written, {nearest} is no folder: choose another place")
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StorageError(f"{path} cannot be written ({reason}): choose another place") from None
    return folder / name


def place_inside(folder: Path, name: str) -> Path:
    """The path of a file that a journal or manifest names, inside its folder.

    Raises:
        ValueError: the name is absolute, not in its plain form, leads out of the folder, or through a link.
    """
    pure = PurePosixPath(name)
    plain = bool(name) and not pure.is_absolute() and str(pure) == name and not {".", ".."} & set(pure.parts)
    if not plain or "\0" in name:
        raise ValueError(f"{name!r} is no name inside a folder")
    place = folder
    for part in pure.parts[:-1]:
        place = place / part
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise ValueError(f"{name!r} leads through {place}, which is no folder of its own")
    return folder / name


def is_real_folder(path: Path) -> bool:
    """Whether a folder stands there, and no link to one."""
    return path.is_dir() and not path.is_symlink()


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_file(path: Path, limit: int) -> bytes:
    """A plain file of at most `limit` bytes. No link is followed, and no FIFO or device is waited for.

    Raises:
        OSError: there is none, it is something else, or it is larger.
    """
    handle = os.open(path, os.O_RDONLY | _CAREFUL)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise OSError(errno.EFBIG, f"no plain file of at most {limit} bytes", str(path))
        with open(handle, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(handle)


def foreign_entries(folder: Path, named: Collection[str]) -> list[str]:
    """What is in a folder beside the files named, relative to it. Folders that are empty hold nothing.

    Raises:
        OSError: a folder cannot be read.
    """
    entries = []

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail):
        here = os.path.relpath(place, folder)
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        names = [os.path.normpath(os.path.join(here, name)) for name in (*files, *links)]
        entries += [name for name in names if name not in named]
    return sorted(entries)


# --- Creating and replacing -------------------------------------------------------------------------------------------


def create_file(path: Path) -> int:
    """A handle of a new, empty file.

    Raises:
        FileExistsError: anything has the name, a link too.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _CAREFUL, 0o666)


def write_file(path: Path, content: bytes, *, scratch: Path | None = None) -> None:
    """Write a file whole or not at all; an old one stays until the new one is safe on the disk.

    What may be replaced is the caller's to know.

    Args:
        path: the file. A link or a folder of that name is refused.
        content: of the file.
        scratch: a folder on the same disk for the moment before a file is replaced; None takes a free name beside it.

    Raises:
        OSError: the disk is full, the folder cannot be written, or something else has the name. Nothing is left behind.
    """
    handle, name = _fresh(path.parent if scratch is None else scratch)
    try:
        write_all(handle, content)
        os.fsync(handle)
        if name is None and not os.path.lexists(path):
            _link(handle, path)
            return
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "no plain file", str(path))
        if name is None:
            name = free_name(path.parent if scratch is None else scratch)
            _link(handle, name)
        os.replace(name, path)
        name = None
    finally:
        os.close(handle)
        if name is not None:
            remove_file(name)


def write_all(handle: int, content: bytes) -> None:
    """Write every byte, or raise what the system says."""
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left[:_CHUNK]) :]


def free_name(folder: Path, prefix: str = ".framefusion-") -> Path:
    """A name that nothing has."""
    while os.path.lexists(path := folder / f"{prefix}{secrets.token_hex(6)}"):
        pass
    return path


def make_folder(path: Path) -> list[Path]:
    """Make a folder and those that lead to it; returns the ones that are new, the outermost first.

    Raises:
        OSError: the system refuses, or something else has the name.
    """
    missing = []
    for place in (path, *path.parents):
        if os.path.lexists(place):
            break
        missing.append(place)
    created = []
    for place in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster
            place.mkdir()
            created.append(place)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return created


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A free name beside `target` for a library that writes files by itself; it becomes `target` after the body.

    Whatever the body leaves under that name is removed when it fails.
    """
    fresh = free_name(target.parent, f".{target.name[:100]}-")
    try:
        yield fresh
        os.replace(fresh, target)
    finally:
        remove_file(fresh)


def _fresh(folder: Path) -> tuple[int, Path | None]:
    """A new file without a name where the system has such, else with a free one."""
    if hasattr(os, "O_TMPFILE") and os.path.isdir(_HANDLES):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | _CAREFUL, 0o666), None
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise
    name = free_name(folder)
    return create_file(name), name


def _link(handle: int, path: Path) -> None:
    """Give a file without a name one that is free."""
    os.link(f"{_HANDLES}/{handle}", path, src_dir_fd=handle, follow_symlinks=True)  # linkat(2), which follows it


# --- Renaming ---------------------------------------------------------------------------------------------------------


def rename_new(source: Path, target: Path) -> None:
    """Rename where nothing has the new name.

    Raises:
        FileExistsError: something has it.
    """
    if _renameat2(source, target, _NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    return _renameat2(first, second, _EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    rename: Callable[..., int] | None = getattr(library, "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


# --- Removing ---------------------------------------------------------------------------------------------------------


def remove_file(path: Path) -> None:
    """Remove a file or a link, not what it leads to; nothing where there is none."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_named(folder: Path, names: Iterable[str]) -> None:
    """Remove files of a folder by name, and the folders within it that are empty then.

    Raises:
        ValueError: a name leads out of the folder; nothing is removed.
    """
    places = [place_inside(folder, name) for name in names]
    for place in places:
        remove_file(place)
    for parent in sorted({parent for place in places for parent in place.parents}, reverse=True):
        if folder in parent.parents:
            remove_empty(parent)


def remove_empty(folder: Path) -> bool:
    """Remove a folder that is empty; whether it is gone."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def remove_empty_within(folder: Path) -> None:
    """Remove the folders within one that are empty, and those that are then."""
    for place, _, _ in os.walk(folder, topdown=False):
        if Path(place) != folder:
            remove_empty(Path(place))


def remove_scratch(folder: Path) -> None:
    """Remove a scratch folder with all that is in it; links in it are removed and not followed."""
    if is_real_folder(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.is_symlink():
        remove_file(folder)


# --- Locks ------------------------------------------------------------------------------------------------------------


def hold(path: Path) -> IO[bytes]:
    """A file that this process has locked while it is open; it stays empty.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made, is a link, or holds something: then it is no lock.
    """
    import fcntl  # Windows has none; there only ff-run works, which locks nothing

    while True:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT | _CAREFUL, 0o666), "rb")  # noqa: SIM115  the caller closes it
        try:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size:
                raise OSError(errno.EEXIST, "no lock of ours has this name", str(path))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(status, os.lstat(path)):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # who held it has removed it meanwhile: lock the next one
