"""Two models beside each other on the same questions: points lost, and what each keeps of a prompt. Runs nothing.

Where both say what they keep, the share of the other model's tokens that are kept here as well is reported, and answers
are counted apart where these are the same tokens and where not: quantised weights give other scores, and these may
choose other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from framefusion.console import messages as console
from framefusion.errors import EvaluationError
from framefusion.export.evaluate.answer_file import Key
from framefusion.export.evaluate.answering import Answer, Condition
from framefusion.export.evaluate.questions import Question
from framefusion.export.evaluate.scoring import kept_alike, paired


@dataclass(frozen=True)
class Counterpart:
    """Another model's answers to the same questions, such as those of a bundle in floats beside a quantised one.

    Attributes:
        model: its name.
        engine: that gave them.
        answers: by question and condition.
    """

    model: str
    engine: str
    answers: Mapping[Key, Answer]


def check_complete(against: Counterpart, questions: Mapping[str, Question], conditions: Sequence[Condition]) -> None:
    """Refuse before anything is answered what could not be set side by side.

    Raises:
        EvaluationError: an answer is missing.
    """
    for key, question in questions.items():
        for condition in conditions:
            if (key, condition.reducer, condition.cost) not in against.answers:
                raise EvaluationError(
                    f"{against.model} has no answer to question {question.name} by {condition}: evaluate both with the "
                    "same questions, reducers and costs; a question is another one once its file has changed"
                )


def beside(
    questions: Mapping[str, Question],
    conditions: Sequence[Condition],
    answers: Mapping[Key, Answer],
    against: Counterpart,
) -> dict[str, Any]:
    """Another model's answers and these, paired under each condition; arguments as of `report`.

    Returns:
        Plain values: `against` of docs/evaluation.md.
    """
    rows = []
    for condition in conditions:
        keys = [(key, condition.reducer, condition.cost) for key in questions]
        mine = [answers[key] for key in keys]
        theirs = [against.answers[key] for key in keys]
        right, right_there = (
            [question.is_right(answer.text) for question, answer in zip(questions.values(), given, strict=True)]
            for given in (mine, theirs)
        )
        row = asdict(condition) | paired(right_there, right)
        row["other_answers"] = sum(ours.text != others.text for ours, others in zip(mine, theirs, strict=True))
        shares = kept_alike([answer.kept for answer in mine], [answer.kept for answer in theirs])
        if shares is not None and condition.cost < 1:
            row["kept"] = _kept(shares, right, right_there)
        rows.append(row)
    return {"model": against.model, "engine": against.engine, "conditions": rows}


def _kept(shares: Sequence[float], right: Sequence[bool], right_there: Sequence[bool]) -> dict[str, Any]:
    """Tokens that both keep, and right answers where these are the same ones and where not."""
    facts: dict[str, Any] = {"agree": round(fmean(shares), 5)}
    for name, same in (("same", True), ("other", False)):
        indices = [index for index, share in enumerate(shares) if (share == 1.0) == same]
        facts[name] = {
            "questions": len(indices),
            "right": sum(right[index] for index in indices),
            "right_there": sum(right_there[index] for index in indices),
        }
    return facts


def render_beside(against: Mapping[str, Any]) -> list[str]:
    """A row a condition: points that this model loses against the other one, and what it keeps otherwise."""
    head = ("reducer", "cost", "lost", "95 % interval", "only there", "only here", "p", "other answers", "kept alike")
    cells = []
    for row in against["conditions"]:
        low, high = row["interval"]
        kept = row.get("kept")
        alike = "-" if kept is None else f"{100 * kept['agree']:.2f} %"
        sides = (row["only_first_right"], row["only_second_right"])
        interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
        lost = f"{100 * row['difference']:+.1f}"
        cells.append(
            (row["reducer"], row["cost"], lost, interval, *sides, f"{row['p']:.2g}", row["other_answers"], alike)
        )
    lines = [
        f"Against {against['model']} by {against['engine']}, the same questions: points lost (its % less this one's), "
        "right only there and only here, other answers, visual tokens of its last layer that are kept here, too",
        console.table(head, cells),
    ]
    for row in against["conditions"]:
        other = row.get("kept", {}).get("other", {"questions": 0})
        if other["questions"]:
            lines.append(
                f"{row['reducer']} at cost {row['cost']:g}: {other['questions']} questions keep other tokens, "
                f"{other['right']} of them right, {other['right_there']} there"
            )
    return lines
