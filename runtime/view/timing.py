"""How long an answer took beside one with every token, and the sentence that a page begins with.

Runs alternate, and the median of each counts; where the runs of one overlap those of the other, or differ by little,
nothing is claimed. Knows no page and runs no model.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from framefusion.runtime.request import Generation

ROUNDS = 3
PATIENCE_SECONDS = 10.0
"""Where one prefill with every token takes longer, each is run once."""
SHARED = ("video", "preprocess", "vision", "embed")
MEASURED = ("prefill", "reduction")
NOISE = 1.05
"""A smaller ratio is none where it is said with one decimal, as 1.0x would be."""
Spread = tuple[float, float, float]
"""Least, median and most seconds of the runs."""


@dataclass
class Timings:
    """Seconds of the runs of both ways.

    Attributes:
        shared: by stage, before the language model.
        reduced, dense: by stage, one mapping a run.
    """

    shared: Mapping[str, float]
    reduced: list[Mapping[str, float]] = field(default_factory=list)
    dense: list[Mapping[str, float]] = field(default_factory=list)


def timing_facts(timings: Timings, reduced: Generation, dense: Generation | None) -> dict[str, Any]:
    """What a page shows of the time, as plain values.

    Returns:
        rounds; for each way its stages until the first token, its first token (median, least, most) and seconds of each
        further token, None where there is none; and whether the two are level.
    """
    ours = _way(timings.shared, timings.reduced, reduced)
    if dense is None:
        return {"rounds": len(timings.reduced), "reduced": ours, "dense": None, "level": False, "ratio": None}
    theirs = _way(timings.shared, timings.dense, dense)
    ratio = theirs["first"]["median"] / ours["first"]["median"]
    level = are_level(_spread(ours["first"]), _spread(theirs["first"]))
    return {"rounds": len(timings.reduced), "reduced": ours, "dense": theirs, "level": level, "ratio": ratio}


def are_level(first: Spread, second: Spread, noise: float = NOISE) -> bool:
    """Whether two measurements show no difference: their runs overlap, or their medians differ by less than `noise`."""
    (least, median, most) = first
    (other_least, other_median, other_most) = second
    overlap = least <= other_most and other_least <= most
    return overlap or max(median / other_median, other_median / median) < noise


def _spread(first: Mapping[str, float]) -> Spread:
    return first["least"], first["median"], first["most"]


def _way(shared: Mapping[str, float], runs: Sequence[Mapping[str, float]], answer: Generation) -> dict[str, Any]:
    before = {stage: shared[stage] for stage in SHARED if stage in shared}
    behind = {stage: statistics.median(run.get(stage, 0.0) for run in runs) for stage in MEASURED}
    firsts = [sum(before.values()) + sum(run.get(stage, 0.0) for stage in MEASURED) for run in runs]
    further = len(answer.token_ids) - 1
    return {
        "stages": before | behind,
        "first": {"median": statistics.median(firsts), "least": min(firsts), "most": max(firsts)},
        "token": answer.seconds.get("decode", 0.0) / further if further > 0 else None,
    }


def headline(timing: Mapping[str, Any], reduced: Generation, dense: Generation | None) -> list[dict[str, Any]]:
    """The saving and the sameness, in parts; those that are strong are what the page is about."""
    if not reduced.visual_tokens:
        return [_said("An answer about text, in which there is nothing to reduce")]
    kept = reduced.kept_tokens / reduced.visual_tokens
    share = f"{kept:.1%}" if kept < 0.0995 else f"{kept:.0%}"
    if kept == 1:
        return [_said("Every visual token was kept")]
    if dense is None:
        return [_said(f"{share} of the visual tokens", strong=True), _said("and this answer")]
    ratio = timing["ratio"]
    once = timing["rounds"] < 2  # of a single run nobody knows the spread: it is said, and is no claim
    if timing["level"]:
        speed = _said("First token as soon as with every token")
    elif ratio > 1:
        speed = _said(f"{ratio:.1f}x faster first token{', timed once' if once else ''}", strong=not once)
    else:
        speed = _said(f"First token {1 / ratio:.1f}x slower{', timed once' if once else ''}")
    same = reduced.token_ids == dense.token_ids
    return [
        speed,
        _said("same answer" if same else "another answer", strong=same),
        _said(f"{share} of the visual tokens"),
    ]


def _said(text: str, *, strong: bool = False) -> dict[str, Any]:
    return {"text": text, "strong": strong}
