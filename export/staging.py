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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from framefusion.errors import InterruptedBuildError, StorageError
from framefusion.progress import Meter, Progress
from framefusion.runtime.bundle import MANIFEST, FileRecord, file_record, sha256_of
from framefusion.runtime.records import from_json, to_json

JOURNAL = "journal.json"
LOCK = ".lock"
SPARE = 1 << 24  # bytes beyond the plan: graphs, manifest, journal

Produced = Sequence[str] | Mapping[str, FileRecord]


def identity(*values: Any) -> str:
    """A hash over everything that decides what a build writes."""
    return hashlib.sha256(json.dumps(to_json(list(values)), sort_keys=True, default=str).encode()).hexdigest()


class Staging:
    """The staging folder of one output, locked against a second build. A context manager: however its body ends, no
    half-written file stays, only complete parts and the journal; nothing at all where no part is complete.

    Args:
        output: the bundle to be.
        key: `identity` of the build; parts of another one are not taken over.
        force: replace a bundle that exists.
        progress: told of the bytes that are hashed to see which parts of an earlier try stand.

    Raises:
        StorageError: the output exists, its place cannot be written, or another build holds it.
    """

    def __init__(self, output: Path, key: str, *, force: bool, progress: Progress | None = None) -> None:
        self.output, self.key, self._force = Path(os.path.abspath(output)), key, force
        self._check_output()
        self.folder = self.output.with_name(self.output.name + ".partial")
        self._parts: dict[str, dict[str, FileRecord]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.folder / LOCK)
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be written ({error.strerror}): choose another place") from None
        self._take_over(progress)

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Remove what is not complete, and turn Ctrl-C into an error that says how to go on."""
        if kind is not None and self.folder.exists():
            self._sweep()
            if not self._parts:
                shutil.rmtree(self.folder, ignore_errors=True)
            else:
                with suppress(OSError):  # a full disk: the next build writes again what the journal does not name
                    self._save()  # Ctrl-C may have come between a part and its line in the journal
        self._lock.close()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            raise InterruptedBuildError(f"interrupted: {self._done()}") from None

    @property
    def files(self) -> dict[str, FileRecord]:
        """Files of all complete parts."""
        return {name: record for files in self._parts.values() for name, record in files.items()}

    def check_space(self, sizes: Mapping[str, int]) -> None:
        """Refuse a disk that cannot hold the parts that are still to be written; `sizes` is bytes by part."""
        missing = sum(size for part, size in sizes.items() if part not in self._parts) + SPARE
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            checked = sizes.get("check", 0)
            part = f" ({checked / 1e9:.2f} GB of them for a bundle that only the check needs)" if checked else ""
            raise StorageError(
                f"the build writes {missing / 1e9:.2f} GB to {self.folder.parent}{part}, {free / 1e9:.2f} GB are free: "
                "make room or choose another place"
            )

    def write(self, part: str, produce: Callable[[Path], Produced]) -> None:
        """Produce a part unless it is complete.

        `produce` gets the folder and returns its files: their records where it hashed them on the way, else names.
        """
        if part in self._parts:
            return
        with self.writing(part):
            made = produce(self.folder)
            known = made if isinstance(made, Mapping) else {}
            self._parts[part] = {name: known.get(name) or file_record(self.folder / name) for name in made}
            self._save()

    def forget(self, part: str) -> None:
        """Do not take a part over from an earlier try: what it says is of that try."""
        if self._parts.pop(part, None) is not None:
            self._save()

    def forget_files(self, names: Iterable[str]) -> None:
        """The same for each part that all files of are among these."""
        for part in [part for part, files in self._parts.items() if files.keys() <= set(names)]:
            self.forget(part)

    def publish(self) -> None:
        """Give the folder its name; what stood there goes, after the new one is complete."""
        self._check_output()  # another build may have been faster
        with self.writing("the finished bundle"):
            if self.output.exists():
                self._replace_output()
            else:
                os.replace(self.folder, self.output)
            for name in (JOURNAL, LOCK):
                (self.output / name).unlink(missing_ok=True)

    def _replace_output(self) -> None:
        old = self.output.with_name(self.output.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(self.output, old)
        try:
            os.replace(self.folder, self.output)
        except BaseException:
            os.replace(old, self.output)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _check_output(self) -> None:
        """Refuse an output that exists, unless it is a bundle that may be replaced."""
        if not self.output.exists():
            return
        if not self._force:
            raise StorageError(f"{self.output} exists: choose another place or say --force to replace it")
        if not (self.output / MANIFEST).is_file() and not _is_empty_folder(self.output):
            raise StorageError(f"{self.output} is no bundle, --force does not remove it: choose another place")

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn a full disk into an error of its own kind."""
        try:
            yield
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror or error)
            raise StorageError(f"{what} could not be written, {reason}: make room; {self._done()}") from None

    def _done(self) -> str:
        if not self._parts:
            return "nothing was complete yet, run the same command to start again"
        return f"{len(self._parts)} complete part(s) stay in {self.folder}, run the same command to resume"

    def _take_over(self, progress: Progress | None) -> None:
        """Keep the parts of an earlier try whose hashes stand; remove all else."""
        try:
            journal = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            journal = {}
        if journal.get("key") == self.key:
            parts = {
                part: {name: from_json(FileRecord, record) for name, record in files.items()}
                for part, files in journal["parts"].items()
            }
            total = sum(record.size for records in parts.values() for record in records.values())
            meter = Meter(progress, {"resuming": total})
            meter.begin("resuming")
            for part, records in parts.items():
                if all(_stands(self.folder / name, record, meter) for name, record in records.items()):
                    self._parts[part] = records
        self._sweep()

    def _sweep(self) -> None:
        """Remove what belongs to no complete part; on the way up, so that folders are empty when their turn comes."""
        keep = {self.folder / name for name in (*self.files, LOCK)}
        if self._parts:
            keep.add(self.folder / JOURNAL)
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):  # not empty
                    path.rmdir()
            elif path not in keep:
                path.unlink()

    def _save(self) -> None:
        text = json.dumps({"key": self.key, "parts": to_json(self._parts)})
        fresh = self.folder / (JOURNAL + ".new")
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, self.folder / JOURNAL)


def _stands(path: Path, record: FileRecord, meter: Meter) -> bool:
    if not path.is_file() or path.stat().st_size != record.size:
        return False
    meter.doing(f"comparing {path.parent.name}/{path.name}")
    return sha256_of(path, meter.add) == record.sha256


def lock(path: Path) -> IO[str]:
    """Hold a file's lock while its handle is open; refused where another process holds it."""
    handle = path.open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise StorageError(f"another build is writing {path.parent}: wait for it or choose another place") from None
    return handle


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
