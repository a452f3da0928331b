"""A cache of compiled engines, shared by processes: what was compiled once for the same inputs is not compiled again.

    entries/KEY.json     what the engine was compiled from (the components of its key) and what came out
    objects/SHA256       the engine, by its content
    building/KEY.lock    held while the engine of a key is compiled, read or evicted; KEY.new beside it is unfinished
    timing/NAME          timing caches, where the library has them

KEY is a hash over named components; where no entry has it, the report names the components in which the nearest entry
differs. Knows no library and no bundle: its callers give the components and a function that writes the file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framefusion.errors import StorageError
from framefusion.export.writing.staging import identity
from framefusion.runtime.format.bundle_files import sha256_of
from framefusion.runtime.format.manifest import FileRecord
from framefusion.runtime.machine.user_cache import user_cache
from framefusion.storage import files
from framefusion.storage.records import RecordError, from_json, to_json

_OBJECTS = "objects"  # the lock of what several entries may name
_POLL = 0.1  # seconds between two looks at a lock that another process holds
_HASH = re.compile(r"[0-9a-f]{64}")
_LARGEST_ENTRY = 1 << 26  # bytes
_MOST_DIFFERENCES = 3  # components that differ, beyond which nothing is called near

Components = Mapping[str, Any]
Compile = Callable[[Path], tuple[Mapping[str, Any], FileRecord | None]]
"""Writes an engine to a path; returns plain facts of it, which the entry keeps, and its record where it was hashed."""


@dataclass(frozen=True)
class CachedEngine:
    """An engine that is there."""

    key: str
    components: Mapping[str, Any]
    file: FileRecord
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fetched:
    """What came of asking for an engine."""

    entry: CachedEngine
    hit: bool
    reason: str  # "hit", or "miss: version 1.7.0 -> 1.7.1"


def default_folder() -> Path:
    """The cache of this user."""
    return user_cache("engines")


def key_of(components: Components) -> str:
    """The hash of everything that decides an engine's bytes."""
    return identity(components)


