"""A bundle in the making: parts written one by one to a staging folder, a journal, and a rename when all is there.

An interrupted build leaves `NAME.partial` behind; the next build of the same thing takes over each part whose hashes
stand, and writes the others again. What is removed and what is refused follows journal.py. Knows nothing of models.

    1. write    a part into NAME.partial/.writing
    2. journal  its files and their hashes
    3. move     them to their places in NAME.partial
    4. publish  the folder under NAME; a bundle that stood there changes places with it in one step, then goes
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from framefusion.console.progress import Meter, Progress
from framefusion.errors import InterruptedBuildError, StorageError
from framefusion.export.writing import journal as journals
from framefusion.export.writing.journal import CHECKSUMS, JOURNAL, PARTIAL, SCRATCH, STAMPS, Journal, Replaced
from framefusion.export.writing.journal import LOCK as LOCK
from framefusion.runtime.bundle import file_record
from framefusion.runtime.format.bundle_files import sha256_of
from framefusion.runtime.format.manifest import FileRecord
from framefusion.runtime.format.manifest_file import MANIFEST
from framefusion.storage import files
from framefusion.storage.records import to_json

SPARE = 1 << 24  # bytes beyond the plan: graphs, manifest, journal
_LONGEST_SUFFIX = ".old-123456789abc"  # of the names that a build may need beside its output
_UNNAMED = (MANIFEST, CHECKSUMS, STAMPS)  # what a journal makes ours without naming it: written last, after all parts
_AWAY = "move it away, or choose another place"

Produced = Sequence[str] | Mapping[str, FileRecord]


def identity(*values: Any) -> str:
    """A hash over everything that decides what a build writes."""
    return hashlib.sha256(json.dumps(to_json(list(values)), sort_keys=True, default=str).encode()).hexdigest()


def check_output(output: Path, *, force: bool, checkpoint: Path | None = None) -> Path:
    """The absolute path of a bundle to be, after what a killed build left there was brought to an end.

    Args:
        output: as the user gave it.
        force: whether a bundle that exists may be replaced.
        checkpoint: what it is made of.

    Raises:
        StorageError: its name cannot be used, or what stands there must not be replaced. Nothing was written.
    """
    place = files.output_path(output, _LONGEST_SUFFIX)
    journals.tidy(place)
    if not os.path.lexists(place):
        return place
    if os.path.ismount(place):
        raise StorageError(f"{output} is where a disk is mounted, which cannot be renamed: choose {output}/bundle")
    if checkpoint is not None and place.is_dir() and place.samefile(checkpoint):
        raise StorageError(f"{output} is the checkpoint itself: choose another place")
    if not force:
        raise StorageError(f"{output} exists: choose another place or say --force to replace it")
    if not _is_empty_folder(place):
        manifest = journals.valid_manifest(place)
        if manifest is None:
            raise StorageError(f"{output} is no bundle, --force does not remove it: choose another place")
        journals.refuse_foreign(place, journals.names_of(place, manifest), f"--force does not remove that: {_AWAY}")
    return place


class Staging:
    """The staging folder of one output, locked against a second build. A context manager: however its body ends, no
    half-written file stays, only complete parts and the journal; nothing at all where no part is complete.

    Args:
        output: the bundle to be.
        key: `identity` of the build; parts of another one are not taken over.
        force: replace a bundle that exists.
        progress: called with the bytes that are hashed to find which parts of an earlier try stand.
        checkpoint: what the bundle is made of.

    Raises:
        StorageError: the output exists, its place cannot be written, NAME.partial is none of ours or holds foreign
            files, or another build holds it.
    """

    def __init__(
        self,
        output: Path,
        key: str,
        *,
        force: bool,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        self._force = force
        self.output = check_output(output, force=force, checkpoint=checkpoint)
        self.folder = self.output.with_name(self.output.name + PARTIAL)
        self._new_folders: list[Path] = []
        self._journal = Journal(self.folder, key)
        try:
            self._new_folders = files.make_folder(self.folder)
            self._refuse_foreign_folder()
            self._lock = lock(self.folder / LOCK)
        except OSError as error:
            self._remove_new_folders()
            raise StorageError(f"{self.folder} cannot be written ({error.strerror}): choose another place") from None
        self._inode = os.lstat(self.folder).st_ino
        try:
            self._take_over(progress)
        except BaseException as error:
            self._lock.close()
            if isinstance(error, OSError):
                raise StorageError(f"{self.folder} cannot be written ({error.strerror}): make room") from None
            raise

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Remove what is not complete, and turn Ctrl-C into an error that says how to go on."""
        done = self._done()
        try:
            if kind is not None and self._is_ours():
                self._leave()
            elif kind is not None and self.output.is_dir() and os.lstat(self.output).st_ino == self._inode:
                done = f"{self.output} is complete"
                journals.finish(self._journal_of_output())
        except OSError:
            pass  # a full disk, or a folder that is gone: the next command tidies
        finally:
            self._lock.close()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            raise InterruptedBuildError(f"interrupted: {done}") from None

    @property
    def files(self) -> dict[str, FileRecord]:
        """Path of each file of all complete parts -> its size and hash."""
        return self._journal.files

    @property
    def scratch(self) -> Path:
        """A folder for whatever is not to stay; emptied by the next build if this one is killed."""
        return self.folder / SCRATCH

    def check_space(self, sizes: Mapping[str, int]) -> None:
        """Refuse a disk that cannot hold the parts that are still to be written.

        Args:
            sizes: part -> bytes; "check" is the bundle that only the check needs.

        Raises:
            StorageError: with the bytes that are missing.
        """
        missing = sum(size for part, size in sizes.items() if part not in self._journal.parts) + SPARE
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

        Args:
            part: its name in the journal.
            produce: gets an empty folder and returns its files: their records where it hashed them on the way, else
                names.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        if part in self._journal.parts:
            return
        with self.writing(part):
            # 1. into the scratch folder, of which nothing survives a kill
            produced = produce(self.scratch)
            known = produced if isinstance(produced, Mapping) else {}
            records = {name: known.get(name) or file_record(self.scratch / name) for name in produced}
            # 2. the journal first: from here on these files are ours, wherever a kill finds them
            self._journal.parts[part] = records
            try:
                self._journal.save()
                # 3. to their places
                self._move(produced)
            except BaseException:
                files.remove_named(self.folder, self._journal.parts.pop(part))
                with suppress(OSError):  # a full disk: the next build sees by their hashes what stands
                    self._journal.save()
                raise

    def put(self, what: str, write: Callable[[Path], object], *names: str) -> None:
        """Write files that belong to no part: the manifest and what speaks of it.

        Args:
            what: for messages.
            write: gets an empty folder.
            names: of the files, in that folder.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        assert set(names) <= set(_UNNAMED)
        with self.writing(what):
            write(self.scratch)
            journals.move_into_place(self.folder, names)

    def forget(self, part: str) -> None:
        """Do not take a part over from an earlier try: what it says is of that try."""
        if part in self._journal.parts:
            files.remove_named(self.folder, self._journal.parts.pop(part))
            with self.writing(part):
                self._journal.save()

    def forget_files(self, names: Iterable[str]) -> None:
        """Remove files, and take over no part that all files of are among them."""
        gone = set(names)
        files.remove_named(self.folder, gone)
        for part, named in list(self._journal.parts.items()):
            if named.keys() <= gone:
                self.forget(part)

    def publish(self) -> None:
        """Give the folder its name; what stood there goes, after the new one is complete.

        Raises:
            StorageError: another build was faster, or foreign files are in the way.
        """
        # 1. what was true when the build began may not be now
        check_output(self.output, force=self._force)
        self._refuse_foreign_files()
        with self.writing("the finished bundle"):
            # 2. nothing but the bundle's files
            files.remove_file(self.folder / STAMPS)
            files.remove_empty_within(self.folder)
            self._journal.open_scratch()
            # 3. the name, in one step
            if os.path.lexists(self.output):
                self._replace_output()
            else:
                files.rename_new(self.folder, self.output)
            # 4. the old bundle goes, then the journal that says so
            journals.finish(self._journal_of_output())

    def _replace_output(self) -> None:
        """Exchange the two bundles in one step; where the system cannot, the old one has another name for a moment."""
        inode = os.lstat(self.output).st_ino
        self._journal.replaces = Replaced(self.folder.name, inode)
        self._journal.save()
        if files.exchange(self.folder, self.output):
            return
        self._journal.replaces = Replaced(journals.old_name(self.output), inode)
        self._journal.save()
        old = self.output.with_name(self._journal.replaces.name)
        files.rename_new(self.output, old)
        try:
            files.rename_new(self.folder, self.output)
        except BaseException:
            files.rename_new(old, self.output)
            raise

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn a full disk into an error that names what was written and how to go on.

        Raises:
            StorageError: in place of an OSError of the body.
        """
        try:
            yield
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror or error)
            raise StorageError(f"{what} could not be written, {reason}: make room; {self._done()}") from None

    def _done(self) -> str:
        if not self._journal.parts:
            return "nothing was complete yet, run the same command to start again"
        return f"{len(self._journal.parts)} complete part(s) stay in {self.folder}, run the same command to resume"

    def _refuse_foreign_folder(self) -> None:
        """Refuse a staging folder that no build of ours made: it holds neither a journal nor nothing."""
        if not files.is_real_folder(self.folder):
            raise StorageError(f"{self.folder} is a link, a build needs that name: {_AWAY}")
        if os.path.ismount(self.folder):
            raise StorageError(f"{self.folder} is where a disk is mounted, a build needs that name: {_AWAY}")
        started = set(os.listdir(self.folder)) <= {LOCK}
        if not started and Journal.read(self.folder) is None:
            raise StorageError(f"{self.folder} is in the way and no unfinished build of ours: {_AWAY}")

    def _refuse_foreign_files(self) -> None:
        named = {*self._journal.files, *_UNNAMED, LOCK, JOURNAL}
        journals.refuse_foreign(self.folder, named, f"a build needs that folder for itself: {_AWAY}")

    def _take_over(self, progress: Progress | None) -> None:
        """Keep the parts of an earlier try whose hashes stand; remove all else that it names."""
        earlier = Journal.read(self.folder)
        if earlier is None:
            try:
                self._journal.save()
                self._journal.open_scratch()
            except BaseException:
                self._leave()
                raise
            return
        self._journal.parts = earlier.parts
        self._refuse_foreign_files()
        self._journal.open_scratch()
        standing = self._standing(earlier.parts, progress) if earlier.key == self._journal.key else {}
        kept = {name for named in standing.values() for name in named}
        files.remove_named(self.folder, {*earlier.files, *_UNNAMED} - kept)
        self._journal.parts = standing
        self._journal.save()

    def _standing(
        self, parts: Mapping[str, dict[str, FileRecord]], progress: Progress | None
    ) -> dict[str, dict[str, FileRecord]]:
        total = sum(record.size for records in parts.values() for record in records.values())
        meter = Meter(progress, {"resuming": total})
        meter.begin("resuming")
        return {
            part: records
            for part, records in parts.items()
            if all(_stands(self.folder / name, record, meter) for name, record in records.items())
        }

    def _move(self, names: Iterable[str]) -> None:
        """Move files to their places, where nothing is."""
        for name in names:
            target = files.place_inside(self.folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            files.rename_new(self.scratch / name, target)
        self._journal.open_scratch()

    def _leave(self) -> None:
        """Leave complete parts and the journal; nothing where no part is complete."""
        files.remove_named(self.folder, _UNNAMED)
        if self._journal.parts:
            files.remove_scratch(self.scratch)
            return
        self._journal.close()
        files.remove_empty(self.folder)
        self._remove_new_folders()

    def _remove_new_folders(self) -> None:
        for folder in reversed(self._new_folders):
            files.remove_empty(folder)

    def _is_ours(self) -> bool:
        return files.is_real_folder(self.folder) and os.lstat(self.folder).st_ino == self._inode

    def _journal_of_output(self) -> Journal:
        journal = self._journal
        return Journal(self.output, journal.key, replaces=journal.replaces)


def _stands(path: Path, record: FileRecord, meter: Meter) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != record.size:
        return False
    meter.doing(f"comparing {path.parent.name}/{path.name}")
    return sha256_of(path, meter.add) == record.sha256


def lock(path: Path) -> IO[bytes]:
    """The file that holds a folder's lock while it is open.

    Raises:
        StorageError: another process holds it.
        OSError: the folder cannot be written.
    """
    try:
        return files.hold(path)
    except BlockingIOError:
        raise StorageError(f"another build is writing {path.parent}: wait for it or choose another place") from None


def _is_empty_folder(path: Path) -> bool:
    with suppress(OSError):
        return path.is_dir() and not any(path.iterdir())
    return False
