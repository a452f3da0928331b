"""The run of a batch: films decoded ahead in processes of their own, answered one by one or a few together, written at
once.

    questions -> [ decoded ahead | decoded ahead | ... ] -> prefill, one at a time -> a token for each -> a line

A film that cannot be shown costs its line and nothing else. Knows no flag.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

from framefusion.errors import BackendError, FrameFusionError
from framefusion.runtime.batch.answers import AnswerFile
from framefusion.runtime.batch.questions import BatchQuestion
from framefusion.runtime.generation.batching.decode_batch import DecodeBatch
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.request import Generation, PrefillReport, Request, Step
from framefusion.runtime.server.media.decoding import Decoded
from framefusion.runtime.server.media.reader import MediaReader
from framefusion.runtime.server.protocol.parts import MediaPart
from framefusion.runtime.server.protocol.response import Answer, error_body, status_of, usage_of
from framefusion.runtime.text.prompt import Turn, Visual

AHEAD = 2  # questions that are decoded beside those that decoders work on


@dataclass
class Totals:
    """What a run came to.

    Attributes:
        answered, failed, skipped: questions; skipped ones were answered by an earlier run.
        visual_tokens, kept_tokens: of all that were answered; kept in the last layer.
        seconds: of the whole run, and by stage.
    """

    answered: int = 0
    failed: int = 0
    skipped: int = 0
    visual_tokens: int = 0
    kept_tokens: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A question whose films are decoded."""

    question: BatchQuestion
    media: Sequence[Decoded]
    seconds: float


@dataclass(eq=False)
class _Running:
    """A question that is being answered.

    Attributes:
        question: its.
        future: its films.
        steps: of its answer, once those are decoded.
        taken: the steps so far.
        answer: once it is over, if there is one.
        row: its line, once it is over.
    """

    question: BatchQuestion
    future: Future[Prepared]
    prepared: Prepared = field(init=False)
    steps: Generator[Step, None, None] | None = None
    taken: list[Step] = field(default_factory=list)
    answer: Generation | None = None
    row: dict[str, Any] | None = None

    def close(self) -> None:
        """Free what an answer holds that is not taken to its end."""
        if self.steps is not None:
            self.steps.close()


