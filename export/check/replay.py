"""A reduction's decisions in one model repeated in another, to compare the two token for token.

In half precision two similarities can be nearer to each other than rounding: two models that agree then keep different
tokens, and their logits say nothing of each other. Repeating the decisions keeps the tokens the same, and the scores
that the decisions were made from can be compared number by number. Knows no bundle and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from framefusion.reduction.plan import Plan
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
