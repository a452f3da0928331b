"""The accuracy of a model on a file of questions, under every reducer and cost: the main path, readable in one sitting.

questions x conditions -> answers, in one process or several -> a report: shares with intervals, by type, compared
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from framefusion.console import messages as console
from framefusion.errors import BackendError, EvaluationError, FrameFusionError
from framefusion.export.evaluate.answer_file import AnswerFile
from framefusion.export.evaluate.answering import DENSE, Answer, Answerer, Condition, Setup, fingerprint
from framefusion.export.evaluate.open import open_answerer
from framefusion.export.evaluate.questions import Question
from framefusion.export.evaluate.scoring import paired, share_of
from framefusion.reducers import load_reducer

SEPARATE = ("model", "revision", "threads", "live")
"""Of a setup: what does not change an answer, or is told by the fingerprint and the engine."""
TYPES_ACROSS = 5  # of a table

Told = Callable[[int, int], None]
"""Told how many of the questions are answered."""


class QuestionAnswers(NamedTuple):
    """A question's answers under some conditions, and what gave them."""

    question: Question
    conditions: Sequence[Condition]
    answers: Sequence[Answer]
    engine: str
    note: str | None


def conditions(reducers: Sequence[str], costs: Sequence[float]) -> list[Condition]:
    """Every reducer at every cost, each once, the one that drops nothing at 1 alone.

    Raises:
        ReducerError: a name is unknown.
        EvaluationError: nothing is left to ask.
    """
    for reducer in reducers:
        load_reducer(reducer)
    every = [Condition(one, 1.0 if one == DENSE else cost) for one in reducers for cost in costs]
    if not every:
        raise EvaluationError("no reducer or no cost to answer with: give one or more of each")
    return list(dict.fromkeys(every))


def evaluate(
    setup: Setup,
    questions: Sequence[Question],
    asked: Sequence[Condition],
    *,
    output: Path | None = None,
    jobs: int = 1,
    told: Told | None = None,
) -> dict[str, Any]:
    """Ask every question under every condition and report.

    Args:
        setup: what answers.
        questions: none may be another one's repetition.
        asked: the others are compared with the reducer of the first.
        output: file that gets the report and all answers; those that it has are not asked again.
        jobs: processes, each with the model.
        told: of progress.

    Raises:
        EvaluationError: the output holds another evaluation.
        FrameFusionError: a question or condition cannot be answered; the question is named.
    """
    keys = {question.key: question for question in questions}
    if len(keys) < len(questions):
        repeated = Counter(question.key for question in questions).most_common(1)[0][0]
        raise EvaluationError(f"question {keys[repeated].name} is asked more than once: ask each only once")
    settings = {name: value for name, value in asdict(setup).items() if name not in SEPARATE}
    with AnswerFile(output, {"model": fingerprint(setup), "setup": settings}) as kept:
        waiting = [(one, missing) for key, one in keys.items() if (missing := kept.missing(key, asked))]
        done = len(keys) - len(waiting)
        for made in ask_all(setup, waiting, jobs):
            kept.opened(made.engine, made.note)
            kept.add(made.question.key, made.conditions, made.answers)
            done += 1
            if told is not None:
                told(done, len(keys))
        found = {"model": setup.model, "sha256": kept.identity["model"], "engine": kept.engine, "note": kept.note}
        found |= {"setup": settings} | report(keys, asked, kept)
        kept.finish(found)
    return found


# --- Asking ---------------------------------------------------------------------------------------------------------

_ANSWERER: Answerer | FrameFusionError | None = None  # of a process of the pool


def ask_all(
    setup: Setup, asked: Sequence[tuple[Question, Sequence[Condition]]], jobs: int
) -> Iterator[QuestionAnswers]:
    """What is answered, as it comes; nothing is opened where nothing is asked."""
    if not asked:
        return
    if jobs == 1:
        answerer = open_answerer(setup)
        for question, missing in asked:
            yield ask(answerer, question, missing)
        return
    pool = ProcessPoolExecutor(min(jobs, len(asked)), get_context("spawn"), _open_in_process, (setup,))
    try:
        for future in as_completed([pool.submit(_ask_in_process, *one) for one in asked]):
            yield future.result()
    except BrokenProcessPool:
        raise BackendError("a process that answered was killed, as happens without memory: give fewer --jobs") from None
    finally:
        pool.shutdown(cancel_futures=True)


def ask(answerer: Answerer, question: Question, missing: Sequence[Condition]) -> QuestionAnswers:
    """One question; what cannot be answered is refused with its name."""
    try:
        answers = list(answerer.answers(question, missing))
    except FrameFusionError as error:
        raise type(error)(f"question {question.name}: {error}") from None
    return QuestionAnswers(question, missing, answers, answerer.engine, answerer.note)


