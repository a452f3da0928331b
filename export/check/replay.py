"""A reduction's decisions in one model repeated in another, to compare the two token for token.

In half precision two similarities can be nearer to each other than rounding: two models that agree then keep different
tokens, and their logits say nothing of each other. Repeating the decisions keeps the tokens the same, and the scores
that the decisions were made from can be compared number by number. What a model would have decided by its own scores at
each of these calls, over the tokens that the other one had kept, is compared call by call (`Redecided`): a difference
counts where it arises, and not again wherever it leads to. Knows no bundle and no model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from framefusion.reduction.plan import Kind, Plan
from framefusion.reduction.policy import Decision, ReductionState
from framefusion.reduction.tracks import DISSIMILAR

Scores = npt.NDArray[np.float32]


class Replayed(ReductionState):
    """The decisions of another model, whatever the scores are here; `errors` says how far they are from those there."""

    def __init__(self, labels: npt.ArrayLike, decisions: Sequence[Decision]) -> None:
        super().__init__(labels)
        self._decisions = decisions
        self._errors: dict[str, float] = {}
        self.finished = not decisions

    @property
    def errors(self) -> Mapping[str, float]:
        """Largest difference of each kind of score: cosines as they are, importance as a share of the largest one."""
        return self._errors

    @property
    def wants_similarity(self) -> bool:
        """Whether the other model read it."""
        return not self.finished and self._decisions[self.call].similarity is not None

    @property
    def wants_importance(self) -> bool:
        """Whether the other model read it."""
        return not self.finished and self._decisions[self.call].importance is not None

    def _decide(self, similarity: Scores | None, importance: Scores | None, features: Scores | None) -> Plan:
        theirs = self._decisions[self.call]
        if theirs.similarity is not None:
            mine = self._scores("similarity", similarity)
            comparable = theirs.similarity > DISSIMILAR
            self._note("similarity", mine[comparable], theirs.similarity[comparable], 1.0)
        if theirs.importance is not None:
            mine = self._scores("importance", importance)
            self._note("importance", mine, theirs.importance, float(mine.max(initial=0)))
        self.finished = self.call + 1 == len(self._decisions)
        return theirs.plan

    def _note(self, name: str, ours: Scores, theirs: Scores, scale: float) -> None:
        error = float(np.abs(ours - theirs).max(initial=0)) / (scale or 1.0)
        self._errors[name] = float(np.maximum(self._errors.get(name, 0.0), error))  # of a NaN, NaN


@dataclass(frozen=True)
class Redecision:
    """A decision of another model beside what the scores here would have decided, over the same tokens.

    Attributes:
        call: its number.
        kind: what the other model did.
        last: it was the reduction's last, which meets the budget by rank; else a threshold decided.
        visual: tokens that were present and might go.
        dropped: of these, by the other model.
        otherwise: of these, kept by one of the two and dropped by the other.
    """

    call: int
    kind: Kind
    last: bool
    visual: int
    dropped: int
    otherwise: int


class Redecided(Replayed):
    """The decisions of another model, as above, and beside each what the scores here would have decided in its place.

    Args:
        policy: of the same request, at its beginning; it is led along the other model's decisions by their scores.
        decisions: of the other model.
    """

    def __init__(self, policy: ReductionState, decisions: Sequence[Decision]) -> None:
        super().__init__(policy.labels, decisions)
        self._policy = policy
        self.redecisions = list[Redecision]()

    def _decide(self, similarity: Scores | None, importance: Scores | None, features: Scores | None) -> Plan:
        theirs = self._decisions[self.call]
        self._policy.pass_over(self.call)
        mine = copy.deepcopy(self._policy).step(similarity, importance, features)
        led = self._policy.step(theirs.similarity, theirs.importance, features)
        if not np.array_equal(led.kept, theirs.plan.kept):
            raise ValueError(f"call {self.call}: these decisions are not those of this policy by these scores")
        visual = int(np.count_nonzero(self.labels >= 0))
        dropped = self.labels.size - theirs.plan.kept.size
        otherwise = int(np.setxor1d(mine.kept, theirs.plan.kept).size)
        last = self._policy.finished
        self.redecisions.append(Redecision(self.call, theirs.plan.kind, last, visual, dropped, otherwise))
        return super()._decide(similarity, importance, features)
