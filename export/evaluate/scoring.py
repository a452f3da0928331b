"""Right answers to shares with intervals, and two ways of answering compared on the same questions. Plain numbers only.

A share has Wilson's score interval. Two conditions that answered the same questions are compared by the questions on
which they differ: McNemar's exact test, and Newcombe's interval of the paired difference (Statistics in Medicine 17,
1998, method 10: Wilson's intervals joined by the correlation of the pairs, continuity-corrected).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054
"""Of a two-sided interval of 95 %."""


def wilson(right: int, total: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a share; [0, 1] of nothing."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    spread = z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided p of the exact test: as many of the differing questions go to one side by a fair coin, or more."""
    differing = first_only + second_only
    fewer = min(first_only, second_only)
    tail = 0
    ways = 1
    for k in range(fewer + 1):
        tail = tail + ways
        ways = ways * (differing - k) // (k + 1)  # binomial coefficients, one from the other
    return min(2 * tail / (1 << differing), 1.0)  # of integers, so that no count overflows


def newcombe(both: int, first_only: int, second_only: int, neither: int, z: float = Z) -> tuple[float, float]:
    """Interval of the difference of two shares of the same questions, first less second: method 10 of the source above.

    Args:
        both, first_only, second_only, neither: how many of the questions each answered right.
        z: see `Z`.
    """
    total = both + first_only + second_only + neither
    first = both + first_only
    second = both + second_only
    rooms = first * (total - first) * second * (total - second)
    product = both * neither - first_only * second_only
    joint = max(product - total / 2, 0.0) if product > 0 else product  # continuity-corrected
    phi = joint / math.sqrt(rooms) if rooms else 0.0
    first_low, first_high = wilson(first, total, z)
    second_low, second_high = wilson(second, total, z)
    first_share = first / total
    second_share = second / total
    difference = (first_only - second_only) / total
    below = _joined(first_share - first_low, second_high - second_share, phi)
    above = _joined(first_high - first_share, second_share - second_low, phi)
    return difference - below, difference + above


def _joined(first: float, second: float, phi: float) -> float:
    """The length of two distances at a correlation of `phi`."""
    return math.sqrt(max(first * first - 2 * phi * first * second + second * second, 0.0))


def share_of(right: Sequence[bool]) -> dict[str, object]:
    """How many of some answers are right, and what that says of the share."""
    count = sum(right)
    total = len(right)
    low, high = wilson(count, total)
    return {
        "questions": total,
        "right": count,
        "accuracy": count / total if total else 0.0,
        "interval": [round(low, 6), round(high, 6)],
    }


def paired(first: Sequence[bool], second: Sequence[bool]) -> dict[str, object]:
    """Two conditions on the same questions, in the same order; the difference is the first's share less the second's.

    Raises:
        ValueError: they answered different numbers of questions, or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} answers are not of the same questions")
    both = sum(map(min, first, second))
    neither = len(first) - sum(map(max, first, second))
    first_only = sum(first) - both
    second_only = sum(second) - both
    low, high = newcombe(both, first_only, second_only, neither)
    return {
        "only_first_right": first_only,
        "only_second_right": second_only,
        "difference": (first_only - second_only) / len(first),
        "interval": [round(low, 6), round(high, 6)],
        "p": mcnemar(first_only, second_only),
    }


def kept_alike(mine: Sequence[str], theirs: Sequence[str]) -> list[float] | None:
    """Of each question the share of the tokens that another model keeps which are kept here, too.

    Args:
        mine: a bit for each visual token, in hex (`answering.Answer.kept`), one text a question.
        theirs: of the other model.

    Returns:
        None where a text is missing or the two are of different numbers of tokens: there is nothing to compare.
    """
    if any(not ours or len(ours) != len(others) for ours, others in zip(mine, theirs, strict=True)):
        return None
    shares = []
    for ours, others in zip(mine, theirs, strict=True):
        both = (int(ours, 16) & int(others, 16)).bit_count()
        shares.append(both / max(int(others, 16).bit_count(), 1))
    return shares