def _open_in_process(setup: Setup) -> None:
    global _ANSWERER
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    try:
        _ANSWERER = open_answerer(setup)
    except FrameFusionError as error:  # an initializer that raises breaks the pool and does not say why
        _ANSWERER = error


def _ask_in_process(question: Question, missing: Sequence[Condition]) -> QuestionAnswers:
    assert _ANSWERER is not None
    if isinstance(_ANSWERER, FrameFusionError):
        raise _ANSWERER
    return ask(_ANSWERER, question, missing)


# --- Reporting ------------------------------------------------------------------------------------------------------


def report(questions: Mapping[str, Question], asked: Sequence[Condition], kept: AnswerFile) -> dict[str, Any]:
    """Shares of right answers under each condition, by type too, and the first reducer beside each other one."""
    types = Counter(question.type for question in questions.values())
    right: dict[Condition, list[bool]] = {}
    rows = []
    for condition in asked:
        answers = [kept.answers[key, condition.reducer, condition.cost] for key in questions]
        right[condition] = [one.is_right(made.text) for one, made in zip(questions.values(), answers, strict=True)]
        pairs = list(zip(questions.values(), right[condition], strict=True))
        by_type = {kind: share_of([is_right for one, is_right in pairs if one.type == kind]) for kind in types}
        rows.append(asdict(condition) | share_of(right[condition]) | _reached(answers) | {"types": by_type})
    first = asked[0].reducer
    compared = [
        {"first": first, "second": other.reducer, "cost": other.cost} | paired(right[own], right[other])
        for other in asked
        if other.reducer != first and other.cost < 1 and (own := Condition(first, other.cost)) in right
    ]
    return {"questions": dict(types), "accuracy": rows, "paired": compared}


def _reached(answers: Sequence[Answer]) -> dict[str, Any]:
    """What the answers cost, and what the reducer could not do as asked, with the number of questions."""
    outcomes = Counter(outcome for answer in answers for outcome in answer.outcomes)
    return {
        "cost_reached": round(fmean(answer.reached for answer in answers), 4),
        "visual_tokens_left": round(fmean(answer.visual_left for answer in answers), 1),
        "outcomes": dict(outcomes),
    }


def render(found: Mapping[str, Any]) -> str:
    """The report as tables for people."""
    total = sum(found["questions"].values())
    lines = [f"{found['model']} by {found['engine']}, {total} questions"]
    if found["note"]:
        lines.append(f"not by transformers: {found['note']}")
    head = ("reducer", "cost", "reached", "tokens left", "right", "%", "95 % interval")
    rows = [
        (row["reducer"], row["cost"], row["cost_reached"], row["visual_tokens_left"], row["right"], *_shares(row))
        for row in found["accuracy"]
    ]
    lines += ["", console.table(head, rows)]
    for row in found["accuracy"]:
        named = f"{row['reducer']} at cost {row['cost']:g}"
        lines += [f"{named}: {count} x {outcome}" for outcome, count in row["outcomes"].items()]
    if len(found["questions"]) > 1:
        lines += ["", _by_type(found)]
    if found["paired"]:
        lines += ["", "The same questions: the first's % less the second's, Newcombe's interval, McNemar's exact p"]
        lines.append(_compared(found["paired"]))
    return "\n".join(lines)


def _shares(own: Mapping[str, Any]) -> tuple[str, str]:
    low, high = own["interval"]
    return f"{100 * own['accuracy']:.1f}", f"{100 * low:.1f}-{100 * high:.1f}"


def _by_type(found: Mapping[str, Any]) -> str:
    """Conditions by types, some types beside each other."""
    kinds = list(found["questions"])
    blocks = []
    for start in range(0, len(kinds), TYPES_ACROSS):
        across = kinds[start : start + TYPES_ACROSS]
        head = ("reducer", "cost", *(f"{kind} ({found['questions'][kind]})" for kind in across))
        rows = [
            (row["reducer"], row["cost"], *(" ".join(_shares(row["types"][kind])) for kind in across))
            for row in found["accuracy"]
        ]
        blocks.append(console.table(head, rows))
    return "\n\n".join(blocks)


def _compared(rows: Iterable[Mapping[str, Any]]) -> str:
    head = ("first", "second", "cost", "difference", "95 % interval", "only first", "only second", "p")
    cells = []
    for row in rows:
        low, high = (f"{100 * bound:+.1f}" for bound in row["interval"])
        sides = row["only_first_right"], row["only_second_right"]
        share = f"{100 * row['difference']:+.1f}", f"{low} to {high}"
        cells.append((row["first"], row["second"], row["cost"], *share, *sides, f"{row['p']:.2g}"))
    return console.table(head, cells)
