"""The policy's names, for reducers of other packages. What they are is in framefusion/reduction/policy.py."""

from framefusion.reduction.plan import Mask, Plan, Scores, keep_all, merge_plan, prune_plan, top
from framefusion.reduction.policy import (
    CallRecord,
    Decision,
    FixedReduction,
    Reduction,
    ReductionSettings,
    ReductionState,
)

__all__ = [
    "CallRecord",
    "Decision",
    "FixedReduction",
    "Mask",
    "Plan",
    "Reduction",
    "ReductionSettings",
    "ReductionState",
    "Scores",
    "keep_all",
    "merge_plan",
    "prune_plan",
    "top",
]
