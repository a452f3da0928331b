"""Changes to a published bundle, all of them or none: engines that are added, graphs that go.

    1. begin   a journal in the bundle; everything is written to its scratch folder
    2. commit  the journal names what moves into place and what goes: from here on the change is carried out, by the
               next command if this process is killed
    3. finish  moves, the manifest last; removals; the journal goes

Until 2 the bundle is what it was. What is removed and what is refused follows journal.py.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from framefusion.errors import StorageError
from framefusion.export.writing import journal as journals
from framefusion.export.writing.journal import JOURNAL, LOCK, SCRATCH, Journal
from framefusion.export.writing.staging import lock
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest_file import MANIFEST
from framefusion.storage import files

_UNWRITABLE = files.FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}


class Amendment:
    """One change of a bundle. A context manager that lets no other process write the bundle meanwhile.

    Args:
        folder: the bundle.

    Raises:
        BundleError: it is none.
        StorageError: it cannot be written, another process writes it, or its folder is not as its manifest says.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._journal = Journal(self._folder)
        self.scratch = self._folder / SCRATCH

    def __enter__(self) -> Amendment:
        folder = self._folder
        journals.tidy(folder)
        if not (folder / MANIFEST).is_file():
            Bundle(folder)  # says what is wrong
        try:
            self._lock = lock(folder / LOCK)
        except OSError as error:
            raise StorageError(f"{folder} cannot be written ({error.strerror}): copy it to a place of yours") from None
        try:
            self._begin()
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise self._unwritten(error) from None
            raise
        return self

    def _begin(self) -> None:
        manifest = journals.valid_manifest(self._folder)
        if manifest is None:
            Bundle(self._folder, verify=False)  # says what is wrong
            raise StorageError(f"{self._folder} is made of links to files elsewhere: compile a copy (cp -rL)")
        self._named = journals.names_of(self._folder, manifest)
        for name in (JOURNAL, SCRATCH):
            if os.path.lexists(self._folder / name):
                self._refuse(name)
        try:
            self._journal.save()
            self._journal.open_scratch()
        except BaseException:
            self._journal.close()
            raise

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        """Carry out what was committed, or leave the bundle as it was; a full disk is an error of its own kind."""
        try:
            journals.finish(self._journal)
        except OSError as problem:
            raise self._unwritten(problem) from None
        finally:
            self._lock.close()
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise self._unwritten(error) from None

    def refuse_foreign(self, names: Iterable[str]) -> None:
        """Refuse what stands under these names and is not the bundle's own.

        Raises:
            StorageError: a file, a folder or a link does.
        """
        for name in names:
            try:
                place = files.place_inside(self._folder, name)
            except ValueError as error:
                raise StorageError(f"{self._folder}: {error}: move it away") from None
            if os.path.lexists(place) and (name not in self._named or files.is_real_folder(place)):
                self._refuse(name)

    def commit(self, moves: Collection[str], removes: Collection[str]) -> None:
        """Say what the change is; it is carried out when the body ends.

        Args:
            moves: names of files in the scratch folder, which replace those that the bundle has under these names.
            removes: files of the bundle that go; names that the manifest has.

        Raises:
            StorageError: a file that is not the bundle's own stands in the way, or the disk is full.
        """
        self.refuse_foreign(moves)
        self._journal.moves = tuple(moves)
        self._journal.removes = tuple(removes)
        try:
            self._journal.save()
        except OSError as error:
            self._journal.moves = ()
            self._journal.removes = ()
            raise self._unwritten(error) from None

    def _refuse(self, name: str) -> None:
        raise StorageError(f"{self._folder / name} is in the way and not the bundle's own: move it away")

    def _unwritten(self, error: OSError) -> StorageError:
        return StorageError(f"{error.filename or self._folder} cannot be written ({error.strerror}): make room")

    def _close(self) -> None:
        files.remove_file(self._folder / LOCK)
        self._lock.close()