class EngineCache:
    """A cache in a folder.

    Args:
        folder: created with its parents.
        limit: bytes of engines that stay; the ones not used for longest go first.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._used: set[str] = set()  # keys that this job has used: they stay
        try:
            for name in ("entries", "objects", "building", "timing"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the engine cache {folder} cannot be written ({error.strerror}): give another --engine-cache"
            ) from None

    def find(self, components: Components) -> CachedEngine | None:
        """The entry of these components, if its file has the size it had; nothing is read of the file."""
        return self._whole(key_of(components))

    def fetch(
        self,
        components: Components,
        target: Path,
        compile_engine: Compile,
        on_wait: Callable[[], None] = lambda: None,
    ) -> Fetched:
        """Put an engine at `target`: out of the cache, or compiled into it first.

        Another process that compiles the same engine is waited for, and its engine is taken. A process that was
        killed leaves an unfinished file, which the next one replaces.

        Args:
            components: everything that decides the engine's bytes; what it is an engine of comes first.
            target: where it is to be; replaced in one step.
            compile_engine: called where the cache has none; `target`'s folder exists.
            on_wait: called, once or more often, while another process has the engine's lock; may raise.
        """
        key = key_of(components)
        self._used.add(key)
        with self._held(key, on_wait):
            entry = self._whole(key)
            if entry is not None and self._place(entry, target):
                os.utime(self._entry_file(key))
                return Fetched(entry, True, "hit")
            reason = "miss: the cached file is altered" if entry else f"miss: {self._why(components)}"
            with _storing(self.folder):
                entry = self._compile(key, components, compile_engine)
                self._place(entry, target, verify=False)
        return Fetched(entry, False, reason)

    def trim(self) -> int:
        """Evict what was not used for longest until the limit holds; returns the bytes that are left.

        What this job has used stays, and so does what another process holds.
        """
        entries = sorted(self._entries(), key=self._used_at)
        size = sum(entry.file.size for entry in entries)
        for entry in entries:
            if size <= self.limit:
                break
            if entry.key not in self._used and self._evict(entry):
                size -= entry.file.size
        return size

    def timing_cache(self, name: str) -> bytes | None:
        """The measurements that builds under this name share: library, version and device."""
        path = self.folder / "timing" / name
        return path.read_bytes() if path.is_file() else None

    def keep_timing_cache(self, name: str, content: bytes) -> None:
        """Store measurements; of two processes' the larger stays, which costs time at worst."""
        path = self.folder / "timing" / name
        with self._held(f"timing-{name}"), _storing(self.folder):
            if not path.is_file() or path.stat().st_size <= len(content):
                files.write_file(path, content)

    def _compile(self, key: str, components: Components, compile_engine: Compile) -> CachedEngine:
        """Compile to a file of the lock's holder, then name it by its content, then write the entry."""
        unfinished = self.folder / "building" / f"{key}.new"
        self._sweep(key)
        try:
            facts, file = compile_engine(unfinished)
            with unfinished.open("rb+") as written:
                os.fsync(written.fileno())  # the entry must not name what a power cut can take away
            entry = CachedEngine(
                key, components, file or FileRecord(unfinished.stat().st_size, sha256_of(unfinished)), facts
            )
            with self._held(_OBJECTS):
                os.replace(unfinished, self._object(entry))
                files.write_file(self._entry_file(key), json.dumps(to_json(entry)).encode())
        finally:
            self._sweep(key)
        return entry

    def _sweep(self, key: str) -> None:
        """Remove what a compilation left unfinished, a killed process's too: only the lock's holder is here."""
        for pattern in (f"{key}.new*", f".{key}.new*"):  # builders write beside their target
            for path in (self.folder / "building").glob(pattern):
                files.remove_file(path)

    def _place(self, entry: CachedEngine, target: Path, *, verify: bool = True) -> bool:
        """Bring an engine to its target by a link, or by a copy to another disk; False where its hash is not right."""
        source = self._object(entry)
        if verify and sha256_of(source) != entry.file.sha256:
            return False
        with _storing(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.new_file(target) as fresh:
                try:
                    os.link(source, fresh, follow_symlinks=False)
                except OSError:  # another disk, or one without links
                    shutil.copyfile(source, fresh)
        return True

    def _whole(self, key: str) -> CachedEngine | None:
        entry = _read(self._entry_file(key))
        if entry is None:
            return None
        path = self._object(entry)
        whole = path.is_file() and not path.is_symlink() and path.stat().st_size == entry.file.size
        return entry if whole else None

    def _why(self, components: Components) -> str:
        """What the nearest entry differs in."""
        requested = to_json(components)
        others = [(_differing(entry.components, requested), entry) for entry in self._entries()]
        others = [(names, entry) for names, entry in others if len(names) <= _MOST_DIFFERENCES]
        if not others:
            return "nothing like it was compiled before"
        first = next(iter(requested))  # says what it is an engine of: its own kind is nearer than another's
        names, entry = min(others, key=lambda other: (first in other[0], len(other[0]), -self._used_at(other[1])))
        if not names:
            return "its file is gone or truncated"
        return ", ".join(
            f"{name} {_short(entry.components.get(name))} -> {_short(requested.get(name))}" for name in names
        )

    def _evict(self, entry: CachedEngine) -> bool:
        try:
            with self._held(entry.key, _give_up), self._held(_OBJECTS):
                files.remove_file(self._entry_file(entry.key))
                if all(other.file.sha256 != entry.file.sha256 for other in self._entries()):
                    files.remove_file(self._object(entry))
        except BlockingIOError:
            return False
        return True

    def _used_at(self, entry: CachedEngine) -> float:
        path = self._entry_file(entry.key)
        return path.stat().st_mtime if path.exists() else 0.0

    def _entries(self) -> list[CachedEngine]:
        read = (_read(path) for path in sorted((self.folder / "entries").glob("*.json")))
        return [entry for entry in read if entry is not None]

    def _entry_file(self, key: str) -> Path:
        return self.folder / "entries" / f"{key}.json"

    def _object(self, entry: CachedEngine) -> Path:
        return self.folder / "objects" / entry.file.sha256

    @contextmanager
    def _held(self, key: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the lock of a key; the kernel lets go of it when its process ends, however that is."""
        path = self.folder / "building" / f"{key}.lock"
        while True:
            try:
                lock = files.hold(path)
                break
            except BlockingIOError:
                on_wait()
                time.sleep(_POLL)
            except OSError as error:
                raise StorageError(f"{path} cannot be locked ({error.strerror}): give another --engine-cache") from None
        try:
            yield
        finally:
            lock.close()


def _give_up() -> None:
    raise BlockingIOError


def _read(path: Path) -> CachedEngine | None:
    """An entry; None where there is none or it is not readable, which is as good as none.

    The names that it gives are hashes: what it stands for is within the cache.
    """
    try:
        entry = from_json(CachedEngine, json.loads(files.read_file(path, _LARGEST_ENTRY)))
    except (OSError, ValueError, RecordError, RecursionError):
        return None
    return (
        entry if entry.key == path.stem and _HASH.fullmatch(entry.key) and _HASH.fullmatch(entry.file.sha256) else None
    )


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys([*first, *second]) if first.get(name) != second.get(name)]


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) and not any(map(_nested, value)) else str(value)
    return text if len(text) <= 24 else f"{text[:8]}..."


def _nested(value: Any) -> bool:
    return isinstance(value, (list, dict))


@contextmanager
def _storing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"an engine could not be written to {folder} ({error.strerror or error}): make room, or give another "
            "place; engines that are complete stay in the cache"
        ) from None
