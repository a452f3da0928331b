"""The accuracy of a model on a file of questions, under every reducer and cost: the main path, readable in one sitting.

questions x conditions -> answers, in one process or several -> a report: shares with intervals, by type, compared

`evaluate` is the path, each step named in it; how a question is answered is in answering.py, what an answer file holds
in answer_file.py, the statistics in scoring.py.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from framefusion.console import messages as console
from framefusion.errors import BackendError, EvaluationError, FrameFusionError
from framefusion.export.evaluate.against.beside import Counterpart, beside, check_complete, render_beside
from framefusion.export.evaluate.answer_file import AnswerFile
from framefusion.export.evaluate.answering import DENSE, Answer, Answerer, Condition, Setup, fingerprint
from framefusion.export.evaluate.open import open_answerer
from framefusion.export.evaluate.questions import Question
from framefusion.export.evaluate.scoring import paired, share_of
from framefusion.reducers import load_reducer

SEPARATE = ("model", "revision", "threads", "live")
"""Of a setup: what does not change an answer, or is in the fingerprint and the engine."""
TYPES_ACROSS = 5  # of a table

OnProgress = Callable[[int, int], None]
"""Called with the number of questions that are answered, and of all."""


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
        EvaluationError: there is no reducer or no cost.
    """
    for reducer in reducers:
        load_reducer(reducer)
    every = [Condition(reducer, 1.0 if reducer == DENSE else cost) for reducer in reducers for cost in costs]
    if not every:
        raise EvaluationError("no reducer or no cost to answer with: give one or more of each")
    return list(dict.fromkeys(every))


def evaluate(
    setup: Setup,
    questions: Sequence[Question],
    conditions: Sequence[Condition],
    *,
    output: Path | None = None,
    jobs: int = 1,
    on_progress: OnProgress | None = None,
    against: Counterpart | None = None,
) -> dict[str, Any]:
    """Answer every question under every condition and report.

    Args:
        setup: what answers.
        questions: each only once, by its key.
        conditions: see the function of this name; the others are compared with the reducer of the first.
        output: file that gets the report and all answers; a question that has its answer there is not run again.
        jobs: processes, each with the model.
        on_progress: see `OnProgress`.
        against: another model, which the report sets beside this one, question by question: see against/counterpart.py.

    Returns:
        What FILE gets, answers left out: see docs/evaluation.md.

    Raises:
        EvaluationError: a question stands there twice, the output holds another evaluation, or the other model has no
            answer to a question.
        FrameFusionError: a question or condition cannot be answered; the question is named.
    """
    # 1. A question is known by what it says and shows: two of a key would be counted as one.
    by_key = {question.key: question for question in questions}
    if len(by_key) < len(questions):
        repeated = Counter(question.key for question in questions).most_common(1)[0][0]
        raise EvaluationError(f"question {by_key[repeated].name} is asked more than once: ask each only once")
    if against is not None:
        check_complete(against, by_key, conditions)
    # 2. Answers that are there are kept only if model and setup are the same: a mixed table would show neither.
    settings = settings_of(setup)
    with AnswerFile(output, {"model": fingerprint(setup), "setup": settings}) as kept:
        # 3. Only what is missing is answered, so that an interrupted run goes on.
        missing_of = {key: kept.missing(key, conditions) for key in by_key}
        waiting = [(by_key[key], missing) for key, missing in missing_of.items() if missing]
        done = len(by_key) - len(waiting)
        # 4. Each question is on disk before the next one is reported: a process may be killed at any time.
        for answered in answer_all(setup, waiting, jobs):
            kept.opened(answered.engine, answered.note)
            kept.add(answered.question.key, answered.conditions, answered.answers)
            done += 1
            if on_progress is not None:
                on_progress(done, len(by_key))
        # 5. The report is made of the file's answers, old and new alike.
        result = {"model": setup.model, "sha256": kept.identity["model"], "engine": kept.engine, "note": kept.note}
        result |= {"setup": settings} | report(by_key, conditions, kept)
        if against is not None:
            result["against"] = beside(by_key, conditions, kept.answers, against)
        kept.finish(result)
    return result


def settings_of(setup: Setup) -> dict[str, Any]:
    """What of a setup changes answers, and is not the model."""
    return {name: value for name, value in asdict(setup).items() if name not in SEPARATE}


# --- Answering ------------------------------------------------------------------------------------------------------

_ANSWERER: Answerer | FrameFusionError | None = None  # of a process of the pool


def answer_all(
    setup: Setup, waiting: Sequence[tuple[Question, Sequence[Condition]]], jobs: int
) -> Iterator[QuestionAnswers]:
    """The answers to questions, each under its conditions, as they come; without a question no model is opened.

    Raises:
        BackendError: a process of several was killed.
        FrameFusionError: the model cannot be opened, or see `answer`.
    """
    if not waiting:
        return
    if jobs == 1:
        answerer = open_answerer(setup)
        for question, missing in waiting:
            yield answer(answerer, question, missing)
        return
    pool = ProcessPoolExecutor(
        min(jobs, len(waiting)), multiprocessing.get_context("spawn"), _open_in_process, (setup,)
    )
    try:
        futures = [pool.submit(_answer_in_process, question, missing) for question, missing in waiting]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise BackendError("a process that answered was killed, as happens without memory: give fewer --jobs") from None
    finally:
        pool.shutdown(cancel_futures=True)


def answer(answerer: Answerer, question: Question, missing: Sequence[Condition]) -> QuestionAnswers:
    """One question under some conditions; an error of it is raised with the question's name."""
    try:
        answers = list(answerer.answers(question, missing))
    except FrameFusionError as error:
        raise type(error)(f"question {question.name}: {error}") from None
    return QuestionAnswers(question, missing, answers, answerer.engine, answerer.note)


