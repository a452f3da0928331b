"""The answers of an evaluation on disk: kept one by one as they come, taken up again, and written as one file at last.

    FILE.partial   the evaluation's identity, then one JSON object an answer: what an interrupted run leaves behind
    FILE           identity, report and all answers as one JSON object, put in place in one step

Knows neither models nor right and wrong.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from framefusion.errors import EvaluationError, InterruptedBuildError, StorageError
from framefusion.export.evaluate.answering import Answer, Condition
from framefusion.storage import files

FORMAT = 1
PARTIAL = ".partial"
_LARGEST = 1 << 32  # bytes of an evaluation

Key = tuple[str, str, float]
"""Question, reducer, cost."""


class AnswerFile:
    """The answers that are there, and where new ones are kept. A context manager, which locks the file.

    Args:
        output: FILE; None keeps answers in memory alone.
        identity: of the evaluation, as plain values: answers of another one are refused.

    Raises:
        EvaluationError: FILE or FILE.partial holds another evaluation, or none.
        StorageError: they cannot be written, or another run writes them.
    """

    def __init__(self, output: Path | None, identity: Mapping[str, Any]) -> None:
        self.output = output
        self.identity = {"format": FORMAT, **identity}
        self.answers: dict[Key, Answer] = {}
        self.engine: str | None = None  # that gave the answers; None before the first
        self.note: str | None = None
        self._file: int | None = None  # the handle of FILE.partial

    def __enter__(self) -> AnswerFile:
        if self.output is None:
            return self
        if self.output.is_dir():
            raise StorageError(f"{self.output} is a folder: give -o a file, such as accuracy.json")
        self._output = files.output_path(self.output, PARTIAL)
        self._partial = self._output.with_name(self._output.name + PARTIAL)
        self._read_output()
        self._file = self._opened()
        try:
            self._take_over(self._file)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let go of the file, and turn Ctrl-C into an error that says how to go on."""
        kept = self._file is not None and self.answers
        self._close()
        if kept and kind is not None and issubclass(kind, KeyboardInterrupt):
            raise InterruptedBuildError(
                f"interrupted: {len(self.answers)} answers are kept in {self._partial.name}, the same command goes on"
            ) from None

    def missing(self, question: str, conditions: Sequence[Condition]) -> list[Condition]:
        """Conditions under which a question has no answer yet."""
        return [
            condition for condition in conditions if (question, condition.reducer, condition.cost) not in self.answers
        ]

    def add(self, question: str, conditions: Sequence[Condition], answers: Iterable[Answer]) -> None:
        """Keep the answers to a question, one for each condition: they outlive this process, however it ends.

        Raises:
            StorageError: they cannot be written; what was there stays as it was.
        """
        rows = []
        for condition, answer in zip(conditions, answers, strict=True):
            self.answers[question, condition.reducer, condition.cost] = answer
            rows.append(_row(question, condition, answer))
        if self._file is not None:
            size = os.fstat(self._file).st_size
            try:
                if not size:  # by itself: a process that is killed must not leave half of what makes the file ours
                    files.write_all(self._file, _line(self._head()))
                files.write_all(self._file, b"".join(map(_line, rows)))
            except OSError as error:
                os.ftruncate(self._file, size)
                raise StorageError(f"{self._partial} cannot be written ({error.strerror}): free space") from None

    def opened(self, engine: str, note: str | None) -> None:
        """Note what gives the answers from now on.

        Raises:
            EvaluationError: another engine gave those that are there.
        """
        if self.engine not in (None, engine):
            raise self._other("engine", self.engine, engine)
        self.engine = engine
        self.note = note

    def finish(self, report: Mapping[str, Any]) -> None:
        """Put the report and all answers in FILE.

        Raises:
            StorageError: FILE cannot be written; the answers stay in FILE.partial.
        """
        if self.output is None:
            return
        rows = [_row(key[0], Condition(*key[1:]), answer) for key, answer in self.answers.items()]
        lines = ",\n    ".join(json.dumps(row) for row in rows)
        head = json.dumps(self._head() | {"report": report}, indent=2)[: -len("\n}")]
        content = f'{head},\n  "answers": [\n    {lines}\n  ]\n}}\n'
        try:
            if os.path.lexists(self._output) and not self._had_output:
                raise FileExistsError(errno.EEXIST, "another program has written it meanwhile")
            files.write_file(self._output, content.encode("utf-8"))
        except OSError as error:
            raise StorageError(
                f"{self.output} cannot be written ({error.strerror}): free space; the answers stay in "
                f"{self._partial.name}, the same command goes on"
            ) from None
        self._remove_partial()

    def _head(self) -> dict[str, Any]:
        return self.identity | {"engine": self.engine, "note": self.note}

    def _close(self) -> None:
        if self._file is None:
            return
        if os.fstat(self._file).st_size == 0:
            self._remove_partial()
        os.close(self._file)
        self._file = None

    def _remove_partial(self) -> None:
        """Remove FILE.partial if it is still the file that this process has open."""
        assert self._file is not None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(self._partial), os.fstat(self._file)):
                files.remove_file(self._partial)

    def _opened(self) -> int:
        """The handle of FILE.partial, locked; nothing in it is changed."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            handle = os.open(self._partial, flags, 0o666)
        except OSError as error:
            raise StorageError(f"{self._partial} cannot be written ({error.strerror}): choose another file") from None
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise StorageError(f"{self._partial} is no plain file: move it away, or choose another file with -o")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise StorageError(f"another run writes {self._partial}: wait for it or choose another file") from None
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _read_output(self) -> None:
        """Take the answers of FILE; refuse what is no evaluation, because it would be replaced."""
        self._had_output = os.path.lexists(self._output)
        if not self._had_output:
            return
        whole, rows = _whole(self._output, f"{self.output} is no evaluation: choose another file with -o")
        self._take(self._output, whole, rows)

    def _take_over(self, handle: int) -> None:
        """Take the answers of FILE.partial, and cut off the half of an answer that a killed process left."""
        with open(handle, "rb", closefd=False) as partial:
            *lines, torn = partial.read().split(b"\n")
        try:
            objects = [json.loads(line) for line in lines]
            if not objects and not torn:
                return
            head, *rows = objects
        except (ValueError, RecursionError):
            raise EvaluationError(f"{self._partial} is no evaluation: move it away or choose another file") from None
        self._take(self._partial, head, rows)
        if torn:
            os.ftruncate(handle, sum(len(line) + 1 for line in lines))

    def _take(self, path: Path, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        if not isinstance(head, Mapping):
            raise EvaluationError(f"{path} is no evaluation: move it away or choose another file")
        for name, mine in self.identity.items():
            if head.get(name) != mine:
                raise self._other(name, head.get(name), mine)
        self.answers |= _answers(path, rows)
        self.opened(str(head.get("engine")), head.get("note"))

    def _other(self, name: str, theirs: object, mine: object) -> EvaluationError:
        if isinstance(theirs, dict) and isinstance(mine, dict):
            name = next(part for part in mine if theirs.get(part) != mine[part])
            theirs = theirs.get(name)
            mine = mine[name]
        return EvaluationError(
            f"{self.output} holds another evaluation, its {name} is {theirs!r}, asked is {mine!r}: "
            "choose another file with -o, or remove it and what stands beside it as .partial"
        )


def read_answers(path: Path) -> tuple[Mapping[str, Any], dict[Key, Answer]]:
    """What a finished evaluation says of itself, and its answers.

    Raises:
        EvaluationError: the file holds none.
    """
    whole, rows = _whole(path, f"{path} is no evaluation: give a file that `ff-export eval -o` has written")
    return whole, _answers(path, rows)


def _whole(path: Path, otherwise: str) -> tuple[dict[str, Any], list[Any]]:
    """A finished evaluation without its answers, and these; `otherwise` is said of any other file."""
    try:
        whole = json.loads(files.read_file(path, _LARGEST))
        rows = whole.pop("answers")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise EvaluationError(otherwise) from None
    return whole, rows


def _answers(path: Path, rows: Sequence[Mapping[str, Any]]) -> dict[Key, Answer]:
    answers: dict[Key, Answer] = {}
    try:
        for row in rows:
            fields = {name: value for name, value in row.items() if name not in ("question", "reducer", "cost")}
            answer = Answer(**{**fields, "outcomes": tuple(fields.get("outcomes", ()))})
            answers[row["question"], row["reducer"], row["cost"]] = answer
    except (KeyError, TypeError, AttributeError):
        raise EvaluationError(f"{path} holds an answer that is none: choose another file, or remove it") from None
    return answers


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _row(question: str, condition: Condition, answer: Answer) -> dict[str, Any]:
    return {"question": question, **asdict(condition), **asdict(answer)}
