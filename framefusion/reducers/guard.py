"""What is enforced of every reducer after each of its decisions, whoever wrote it.

Text stays, kept tokens ascend and are there once, runs of a merge are whole; what is declared is neither exceeded nor
missed; and nothing is left undone without a word. A breach is a ReducerError that names reducer, call, what was found
and what was expected. Knows no method and no budget but the cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

import numpy as np

from framefusion.errors import ReducerError
from framefusion.reduction.plan import Mask, Plan
from framefusion.reduction.policy import ReductionState
from framefusion.reduction.tracks import TEXT, IntArray

Input = Literal["similarity", "importance", "features"]


@dataclass(frozen=True)
class ReducerGuard:
    """What one reducer declared for one request: a framefusion.reduction.policy.Guard."""

    name: str
    merges: bool
    inputs: frozenset[Input]
    calls: frozenset[int]
    counts: Mapping[int, int] | None  # visual tokens after a call
    num_visual: int  # before the first
    cost: float

    def before(self, state: ReductionState) -> None:
        """Refuse what was not declared or cannot be given.

        Raises:
            ReducerError: scores that the reducer does not declare, at a call that it does not declare or without them.
        """
        wants = {"similarity": state.wants_similarity, "importance": state.wants_importance}
        wants["features"] = state.wants_features
        for what, wanted in wants.items():
            if wanted and what not in self.inputs:
                self._refuse(state, f"asks for {what}", f"only {', '.join(sorted(self.inputs)) or 'nothing'}")
            if wanted and state.call not in self.calls:
                self._refuse(state, f"asks for {what}", f"nothing outside its calls {sorted(self.calls)}")
        if state.wants_features and state.call > 0:
            self._refuse(state, "asks for features", "them at call 0 alone, where hidden states enter the LLM")
        if state.wants_importance and state.call == 0:
            self._refuse(state, "asks for importance", "it from call 1 on, behind an attention")

    def after(self, state: ReductionState, plan: Plan) -> None:
        """Refuse a plan that breaks a promise.

        Raises:
            ReducerError: indices that are not valid, text that goes, counts or kinds other than declared.
        """
        labels = state.labels
        kept = plan.kept
        if kept.ndim != 1 or kept.dtype.kind not in "iu":
            self._refuse(state, f"kept tokens of shape {kept.shape} and type {kept.dtype}", "one row of indices")
        if kept.size and (kept[0] < 0 or kept[-1] >= labels.size or (np.diff(kept) <= 0).any()):
            self._refuse(state, f"kept tokens {_few(kept)}", f"ascending indices below {labels.size}, each once")
        dropped = np.ones(labels.size, dtype=np.bool_)
        dropped[kept] = False
        text = np.flatnonzero(dropped & (labels == TEXT))
        if text.size:
            self._refuse(state, f"{text.size} tokens of text dropped, the first at {text[0]}", "all text kept")
        self._check_merge(state, plan, dropped)
        gone = int(np.count_nonzero(dropped))
        if (plan.kind == "none") != (gone == 0):
            self._refuse(state, f"a plan of kind {plan.kind} that drops {gone} tokens", "the kind to say what it does")
        if gone and state.call not in self.calls:
            self._refuse(state, f"{gone} tokens dropped", f"none outside its calls {sorted(self.calls)}")
        left = state.num_visual - gone
        expected = None if self.counts is None else self.counts.get(state.call)
        if expected is not None and left != expected:
            self._refuse(state, f"{left} of {state.num_visual} visual tokens left", f"{expected}, as it declares")
        self._check_done(state, left)

    def _check_merge(self, state: ReductionState, plan: Plan, dropped: Mask) -> None:
        """Whether the runs of a merge are whole: each begins with a kept token, and all others of it are dropped."""
        if plan.kind != "merge":
            if plan.members.size or plan.heads.size:
                self._refuse(state, f"runs in a plan of kind {plan.kind}", "them in a merge alone")
            return
        if not self.merges:
            self._refuse(state, "a merge", "tokens kept or dropped: it declares that it does not merge")
        members = plan.members
        starts = plan.run_starts
        matching = starts.size == plan.heads.size and starts.size > 0
        ascending = matching and starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < members.size
        if not ascending or members.min() < 0 or members.max() >= dropped.size:
            self._refuse(
                state, f"{starts.size} runs for {plan.heads.size} heads", "a run for each, members within range"
            )
        joined = np.delete(members, starts)
        if (members[starts] != plan.heads).any() or dropped[plan.heads].any() or not dropped[joined].all():
            self._refuse(state, "runs that do not begin with a kept token alone", "heads kept, the others dropped")
        if np.unique(members).size < members.size or (state.labels[members] == TEXT).any():
            self._refuse(state, "runs that overlap or hold text", "each visual token in one run at most")

    def _check_done(self, state: ReductionState, left: int) -> None:
        """A request does not end before its last count, nor with all tokens kept and nothing said if some should go."""
        for call, count in (self.counts or {}).items():
            if state.finished and call > state.call and count != left:
                self._refuse(state, f"the end, with {left} visual tokens left", f"{count} after call {call}")
        over = state.finished or state.call >= max(self.calls, default=0)
        start = self.num_visual
        cost = self.cost
        explained = state.outcome or any(record.outcome for record in state.history)
        if over and left == start and start * (1 - cost) > 1 and not explained:
            self._refuse(
                state, f"all {start} visual tokens kept at cost {cost:g}", "fewer, or an outcome that says why"
            )

    def _refuse(self, state: ReductionState, observed: str, expected: str) -> NoReturn:
        raise ReducerError(
            f"reducer {self.name} at call {state.call}: found {observed}, expected {expected}: "
            "the method is at fault, take another with --reducer"
        )


def _few(values: IntArray) -> str:
    return np.array2string(values, threshold=6, edgeitems=3, separator=", ")
