"""What every method has to beat: nothing dropped, random tokens, frames left out evenly. Knows labels only."""

from __future__ import annotations

import numpy as np

from framefusion.reducers.reducer import Reading, ReductionRequest, Selection
from framefusion.reduction import tracks
from framefusion.reduction.plan import Mask, top
from framefusion.reduction.tracks import TEXT, IntArray


class KeepAll(Selection):
    """The identity: all tokens at any cost, and an outcome that says so where the cost is below 1."""

    name = "none"
    paper = "no method"
    why_more = "this reducer drops nothing"

    def count(self, request: ReductionRequest) -> int:
        """Every visual token."""
        return request.num_visual

    def choose(self, reading: Reading) -> Mask:
        """Every visual token.  [S]"""
        visual: Mask = reading.labels != TEXT
        return visual


class RandomTokens(Selection):
    """A random subset at call 0, the same for the same seed and number of tokens."""

    name = "random"
    paper = "no method; UniPruneBench, arXiv 2511.02650, shows how strong a baseline it is"

    def choose(self, reading: Reading) -> Mask:
        """The tokens of the highest random numbers.  [S]"""
        scores = np.random.default_rng(reading.request.seed).random(reading.labels.size)
        return top(scores, reading.keep, among=reading.labels != TEXT)


class UniformFrames(Selection):
    """Fewer frames, evenly spaced: what a smaller number of sampled frames would have shown.

    The fewest evenly spaced frames that hold enough tokens stay; m frames of F are those in the middle of m equal
    parts. What they hold beyond the count goes from the last of them, whose tokens are thinned evenly, so that the
    count is exact and the cost comparable.
    """

    name = "uniform"
    paper = "no method; the usual sampling of frames"

    def choose(self, reading: Reading) -> Mask:
        """Whole frames, but for the last one, which is thinned evenly.  [S]"""
        frames = tracks.frame_numbers(reading.labels)
        left = reading.keep
        kept = np.zeros(reading.labels.size, dtype=np.bool_)
        for frame in _spaced_frames(np.bincount(frames[frames >= 0]), reading.keep):
            tokens = np.flatnonzero(frames == frame)
            kept[tokens[evenly(tokens.size, min(left, tokens.size))]] = True
            left -= min(left, tokens.size)
        return kept


def _spaced_frames(sizes: IntArray, keep: int) -> IntArray:
    """The fewest evenly spaced frames whose tokens reach the count, in order."""
    chosen = evenly(sizes.size, min(keep, 1))
    while sizes[chosen].sum() < keep:
        chosen = evenly(sizes.size, chosen.size + 1)
    return chosen


def evenly(size: int, count: int) -> IntArray:
    """Return `count` places among `size`, in the middles of as many equal parts.  [count]"""
    return (2 * np.arange(count) + 1) * size // max(2 * count, 1)
