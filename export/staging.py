"""A bundle in the making: parts written one by one to a staging folder, a journal, and a rename when all is there.

An interrupted build leaves `NAME.partial` behind; the next build of the same thing takes over each part whose hashes
stand, and writes the others again. Knows nothing of models.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from framefusion.errors import InterruptedBuildError, StorageError
from framefusion.runtime.bundle import FileRecord, file_record
from framefusion.runtime.records import from_json, to_json

JOURNAL = "journal.json"
LOCK = ".lock"
_SPARE = 1 << 24  # bytes beyond the plan: graphs, manifest, journal


def identity(*values: Any) -> str:
    """A hash over everything that decides what a build writes."""
    return hashlib.sha256(json.dumps(to_json(list(values)), sort_keys=True, default=str).encode()).hexdigest()


class Staging:
    """The staging folder of one output, locked against a second build.

    Args:
        output: the bundle to be.
        key: `identity` of the build; parts of another one are not taken over.
        force: replace an output that exists.

    Raises:
        StorageError: the output exists, its place cannot be written, or another build holds it.
    """

    def __init__(self, output: Path, key: str, *, force: bool) -> None:
        if output.exists() and not force:
            raise StorageError(f"{output} exists: choose another place or say --force to replace it")
        self.output, self.key = output, key
        self.folder = output.with_name(output.name + ".partial")
        self._parts: dict[str, dict[str, FileRecord]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder / LOCK)
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be written ({error.strerror}): choose another place") from None
        self._take_over()

    @property
    def files(self) -> dict[str, FileRecord]:
        """Files of all complete parts."""
        return {name: record for files in self._parts.values() for name, record in files.items()}

    def is_complete(self, part: str) -> bool:
        """Whether a part was written before and its files are what they were."""
        return part in self._parts

    def check_space(self, sizes: Mapping[str, int]) -> None:
        """Refuse a disk that cannot hold the parts that are still to be written; `sizes` is bytes by part."""
        missing = sum(size for part, size in sizes.items() if part not in self._parts) + _SPARE
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise StorageError(
                f"the build writes {missing / 1e9:.2f} GB to {self.folder.parent}, {free / 1e9:.2f} GB are free: "
                "make room or choose another place"
            )

    def write(self, part: str, produce: Callable[[Path], list[str]]) -> None:
        """Produce a part unless it is complete. `produce` gets the folder and returns the names of its files."""
        if part in self._parts:
            return
        with self._explained(part):
            names = produce(self.folder)
            self._parts[part] = {name: file_record(self.folder / name) for name in names}
            self._save()

    def publish(self) -> None:
        """Give the folder its name; what stood there goes, after the new one is complete."""
        with self._explained("rename"):
            for name in (JOURNAL, LOCK):
                (self.folder / name).unlink(missing_ok=True)
            if self.output.exists():
                old = self.output.with_name(self.output.name + ".old")
                shutil.rmtree(old, ignore_errors=True)
                os.replace(self.output, old)
                os.replace(self.folder, self.output)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(self.folder, self.output)
        self._lock.close()

    @contextmanager
    def _explained(self, part: str) -> Iterator[None]:
        """Turn Ctrl-C and a full disk into errors of their own kind."""
        done = f"{len(self._parts)} complete parts stay in {self.folder}; run the same command to resume"
        try:
            yield
        except KeyboardInterrupt:
            raise InterruptedBuildError(f"interrupted while writing {part}: {done}") from None
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror or error)
            raise StorageError(f"{part} could not be written, {reason}: {done} after making room") from None

    def _take_over(self) -> None:
        """Keep the parts of an earlier try whose hashes stand; remove all else."""
        try:
            journal = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            journal = {}
        if journal.get("key") == self.key:
            for part, files in journal["parts"].items():
                records = {name: from_json(FileRecord, record) for name, record in files.items()}
                if all(_stands(self.folder / name, record) for name, record in records.items()):
                    self._parts[part] = records
        keep = {self.folder / name for name in (*self.files, LOCK)}
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in keep:
                path.unlink()

    def _save(self) -> None:
        text = json.dumps({"key": self.key, "parts": to_json(self._parts)})
        fresh = self.folder / (JOURNAL + ".new")
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, self.folder / JOURNAL)


def _stands(path: Path, record: FileRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.size and file_record(path) == record


def _lock(path: Path) -> IO[str]:
    handle = path.open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise StorageError(f"another build is writing {path.parent}: wait for it or choose another place") from None
    return handle
