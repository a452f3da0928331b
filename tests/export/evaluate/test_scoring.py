"""Intervals and tests of the evaluation against published examples, their defining equations, and enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framefusion.export.evaluate.scoring import Z, mcnemar, newcombe, paired, share_of, wilson

COUNTS = st.integers(0, 60)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_newcombes_examples(right: int, total: int, low: float, high: float) -> None:
    """Statistics in Medicine 17 (1998) 857, table I."""
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 500), st.integers(1, 500))
def test_bounds_of_wilson_are_the_shares_that_a_score_test_just_accepts(right: int, more: int) -> None:
    total = right + more
    for bound in wilson(right, total):
        assert (right / total - bound) ** 2 == pytest.approx(Z**2 * bound * (1 - bound) / total, abs=1e-12)


def test_nothing_asked_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert share_of([])["accuracy"] == 0.0


@pytest.mark.parametrize("sides", [(0, 0), (0, 1), (1, 5), (3, 3), (2, 9), (7, 4)])
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_uneven(sides: tuple[int, int]) -> None:
    tosses = list(itertools.product((0, 1), repeat=sum(sides)))
    uneven = [abs(2 * sum(toss) - len(toss)) >= abs(sides[0] - sides[1]) for toss in tosses]
    assert mcnemar(*sides) == sum(uneven) / len(tosses)


def test_mcnemar_of_many_questions_neither_overflows_nor_rounds_to_nothing() -> None:
    assert mcnemar(5000, 5000) == 1.0
    assert 0 < mcnemar(0, 1000) < 1e-300


def test_newcombes_interval_gives_his_example() -> None:
    """Statistics in Medicine 17 (1998) 2635, table III, method 10 of the pairs 36, 12, 2, 0."""
    assert newcombe(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)


@given(COUNTS, COUNTS, COUNTS, COUNTS)
def test_newcombes_interval_holds_the_difference_and_turns_with_the_sides(a: int, b: int, c: int, d: int) -> None:
    if a + b + c + d == 0:
        return
    low, high = newcombe(a, b, c, d)
    assert -1 - 1e-12 <= low <= (b - c) / (a + b + c + d) <= high <= 1 + 1e-12
    assert newcombe(a, c, b, d) == pytest.approx((-high, -low))


def test_newcombes_interval_covers_as_often_as_it_says() -> None:
    """2000 evaluations of 150 questions: 0.95 within 4 standard errors (0.0195) of chance."""
    shares = np.array([0.8, 0.12, 0.04, 0.04])
    truth, random = 0.12 - 0.04, np.random.default_rng(0)
    bounds = [newcombe(*map(int, drawn)) for drawn in random.multinomial(150, shares, 2000)]
    covered = np.mean([low <= truth <= high for low, high in bounds])
    assert abs(covered - 0.95) < 0.0195


def test_paired_counts_the_sides() -> None:
    found = paired([True, True, False, False, True], [True, False, True, False, False])
    assert (found["only_first_right"], found["only_second_right"]) == (2, 1)
    assert found["difference"] == pytest.approx(0.2)
    assert found["p"] == 1.0
    with pytest.raises(ValueError, match="not of the same questions"):
        paired([True], [])


def test_a_share_has_its_counts() -> None:
    found = share_of([True] * 8 + [False] * 2)
    assert (found["questions"], found["right"], found["accuracy"]) == (10, 8, 0.8)
    assert found["interval"] == pytest.approx([0.4902, 0.9433], abs=5e-5)