def end_with_parent() -> None:
    """Let this process, one of a pool, end as soon as the one that started it does, however that ends.

    A pool's processes hold both ends of its queues, so that none of them notices by itself that nobody is left.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _open_in_process(setup: Setup) -> None:
    global _ANSWERER
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    end_with_parent()
    try:
        _ANSWERER = open_answerer(setup)
    except FrameFusionError as error:  # an initializer that raises breaks the pool and does not say why
        _ANSWERER = error


def _answer_in_process(question: Question, missing: Sequence[Condition]) -> QuestionAnswers:
    assert _ANSWERER is not None
    if isinstance(_ANSWERER, FrameFusionError):
        raise _ANSWERER
    return answer(_ANSWERER, question, missing)


# --- Reporting ------------------------------------------------------------------------------------------------------


def report(questions: Mapping[str, Question], conditions: Sequence[Condition], kept: AnswerFile) -> dict[str, Any]:
    """Shares of right answers under each condition, by type too, and the first reducer beside each other one.

    Args:
        questions: by key.
        conditions: under which `kept` has an answer to each of them.
        kept: the answers.

    Returns:
        Plain values: `questions`, `accuracy` and `paired` of docs/evaluation.md.
    """
    types = Counter(question.type for question in questions.values())
    right: dict[Condition, list[bool]] = {}  # in the order of the questions
    rows = []
    for condition in conditions:
        answers = [kept.answers[key, condition.reducer, condition.cost] for key in questions]
        right[condition] = []
        right_of_type: dict[str, list[bool]] = {kind: [] for kind in types}
        for question, given in zip(questions.values(), answers, strict=True):
            is_right = question.is_right(given.text)
            right[condition].append(is_right)
            right_of_type[question.type].append(is_right)
        by_type = {kind: share_of(verdicts) for kind, verdicts in right_of_type.items()}
        rows.append(asdict(condition) | share_of(right[condition]) | _reached(answers) | {"types": by_type})
    return {"questions": dict(types), "accuracy": rows, "paired": _pairs(conditions, right)}


def _pairs(conditions: Sequence[Condition], right: Mapping[Condition, Sequence[bool]]) -> list[dict[str, Any]]:
    """The first condition's reducer beside each other one, at every cost below 1 that both answered at."""
    first = conditions[0].reducer
    rows = []
    for condition in conditions:
        counterpart = Condition(first, condition.cost)
        if condition.reducer != first and condition.cost < 1 and counterpart in right:
            names = {"first": first, "second": condition.reducer, "cost": condition.cost}
            rows.append(names | paired(right[counterpart], right[condition]))
    return rows


def _reached(answers: Sequence[Answer]) -> dict[str, Any]:
    """What the answers cost, and what the reducer could not do as asked, with the number of questions."""
    outcomes = Counter(outcome for answer in answers for outcome in answer.outcomes)
    return {
        "cost_reached": round(fmean(answer.reached for answer in answers), 4),
        "visual_tokens_left": round(fmean(answer.visual_left for answer in answers), 1),
        "outcomes": dict(outcomes),
    }


def render(result: Mapping[str, Any]) -> str:
    """What `evaluate` returns, as tables for people."""
    total = sum(result["questions"].values())
    lines = [f"{result['model']} by {result['engine']}, {total} questions"]
    if result["note"]:
        lines.append(f"not by transformers: {result['note']}")
    head = ("reducer", "cost", "reached", "tokens left", "right", "%", "95 % interval")
    rows = [
        (row["reducer"], row["cost"], row["cost_reached"], row["visual_tokens_left"], row["right"], *_shares(row))
        for row in result["accuracy"]
    ]
    lines += ["", console.table(head, rows)]
    for row in result["accuracy"]:
        condition = f"{row['reducer']} at cost {row['cost']:g}"
        lines += [f"{condition}: {count} x {outcome}" for outcome, count in row["outcomes"].items()]
    if len(result["questions"]) > 1:
        lines += ["", _by_type(result)]
    if result["paired"]:
        lines += ["", "The same questions: the first's % less the second's, Newcombe's interval, McNemar's exact p"]
        lines.append(_compared(result["paired"]))
    if "against" in result:
        lines += ["", *render_beside(result["against"])]
    return "\n".join(lines)


def _shares(share: Mapping[str, Any]) -> tuple[str, str]:
    low, high = share["interval"]
    return f"{100 * share['accuracy']:.1f}", f"{100 * low:.1f}-{100 * high:.1f}"


def _by_type(result: Mapping[str, Any]) -> str:
    """Conditions by types, some types beside each other."""
    kinds = list(result["questions"])
    blocks = []
    for start in range(0, len(kinds), TYPES_ACROSS):
        across = kinds[start : start + TYPES_ACROSS]
        head = ("reducer", "cost", *(f"{kind} ({result['questions'][kind]})" for kind in across))
        rows = [
            (row["reducer"], row["cost"], *(" ".join(_shares(row["types"][kind])) for kind in across))
            for row in result["accuracy"]
        ]
        blocks.append(console.table(head, rows))
    return "\n\n".join(blocks)


def _compared(rows: Iterable[Mapping[str, Any]]) -> str:
    head = ("first", "second", "cost", "difference", "95 % interval", "only first", "only second", "p")
    cells = []
    for row in rows:
        low, high = row["interval"]
        difference = f"{100 * row['difference']:+.1f}"
        interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
        sides = (row["only_first_right"], row["only_second_right"])
        cells.append((row["first"], row["second"], row["cost"], difference, interval, *sides, f"{row['p']:.2g}"))
    return console.table(head, cells)
