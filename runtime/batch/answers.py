"""The answers of a batch: a line of JSON each, written as it comes, and found again by the next run.

A line is there whole or not at all: what a killed run left of one is cut off. Beside OUT.jsonl stands OUT.jsonl.batch,
which says of what bundle and settings the answers are, so that no run goes on with others. Knows no question.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from framefusion.errors import StorageError
from framefusion.storage.files import output_path, read_file, write_all, write_file

SETTINGS = ".batch"
SYNC_EVERY = 64
"""Lines between two waits for the disk: a killed process loses nothing, a machine without power this much."""
_SETTINGS_BYTES = 1 << 20
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_OPENAI_ID = "custom_id"


class AnswerFile:
    """The answers of one part of a batch, open for more; nobody else writes to them meanwhile.

    Args:
        path: of the file; it may be there, of a run with the same settings.
        settings: that make an answer what it is, as JSON takes them.
        retry_errors: forget the errors that are there.

    Raises:
        StorageError: the place cannot be written, is of other settings, holds something else, or another run is at it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], retry_errors: bool = False) -> None:
        self.path = output_path(path, SETTINGS)
        self.done: set[str] = set()
        self.errors = 0
        self._closing = ExitStack()
        self._lines = 0
        try:
            # 1. Whose file it is: ours, of the same settings, or nobody's.
            self._take(settings)
            # 2. What is answered; the last line may be half a one.
            kept, size = self._answered(retry_errors)
            if retry_errors and self.errors:
                write_file(self.path, b"".join(kept))
                size = self.path.stat().st_size
                self.errors = 0
            # 3. Go on behind it.
            self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | _FLAGS, 0o666)
            self._closing.callback(os.close, self._handle)
            os.ftruncate(self._handle, size)
            os.lseek(self._handle, 0, os.SEEK_END)
        except OSError as error:
            self._closing.close()
            raise StorageError(f"{self.path} cannot be written ({error.strerror}): choose another place") from error
        except BaseException:
            self._closing.close()
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.close()

    def _take(self, settings: Mapping[str, Any]) -> None:
        """The settings' file, held as long as this run lasts."""
        beside = self.path.with_name(self.path.name + SETTINGS)
        content = json.dumps(settings, sort_keys=True, indent=1).encode()
        if self.path.exists() and not self.path.is_file():  # a device may be read without end
            raise StorageError(f"{self.path} is no plain file: choose another place")
        if not beside.exists() and self.path.exists() and self.path.stat().st_size:
            raise StorageError(f"{self.path} is there, and of no batch: choose another place, or move it away")
        self._hold(beside)
        if not beside.stat().st_size:  # new, and nobody else's from now on
            write_all(self._held, content)
        try:
            earlier: Any = json.loads(read_file(beside, _SETTINGS_BYTES))
        except ValueError:
            earlier = None
        if not isinstance(earlier, dict):
            raise StorageError(f"{beside} is no file of a batch: choose another place, or move it away")
        given = json.loads(content)
        differing = sorted(name for name in given.keys() | earlier.keys() if given.get(name) != earlier.get(name))
        if differing:
            name = differing[0]
            raise StorageError(
                f"the answers in {self.path} are of other settings, {name} was {earlier.get(name)!r:.80} and is "
                f"{given.get(name)!r:.80}: ask as before, or choose another place"
            )

    def _hold(self, beside: Path) -> None:
        """Shut out every other run until this one ends; of several that begin at once, one gets it."""
        self._held = os.open(beside, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
        self._closing.callback(os.close, self._held)
        try:
            import fcntl
        except ImportError:  # Windows has none
            return
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"another run writes to {self.path}: wait for it, or choose another place") from None

    def _answered(self, retry_errors: bool) -> tuple[list[bytes], int]:
        """Whole lines that stay, and the bytes until the end of the last whole one."""
        kept: list[bytes] = []
        size = 0
        if not self.path.exists():
            return kept, size
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # a run ended while it wrote
                size += len(line)
                try:
                    row = json.loads(line)
                    identity = str(row[_OPENAI_ID] if _OPENAI_ID in row else row["id"])
                except (ValueError, TypeError, KeyError):
                    raise StorageError(
                        f"{self.path}, line {number} is no answer of a batch: remove it, or choose another place"
                    ) from None
                failed = bool(row.get("error"))
                self.errors += failed
                if not (failed and retry_errors):
                    self.done.add(identity)
                    kept.append(line)
        return kept, size

    def add(self, identity: str, row: Mapping[str, Any]) -> None:
        """Write an answer.

        Raises:
            StorageError: the disk is full.
        """
        try:
            line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()
        except UnicodeEncodeError:  # a name that is not UTF-8, half a surrogate pair: JSON can say it in ASCII
            line = json.dumps(row, separators=(",", ":")).encode()
        try:
            write_all(self._handle, line + b"\n")
            self._lines += 1
            if self._lines % SYNC_EVERY == 0:
                os.fsync(self._handle)
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written ({error.strerror}): make room, and run the same command again"
            ) from error
        self.done.add(identity)
        self.errors += bool(row.get("error"))
