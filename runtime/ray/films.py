"""An actor for `ray.data.Dataset.map_batches`: rows that name films in, the same rows with answers out.

Films are named, not sent: each actor samples and decodes what it answers, the next ones while it answers one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from framefusion.errors import PromptError
from framefusion.runtime.batch.questions import BatchQuestion, Defaults, read_row
from framefusion.runtime.batch.reading import batch_reader, local_files
from framefusion.runtime.batch.run import BatchRun
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.request import Request
from framefusion.runtime.server.media.decoding import start_decoders

COLUMNS = ("text", "finish_reason", "prompt_tokens", "new_tokens", "visual_tokens", "kept_tokens", "cost")
"""Of an answer; empty or 0 where there is an error."""
_EMPTY: Mapping[str, Any] = {
    "text": "",
    "finish_reason": "",
    "prompt_tokens": 0,
    "new_tokens": 0,
    "visual_tokens": 0,
    "kept_tokens": 0,
    "cost": 0.0,
}


class FilmAnswers:
    """Answers rows of a data set: `dataset.map_batches(FilmAnswers, fn_constructor_args=["bundle"], ...)`.

    A row has the columns of `ff-run batch` (docs/batch.md): video or image, prompt, and what else a line may say; an id
    is made where there is none. It comes back with `COLUMNS`, `seconds` and `error`, "" or the named error: a film that
    cannot be shown costs its row.

    Args:
        bundle: its folder, on every node.
        prompt: of rows without one.
        request: how rows are answered that do not say themselves.
        decoders: films that are decoded at once.
        together: rows that are answered at once, see `BatchRun`.
        threads: of one operator on the CPU; None takes those that Ray gave the actor (OMP_NUM_THREADS).

    Raises:
        FrameFusionError: the bundle cannot be opened here.
    """

    def __init__(
        self,
        bundle: str,
        prompt: str | None = None,
        request: Request | None = None,
        decoders: int = 1,
        threads: int | None = None,
        together: int = 1,
    ) -> None:
        start_decoders()
        given = os.environ.get("OMP_NUM_THREADS", "0")
        self._defaults = Defaults(prompt)
        self._pipeline = Pipeline(bundle, threads=int(given) if threads is None else threads)
        reader = batch_reader(self._pipeline.manifest, local_files(), decoders)
        self._run = BatchRun(
            self._pipeline, reader, reader, request or Request(), Path(bundle).name, decoders, together
        )

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a batch.

        Args:
            batch: column -> [N] values, as Ray gives them.
        """
        count = len(next(iter(batch.values()))) if batch else 0
        rows = [{name: _plain(values[index]) for name, values in batch.items()} for index in range(count)]
        answers: list[dict[str, Any]] = [{} for _ in rows]
        for question, answer in self._run.rows(self._questions(rows, answers)):
            answers[int(question.id)] = answer
        columns: dict[str, Any] = dict(batch)
        for name in COLUMNS:
            columns[name] = [answer.get(name, _EMPTY[name]) for answer in answers]
        columns["seconds"] = [json.dumps(answer.get("seconds", {})) for answer in answers]
        columns["error"] = [_error_text(answer.get("error")) for answer in answers]
        return columns

    def _questions(self, rows: list[dict[str, Any]], answers: list[dict[str, Any]]) -> Iterator[BatchQuestion]:
        """The rows as questions, by their numbers; what is none gets its error at once."""
        for number, row in enumerate(rows):
            # A column of numbers has NaN where a row has none.
            given = {name: value for name, value in row.items() if value is not None and value == value}
            try:
                question = read_row(given | {"id": str(number)}, f"row {number}", Path.cwd(), self._defaults)
                if question.openai:
                    raise PromptError(f"row {number} is one of OpenAI's batches: give video or image, and prompt")
                yield question
            except PromptError as error:
                answers[number] = {"error": {"code": type(error).__name__, "message": str(error)}}


def _plain(value: Any) -> Any:
    """A value of numpy or Arrow as Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return value.as_py() if hasattr(value, "as_py") else value


def _error_text(error: Mapping[str, str] | None) -> str:
    return "" if error is None else f"{error['code']}: {error['message']}"