class BatchRun:
    """Answers questions with one pipeline.

    Args:
        pipeline: of the bundle.
        plain_reader: reads what the user's own lines name.
        openai_reader: reads what lines of OpenAI's batch API name; closed unless a flag says otherwise.
        request: how questions are answered that do not say themselves.
        model: name of the bundle.
        decoders: films that are decoded at once.
        together: questions that are answered at once: prefilled one after the other, their tokens in one call.

    Raises:
        BackendError: several together, by a backend that takes the tokens of one answer at a time.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        plain_reader: MediaReader,
        openai_reader: MediaReader,
        request: Request,
        model: str,
        decoders: int,
        together: int = 1,
    ) -> None:
        refusal = pipeline.segments.batch_refusal if together > 1 else None
        if refusal is not None:
            raise BackendError(f"{together} questions cannot be answered together: {refusal}; leave --together out")
        most = pipeline.segments.max_batch_size if together > 1 else None
        if most is not None and together > most:
            raise BackendError(
                f"{together} questions cannot be answered together: the engines decode {most} at most, so --together "
                f"{most}, or compile with a larger --max-batch-size"
            )
        self._pipeline = pipeline
        self._plain_reader = plain_reader
        self._openai_reader = openai_reader
        self._request = request
        self._model = model
        self._decoders = decoders
        self._together = together
        self._batch = DecodeBatch(pipeline.segments) if together > 1 else None

    def run(self, questions: Iterator[BatchQuestion], answers: AnswerFile, report: Callable[[Totals], None]) -> Totals:
        """Answer what is not answered yet.

        Args:
            questions: of this part.
            answers: of this part.
            report: called after each answer.

        Raises:
            FrameFusionError: what no other film would change: the disk is full, the engine fails.
        """
        totals = Totals()
        start = time.monotonic()

        def open_questions() -> Iterator[BatchQuestion]:
            for question in questions:
                if question.id in answers.done:
                    totals.skipped += 1
                else:
                    yield question

        for question, row in self.rows(open_questions(), totals):
            answers.add(question.id, row)
            totals.seconds = time.monotonic() - start
            report(totals)
        return totals

    def rows(
        self, questions: Iterable[BatchQuestion], totals: Totals | None = None
    ) -> Iterator[tuple[BatchQuestion, dict[str, Any]]]:
        """Each question with its line: in their order, or as they are done where several are answered together.

        Args:
            questions: taken as they are needed: a few ahead of the one that is answered.
            totals: counts what comes.

        Raises:
            FrameFusionError: see `run`.
        """
        totals = totals or Totals()
        remaining = iter(questions)
        pending: deque[tuple[BatchQuestion, Future[Prepared]]] = deque()
        running: list[_Running] = []
        ending = Event()
        threads = ThreadPoolExecutor(self._decoders, "ahead")
        try:
            while True:
                # 1. Decode ahead, no more than fits.
                places = self._decoders + AHEAD + self._together - 1 - len(running) - len(pending)
                for question in islice(remaining, places):
                    pending.append((question, threads.submit(self._prepare, question, ending.is_set)))
                # 2. Begin what there is room for; what is not decoded yet is waited for where nothing else is to do.
                while pending and len(running) < self._together and (not running or pending[0][1].done()):
                    running.append(_Running(*pending.popleft()))
                    self._advance(running[-1])
                if not running:
                    return
                # 3. A token for each; who has the last one gets a line.
                for answering in running:
                    if answering.row is None:
                        self._advance(answering)
                done = [answering for answering in running if answering.row is not None]
                running = [answering for answering in running if answering.row is None]
                for answering in done:
                    yield answering.question, self._counted(answering, totals)
        finally:
            ending.set()
            for answering in running:
                answering.close()
            threads.shutdown(cancel_futures=True)

    def _prepare(self, question: BatchQuestion, is_ending: Callable[[], bool]) -> Prepared:
        """Open and decode what a question shows; runs ahead on a thread."""
        start = time.monotonic()
        reader = self._openai_reader if question.openai else self._plain_reader
        parts = question.chat.media
        images = sum(part.kind is Visual.IMAGE for part in parts)
        with TemporaryDirectory(prefix="framefusion-") as folder:
            opened = reader.open(parts, Path(folder), is_ending)
            media = reader.decode(opened, images, is_ending)
        return Prepared(question, media, time.monotonic() - start)

    def _advance(self, answering: _Running) -> None:
        """The next step of an answer; its line where it was the last one, or where its sender can mend the error."""
        try:
            if answering.steps is None:
                answering.prepared = answering.future.result()
                answering.steps = self._steps(answering.prepared)
            step = next(answering.steps, None)
            if step is not None:
                answering.taken.append(step)
                return
            answering.answer = self._generation(answering.prepared, answering.taken)
            answering.row = self._row(answering.prepared, answering.answer)
        except FrameFusionError as error:
            if not error.sender_fault:
                raise
            answering.row = self._error_row(answering.question, error)

    def _counted(self, answering: _Running, totals: Totals) -> dict[str, Any]:
        """The line of an answer that is over, which the totals count."""
        assert answering.row is not None
        answer = answering.answer
        if answer is None:
            totals.failed += 1
            return answering.row
        totals.answered += 1
        totals.visual_tokens += answer.visual_tokens
        totals.kept_tokens += answer.kept_tokens
        for stage, seconds in answer.seconds.items():
            totals.stages[stage] = totals.stages.get(stage, 0.0) + seconds
        return answering.row

    def _steps(self, prepared: Prepared) -> Generator[Step, None, None]:
        """The steps of an answer, beside others where several are answered together."""
        chat = prepared.question.chat
        turns = [
            Turn(message.role, [part.kind if isinstance(part, MediaPart) else part for part in message.parts])
            for message in chat.messages
        ]
        request = chat.request if prepared.question.openai else over(prepared.question, self._request)
        media = [media.media for media in prepared.media]
        if self._batch is None:
            return self._pipeline.stream(turns, media, request)
        return self._pipeline.session(batch=self._batch).stream(turns, media, request)

    def _generation(self, prepared: Prepared, steps: Sequence[Step]) -> Generation:
        """The answer, with the seconds of decoding in it."""
        answer = Generation.from_steps(steps)
        seconds = {"media": prepared.seconds, **answer.seconds}
        seconds.pop("video", None)
        return replace(answer, seconds=seconds)

    def _row(self, prepared: Prepared, answer: Generation) -> dict[str, Any]:
        """The line of an answer."""
        question = prepared.question
        warnings = [warning for media in prepared.media for warning in media.warnings]
        if question.openai:
            report = PrefillReport(answer.prompt_tokens, answer.visual_tokens, answer.reduction, answer.kv_lengths)
            head = Answer(self._model, warnings)
            usage = usage_of(report, len(answer.token_ids))
            body = head.completion(answer.text, answer.finish_reason, usage, answer.seconds)
            response = {"status_code": 200, "request_id": head.identity, "body": body}
            return {"id": head.identity, "custom_id": question.id, "response": response, "error": None}
        return {
            "id": question.id,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "new_tokens": len(answer.token_ids),
            "visual_tokens": answer.visual_tokens,
            "kept_tokens": answer.kept_tokens,
            "cost": round(answer.cost, 4),
            "seconds": {stage: round(seconds, 4) for stage, seconds in answer.seconds.items()},
            "warnings": warnings,
            **({"extra": dict(question.extra)} if question.extra else {}),
        }

    def _error_row(self, question: BatchQuestion, error: FrameFusionError) -> dict[str, Any]:
        """The line of a question that could not be answered."""
        body = error_body(error)
        if question.openai:
            head = Answer(self._model)
            response = {"status_code": status_of(error), "request_id": head.identity, "body": body}
            problem = {"code": body["error"]["code"], "message": body["error"]["message"]}
            return {"id": head.identity, "custom_id": question.id, "response": response, "error": problem}
        problem = {"code": body["error"]["code"], "message": body["error"]["message"]}
        return {"id": question.id, "error": problem, **({"extra": dict(question.extra)} if question.extra else {})}


def over(question: BatchQuestion, base: Request) -> Request:
    """A question's own settings, and those of the run where its line says nothing."""
    return replace(base, **{name: getattr(question.chat.request, name) for name in question.given})
