"""EVS-like: before the LLM, drop what did not change since the frame before. Knows similarity and counts only."""

from __future__ import annotations

import numpy as np

from framefusion.reducers.reducer import Reading, ReductionRequest, Selection
from framefusion.reduction import tracks
from framefusion.reduction.plan import Mask, top
from framefusion.reduction.tracks import TEXT


class EVS(Selection):
    """Keep the first frame and the tokens that differ most from the frame before (Bagrov et al., arXiv 2510.14624).

    One threshold for the whole video, at the quantile of the differences that meets the cost: the tokens of the largest
    difference stay, ties go to the earlier one. The first token of each track has nothing before it and always stays,
    also where the cost pays for less; then the outcome says so.

    One deviation. The paper's difference is L1 between the pixels of patches; pixels do not reach the LLM, so it is one
    minus the cosine of the tokens' embeddings, as in the servers that offer EVS (vLLM, SGLang).
    """

    name = "evs"
    paper = "Efficient Video Sampling, arXiv 2510.14624"
    inputs = frozenset({"similarity"})
    why_more = "the first frame always stays"

    def count(self, request: ReductionRequest) -> int:
        """What the cost pays for, but no less than the first tokens of all tracks."""
        return max(super().count(request), tracks.count_tracks(request.labels))

    def choose(self, reading: Reading) -> Mask:
        """The first tokens of all tracks, whose similarity is lowest of all, and the least similar ones.  [S]"""
        assert reading.similarity is not None
        first = tracks.previous_in_track(reading.labels) < 0
        change = np.where(first, np.inf, 1 - reading.similarity)
        return top(change, reading.keep, among=reading.labels != TEXT, within=1 - tracks.IDENTICAL)
