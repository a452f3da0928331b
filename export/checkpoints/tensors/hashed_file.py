"""A new file, hashed while it is written and safe on the disk when it is closed: nobody has to read it again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType

from framefusion.runtime.format.manifest import FileRecord


class HashedFile:
    """A file to be written from begin to end. A context manager; `record` holds once it was left.

    Raises:
        OSError: the disk is full, the folder cannot be written, or anything has that name, a link too.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self.position = 0

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())  # a journal must not name what a power cut can take away
        finally:
            self._file.close()

    def write(self, content: bytes | memoryview) -> int:
        """Append some bytes and return their number."""
        self._digest.update(content)
        self._file.write(content)
        self.position += len(content)
        return len(content)

    def align(self, boundary: int) -> int:
        """Append zeros up to a multiple of `boundary`, and return the position."""
        self.write(bytes(-self.position % boundary))
        return self.position

    @property
    def record(self) -> FileRecord:
        """Size and hash of what was written."""
        return FileRecord(self.position, self._digest.hexdigest())
