"""FastV: one prune by attention after an early layer. Knows importance and counts only."""

from __future__ import annotations

from framefusion.reducers.reducer import Reading, Selection
from framefusion.reduction.plan import Mask, top
from framefusion.reduction.policy import ReductionSettings
from framefusion.reduction.tracks import TEXT

LAYERS = 2  # K of the paper: layers that see all tokens


class FastV(Selection):
    """Drop the visual tokens of least attention after layer K, all at once (Chen et al., arXiv 2403.06764).

    K is 2, the paper's choice. It is 1 where `depth` is 0, and where layers 0 and 1 alone would spend the cost; the
    share R that is dropped follows from K and the cost.

    Two deviations. The paper's score is the attention that a token receives from all tokens, averaged over them; its
    released code, and so ours, takes the last token's alone, mean over heads (families whose importance has several
    rows take the mean of those). The paper drops before layer K; here it is after the attention of layer K-1, before
    its MLP, where all reductions of this package act.
    """

    name = "fastv"
    paper = "FastV, arXiv 2403.06764"
    query_agnostic = False
    inputs = frozenset({"importance"})

    def call(self, settings: ReductionSettings) -> int:
        """K: the call that follows the attention of layer K-1."""
        affordable = settings.cost * settings.num_layers > LAYERS
        return min(LAYERS, settings.depth + 1) if affordable else 1

    def choose(self, reading: Reading) -> Mask:
        """The visual tokens of highest attention.  [S]"""
        assert reading.importance is not None
        return top(reading.importance, reading.keep, among=reading.labels != TEXT)
