"""Repeated decisions say how far the scores behind them are, also where a score is no number."""

from __future__ import annotations

import numpy as np
import pytest

from framefusion.export.check.replay import Replayed
from framefusion.reduction.plan import keep_all
from framefusion.reduction.policy import Decision
from framefusion.reduction.tracks import DISSIMILAR

LABELS = np.array([-1, 0, 0, -1])
SIMILARITY = np.array([DISSIMILAR, DISSIMILAR, 0.5, DISSIMILAR], np.float32)
IMPORTANCE = np.array([0.1, 0.2, 0.3, 0.4], np.float32)


@pytest.mark.parametrize("broken", ["similarity", "importance"])
@pytest.mark.parametrize("value", [np.nan, 0.9])
def test_wrong_scores_are_errors(broken: str, value: float) -> None:
    replayed = Replayed(LABELS, [Decision(SIMILARITY, IMPORTANCE, keep_all(LABELS))] * 2)
    ours = {"similarity": SIMILARITY.copy(), "importance": IMPORTANCE.copy()}
    ours[broken][2] = value
    replayed.step(**ours)
    replayed.step(SIMILARITY, IMPORTANCE)  # a right call after it takes nothing back
    for name, error in replayed.errors.items():
        assert (error <= 1e-6) == (name != broken), name


def test_importance_of_zeros_is_not_the_same_as_another() -> None:
    replayed = Replayed(LABELS, [Decision(None, IMPORTANCE, keep_all(LABELS))])
    replayed.step(None, np.zeros_like(IMPORTANCE))
    assert replayed.errors["importance"] > 0.3
