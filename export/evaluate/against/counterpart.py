"""The answers of another model to the questions of an evaluation: read from the file of its own, or given now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from framefusion.errors import EvaluationError
from framefusion.export.evaluate.against.beside import Counterpart
from framefusion.export.evaluate.answer_file import Key, read_answers
from framefusion.export.evaluate.answering import Answer, Condition, Setup
from framefusion.export.evaluate.evaluation import OnProgress, answer_all, settings_of
from framefusion.export.evaluate.questions import Question


def counterpart(
    against: str,
    setup: Setup,
    questions: Sequence[Question],
    conditions: Sequence[Condition],
    *,
    jobs: int = 1,
    on_progress: OnProgress | None = None,
) -> Counterpart:
    """The answers of another model, which are read or given now.

    Args:
        against: a file that an evaluation of it has written, or the model: a bundle, a checkpoint or an id on the hub.
        setup: of the model that is set beside it; both answer in the same way.
        questions: of both.
        conditions: of both.
        jobs: processes that answer.
        on_progress: see `OnProgress`.

    Raises:
        EvaluationError: the file holds no evaluation, or one in another way.
        FrameFusionError: the model cannot be opened or cannot answer.
    """
    if Path(against).is_file():
        return _read(against, setup)
    other = replace(setup, model=against, revision=None)
    if other.is_bundle:
        other = replace(other, live=None)  # which is of checkpoints
    answers: dict[Key, Answer] = {}
    engine = ""
    waiting = [(question, conditions) for question in questions]
    for done, answered in enumerate(answer_all(other, waiting, jobs), 1):
        engine = answered.engine
        for condition, given in zip(conditions, answered.answers, strict=True):
            answers[answered.question.key, condition.reducer, condition.cost] = given
        if on_progress is not None:
            on_progress(done, len(questions))
    return Counterpart(against, engine, answers)


def _read(file: str, setup: Setup) -> Counterpart:
    head, answers = read_answers(Path(file))
    theirs = head.get("setup")
    theirs = theirs if isinstance(theirs, dict) else {}
    for name, value in settings_of(setup).items():
        if theirs.get(name) != value:
            raise EvaluationError(
                f"{file} is of another setup, its {name} is {theirs.get(name)!r}, here it is {value!r}: evaluate both "
                "alike"
            )
    report = head.get("report")
    model = report.get("model") if isinstance(report, dict) else None
    return Counterpart(str(model or file), str(head.get("engine")), answers)
