"""What quantized weights cost in answers: a bundle beside the same one with floats, on a user's questions.

Both answer each question at cost 1 and at the bundle's own; points are hundredths of the questions. The difference has
Newcombe's interval, so that a few questions are not taken for more than they are. Builds no bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from framefusion.errors import CheckFailedError, EvaluationError
from framefusion.export.evaluate.answering import Condition, Setup, default_condition
from framefusion.export.evaluate.evaluation import answer_all
from framefusion.export.evaluate.questions import Question
from framefusion.export.evaluate.scoring import newcombe
from framefusion.runtime.format.manifest import LossRecord

POINTS = 100
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Acceptance:
    """What a quantized build may cost.

    Attributes:
        questions: that both bundles answer.
        points: most points that may be lost at any cost.

    Raises:
        EvaluationError: there is no question.
    """

    questions: tuple[Question, ...]
    points: float

    def __post_init__(self) -> None:
        if not self.questions:
            raise EvaluationError("no question to compare quantized weights by: give a file with one or more")


def points_lost(
    quantized: Path, floats: Path, questions: Sequence[Question], on_progress: OnProgress = lambda *_: None
) -> tuple[LossRecord, ...]:
    """Shares of right answers of two bundles, and how they differ.

    Args:
        quantized: the bundle.
        floats: the same with the checkpoint's weights.
        questions: each once.
        on_progress: called with the answers that there are, and how many there will be.

    Returns:
        one record for each condition.

    Raises:
        FrameFusionError: a question cannot be answered; it is named.
    """
    default = default_condition(Setup(str(quantized)))
    conditions = list(dict.fromkeys((Condition(default.reducer, 1.0), default)))
    total = 2 * len(questions)
    right: dict[Path, list[list[bool]]] = {}
    done = 0
    for folder in (floats, quantized):
        right[folder] = [[] for _ in conditions]
        for answered in answer_all(Setup(str(folder)), [(question, conditions) for question in questions], jobs=1):
            for verdicts, answer in zip(right[folder], answered.answers, strict=True):
                verdicts.append(answered.question.is_right(answer.text))
            done += 1
            on_progress(done, total)
    pairs = zip(conditions, right[floats], right[quantized], strict=True)
    return tuple(_record(condition, first, second) for condition, first, second in pairs)


def _record(condition: Condition, floats: Sequence[bool], quantized: Sequence[bool]) -> LossRecord:
    first_only = sum(mine and not theirs for mine, theirs in zip(floats, quantized, strict=True))
    second_only = sum(theirs and not mine for mine, theirs in zip(floats, quantized, strict=True))
    both = sum(floats) - first_only
    low, high = newcombe(both, first_only, second_only, len(floats) - both - first_only - second_only)
    return LossRecord(
        condition.reducer,
        condition.cost,
        len(floats),
        sum(floats),
        sum(quantized),
        *(round(POINTS * share, 3) for share in ((first_only - second_only) / len(floats), low, high)),
    )


def check_loss(losses: Sequence[LossRecord], points: float, folder: Path) -> None:
    """Refuse a bundle that loses more.

    Args:
        losses: of `points_lost`.
        points: most that may be lost.
        folder: of the bundle, for the message.

    Raises:
        CheckFailedError: naming the cost and the points.
    """
    worst = max(losses, key=lambda loss: loss.points)
    if worst.points <= points:
        return
    raise CheckFailedError(
        f"{folder} loses {worst.points:.1f} points at cost {worst.cost:g} (of {worst.questions} questions "
        f"{worst.right_in_floats} are answered right in floats, {worst.right_quantized} quantized; 95 % interval "
        f"{worst.low:.1f} to {worst.high:.1f}), --max-points-lost is {points:g}; it was not published: take int8, "
        "smaller blocks or +zero, or allow more"
    )


def doubt(losses: Sequence[LossRecord], points: float) -> str:
    """A sentence where so few questions do not show that no more is lost than is accepted; "" where they do."""
    widest = max(losses, key=lambda loss: loss.high)
    if widest.high <= points:
        return ""
    return (
        f"{widest.questions} questions do not show that at most {points:g} points are lost: at cost {widest.cost:g} "
        f"the 95 % interval reaches {widest.high:.1f}; more questions make it narrower"
    )
