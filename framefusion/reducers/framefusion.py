"""FrameFusion behind the interface. The algorithm is framefusion.reduction.policy.Reduction; nothing of it is here."""

from __future__ import annotations

from framefusion.reducers.reducer import Reducer, ReductionRequest
from framefusion.reduction.policy import Reduction, ReductionSettings, ReductionState


class FrameFusion(Reducer):
    """Merge similar tokens of neighbouring frames call after call, then prune unimportant ones once."""

    name = "framefusion"
    paper = "FrameFusion, arXiv 2501.01986"
    merges = True
    query_agnostic = False
    inputs = frozenset({"similarity", "importance"})

    def calls(self, settings: ReductionSettings) -> tuple[int, ...]:
        """Before the LLM and after the attention of layers 0 .. depth."""
        return tuple(range(settings.depth + 2))

    def _start(self, request: ReductionRequest) -> ReductionState:
        return Reduction(request.settings, request.labels)
