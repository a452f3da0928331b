"""Repeated decisions say how far the scores behind them are, also where a score is no number, and what changes so."""

from __future__ import annotations

import numpy as np
import pytest

from framefusion.export.check.replay import Redecided, Redecision, Replayed
from framefusion.reduction.plan import keep_all
from framefusion.reduction.policy import Decision, Reduction, ReductionSettings
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


def test_each_decision_is_taken_anew_by_other_scores_over_the_tokens_that_were_kept() -> None:
    # 1. a track of eight tokens: two merge by the threshold, one call later three of six stay by their importance
    settings = ReductionSettings(0.5, 0.5, 0.3, num_layers=12, depth=4)
    labels = np.array([-1, *[0] * 8, -1])
    similarity = np.array([-2, -2, 0.9, 0.1, 0.6, 0.2, 0.1, 0.1, 0.1, -2], np.float32)
    importance = np.array([0, 8, 7, 6, 5, 4, 3, 0], np.float32)
    theirs = Reduction(settings, labels)
    decisions: list[Decision] = []
    theirs.observer = decisions.append
    theirs.step(similarity, None)
    theirs.step(None, importance)
    assert [decision.plan.kind for decision in decisions] == ["merge", "prune"]
    # 2. the same scores decide the same
    same = Redecided(Reduction(settings, labels), decisions)
    same.step(similarity, None)
    same.step(None, importance)
    assert [redecision.otherwise for redecision in same.redecisions] == [0, 0]
    # 3. a similarity over the threshold, and two importances that change places
    others = similarity.copy()
    others[5] = 0.51
    swapped = importance.copy()
    kept = int(np.count_nonzero(labels[decisions[0].plan.kept] == 0))
    stay = decisions[1].plan.kept[1:-1]
    gone = next(place for place in range(1, kept + 1) if place not in stay)
    swapped[[stay[0], gone]] = swapped[[gone, stay[0]]]
    mine = Redecided(Reduction(settings, labels), decisions)
    assert np.array_equal(mine.step(others, None).kept, decisions[0].plan.kept)
    mine.step(None, swapped)
    first, last = mine.redecisions
    assert first == Redecision(0, "merge", False, 8, 2, 1)
    assert last == Redecision(1, "prune", True, 6, 6 - len(stay), 2)


def test_decisions_of_another_policy_are_refused() -> None:
    settings = ReductionSettings(0.5, 0.5, 0.3, num_layers=12, depth=4)
    labels = np.array([-1, *[0] * 8, -1])
    similarity = np.array([-2, -2, 0.9, 0.1, 0.6, 0.2, 0.1, 0.1, 0.1, -2], np.float32)
    state = Redecided(Reduction(settings, labels), [Decision(similarity, None, keep_all(labels))])
    with pytest.raises(ValueError, match="call 0: these decisions are not those of this policy"):
        state.step(similarity, None)
