"""The answers of an evaluation on disk: kept one by one as they come, taken up again, and written as one file at last.

    FILE.partial   the evaluation's identity, then one JSON object an answer: what an interrupted run leaves behind
    FILE           identity, report and all answers as one JSON object, put in place in one step

Knows neither models nor right and wrong.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from framefusion.errors import EvaluationError, InterruptedBuildError, StorageError
from framefusion.export.answering import Answer, Condition

FORMAT = 1

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
        self.output, self.identity = output, {"format": FORMAT, **identity}
        self.answers: dict[Key, Answer] = {}
        self.engine: str | None = None  # that gave the answers; None before the first
        self.note: str | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> AnswerFile:
        if self.output is None:
            return self
        self._partial = self.output.with_name(self.output.name + ".partial")
        if self.output.is_dir():
            raise StorageError(f"{self.output} is a folder: give -o a file, such as accuracy.json")
        try:
            self._file = self._partial.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"another run writes {self._partial}: wait for it or choose another file") from None
        except OSError as error:
            raise StorageError(f"{self._partial} cannot be written ({error.strerror}): choose another file") from None
        try:
            self._take_over(self._file)
        except EvaluationError:
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
        return [one for one in conditions if (question, one.reducer, one.cost) not in self.answers]

    def add(self, question: str, asked: Sequence[Condition], answers: Iterable[Answer]) -> None:
        """Keep the answers to a question: they outlive this process, however it ends."""
        rows = []
        for condition, answer in zip(asked, answers, strict=True):
            self.answers[question, condition.reducer, condition.cost] = answer
            rows.append(_row(question, condition, answer))
        if self._file is not None:
            head = [] if os.fstat(self._file.fileno()).st_size else [self._head()]
            try:
                self._file.write("".join(json.dumps(row) + "\n" for row in [*head, *rows]).encode())
                self._file.flush()
            except OSError as error:
                raise StorageError(f"{self._partial} cannot be written ({error.strerror}): free space") from None

    def opened(self, engine: str, note: str | None) -> None:
        """Tell what gives the answers from now on.

        Raises:
            EvaluationError: another engine gave those that are there.
        """
        if self.engine not in (None, engine):
            raise self._other("engine", self.engine, engine)
        self.engine, self.note = engine, note

    def finish(self, report: Mapping[str, Any]) -> None:
        """Put the report and all answers in FILE."""
        if self.output is None:
            return
        rows = [_row(key[0], Condition(*key[1:]), answer) for key, answer in self.answers.items()]
        lines = ",\n    ".join(json.dumps(row) for row in rows)
        head = json.dumps(self._head() | {"report": report}, indent=2)[: -len("\n}")]
        fresh = self.output.with_name(self.output.name + ".fresh")
        try:
            fresh.write_text(f'{head},\n  "answers": [\n    {lines}\n  ]\n}}\n', encoding="utf-8")
            os.replace(fresh, self.output)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise StorageError(f"{self.output} cannot be written ({error.strerror}): free space") from None
        self._partial.unlink()

    def _head(self) -> dict[str, Any]:
        return self.identity | {"engine": self.engine, "note": self.note}

    def _close(self) -> None:
        if self._file is None:
            return
        if self._partial.exists() and self._partial.stat().st_size == 0:
            self._partial.unlink()
        self._file.close()
        self._file = None

    def _take_over(self, partial: IO[bytes]) -> None:
        assert self.output is not None
        if self.output.exists():
            try:
                whole = json.loads(self.output.read_text(encoding="utf-8"))
                rows = whole.pop("answers")
            except (OSError, ValueError, KeyError, AttributeError, TypeError):
                raise EvaluationError(f"{self.output} is no evaluation: choose another file with -o") from None
            self._take(self.output, whole, rows)
        partial.seek(0)
        lines = partial.read().split(b"\n")
        if lines[-1]:  # cut off in the middle of an answer
            partial.truncate(sum(len(line) + 1 for line in lines[:-1]))
        try:
            head, *rows = [json.loads(line) for line in lines[:-1]] or [None]
        except ValueError:
            raise EvaluationError(f"{self._partial} is no evaluation: remove it") from None
        if head is not None:
            self._take(self._partial, head, rows)

    def _take(self, path: Path, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        for name, mine in self.identity.items():
            if head.get(name) != mine:
                raise self._other(name, head.get(name), mine)
        try:
            for row in rows:
                told = {name: value for name, value in row.items() if name not in ("question", "reducer", "cost")}
                answer = Answer(**{**told, "outcomes": tuple(told.get("outcomes", ()))})
                self.answers[row["question"], row["reducer"], row["cost"]] = answer
        except (KeyError, TypeError, AttributeError):
            raise EvaluationError(f"{path} holds an answer that is none: choose another file, or remove it") from None
        self.opened(str(head.get("engine")), head.get("note"))

    def _other(self, name: str, theirs: object, mine: object) -> EvaluationError:
        if isinstance(theirs, dict) and isinstance(mine, dict):
            name = next(part for part in mine if theirs.get(part) != mine[part])
            theirs, mine = theirs.get(name), mine[name]
        return EvaluationError(
            f"{self.output} holds another evaluation, its {name} is {theirs!r}, asked is {mine!r}: "
            "choose another file with -o, or remove it and what stands beside it as .partial"
        )


def _row(question: str, condition: Condition, answer: Answer) -> dict[str, Any]:
    return {"question": question, **asdict(condition), **asdict(answer)}
