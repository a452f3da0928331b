"""The policy: two short vectors in, a plan out.  The page to read first.

Which tokens merge and which survive is decided here and nowhere else, from the similarity of each token to the one
before it in its track and the importance the last query gives it. The live torch model and every runtime call `step`
between an attention and an MLP and then only apply the plan:

    call 0       before the attention of layer 0: similarity of the embeddings, no importance yet
    call i >= 1  after the attention of layer i-1, before its MLP: its importance, similarity of its residual stream

A reduction merges call after call while enough tokens are alike, then prunes once, one call later, to meet the budget.
Tokens of label -1 are never dropped, kept tokens keep their order, ties go to the lower index.

This is FrameFusion. Other methods are behind the same state and the same plan: framefusion.reducers.

Knows numpy only: no model, no layer, no tensor but the two vectors (apply_plan is what becomes of hidden states).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from framefusion.errors import BudgetError
from framefusion.reduction import budget, tracks
from framefusion.reduction.tracks import TEXT, FloatArray, IntArray

Kind = Literal["none", "merge", "prune"]
Scores = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]

_NOTHING: IntArray = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class ReductionSettings:
    """What the adaptive policy is asked: the paper's three numbers, and what the model and the bundle allow.

    Attributes:
        cost: share of the computation over visual tokens that is kept, in (0, 1].
        similarity_lower_bound: tokens at least this similar to the one before them merge, in [-1, 1].
        ratio_lower_bound: merging ends after a call that merges a smaller share than this, in [0, 1).
        num_layers: L, the model's own layer count.
        depth: D, the deepest layer whose attention a reduction may follow: calls 0 .. D may merge, D+1 is the last.
    """

    cost: float
    similarity_lower_bound: float
    ratio_lower_bound: float
    num_layers: int
    depth: int

    def __post_init__(self) -> None:
        if self.num_layers < 2:
            raise BudgetError(f"num_layers {self.num_layers} is below 2; nothing can be saved inside so short a model")
        if not 0 <= self.depth <= self.num_layers - 2:
            raise BudgetError(
                f"depth {self.depth} is outside 0 .. {self.num_layers - 2} for {self.num_layers} layers; "
                "a reduction after the last attention saves nothing"
            )
        if not -1 <= self.similarity_lower_bound <= 1:
            raise BudgetError(f"similarity_lower_bound {self.similarity_lower_bound} is outside [-1, 1], as cosines go")
        if not 0 <= self.ratio_lower_bound < 1:
            raise BudgetError(f"ratio_lower_bound {self.ratio_lower_bound} is outside [0, 1); it is a share of tokens")
        budget.check_cost(self.cost, budget.smallest_cost(self.num_layers))


@dataclass(frozen=True)
class Plan:
    """What becomes of the tokens at one call, in indices into the tokens given.

    Attributes:
        kind: "none" keeps all as they are.
        kept: tokens that stay, ascending.  [K]
        heads: kept tokens that become the mean of a run, in track order.  [R]
        members: each head followed by the tokens that merge into it, run after run.  [M]
        run_starts: where each run begins in members, as np.add.reduceat wants it.  [R]
    """

    kind: Kind
    kept: IntArray
    heads: IntArray
    members: IntArray
    run_starts: IntArray


@dataclass(frozen=True)
class CallRecord:
    """What one call did, in counts; `outcome` names what a method could not do as asked, and why."""

    call: int
    kind: Kind
    tokens_before: int
    tokens_after: int
    visual_before: int
    visual_after: int
    outcome: str = ""


@dataclass(frozen=True)
class Decision:
    """One call: the scores it read, and what it did."""

    similarity: Scores | None
    importance: Scores | None
    plan: Plan


Observer = Callable[[Decision], None]


class Guard(Protocol):
    """What is told of each call before and after it is decided, and may refuse it: framefusion.reducers' checks."""

    def before(self, state: ReductionState) -> None:
        """The call is about to be decided."""

    def after(self, state: ReductionState, plan: Plan) -> None:
        """The call was decided, its plan not yet taken as done."""


class ReductionState(ABC):
    """One request on its way through the calls: the tokens present and what was done to them so far.

    `observer`, where one is set, is told each call that decides; nothing is copied or kept without one. `outcome` is
    what the call being decided has to say for itself: see CallRecord.
    """

    observer: Observer | None = None
    guard: Guard | None = None
    outcome: str = ""

    def __init__(self, labels: npt.ArrayLike) -> None:
        self.labels = tracks.request_labels(labels)  # of the tokens present
        self.shares: list[float] = []  # of the visual tokens present, dropped by each call so far
        self.history: list[CallRecord] = []
        self.finished = self.num_visual == 0

    @property
    def call(self) -> int:
        """The number of the next call."""
        return len(self.history)

    @property
    def num_visual(self) -> int:
        """Visual tokens present."""
        return tracks.count_visual(self.labels)

    @property
    @abstractmethod
    def wants_similarity(self) -> bool:
        """Whether the next call reads the similarity."""

    @property
    @abstractmethod
    def wants_importance(self) -> bool:
        """Whether the next call may read the importance."""

    @property
    def wants_features(self) -> bool:
        """Whether the next call reads the hidden states of the tokens; only call 0 may."""
        return False

    @abstractmethod
    def _decide(self, similarity: Scores | None, importance: Scores | None, features: FloatArray | None) -> Plan:
        """Plan the next call of a reduction that is not finished, and say so if it is the last."""

    def step(self, similarity: Scores | None, importance: Scores | None, features: FloatArray | None = None) -> Plan:
        """Plan the next call and take it as done. What is not wanted may be None.  [S], [S] and [S, D] -> Plan"""
        plan = keep_all(self.labels) if self.finished else self._guarded(similarity, importance, features)
        before = self.labels
        self.labels = tracks.compact(before, plan.kept)
        visual = tracks.count_visual(before), self.num_visual
        self.shares.append((visual[0] - visual[1]) / visual[0] if visual[0] else 0.0)
        self.history.append(CallRecord(self.call, plan.kind, before.size, self.labels.size, *visual, self.outcome))
        self.outcome = ""
        return plan

    def pass_over(self, call: int) -> None:
        """Take the calls before `call` as done, at which nothing can be read and nothing dropped.

        Raises:
            ValueError: the method acts at one of them; whoever drives it asks `Reducer.calls` first.
        """
        while self.call < call:
            reads = self.wants_similarity or self.wants_importance or self.wants_features
            if reads or self.step(None, None).kind != "none":
                raise ValueError(f"the reduction acts at call {self.call} or before, which is passed over")

    def _guarded(self, similarity: Scores | None, importance: Scores | None, features: FloatArray | None) -> Plan:
        if self.guard is None:
            return self._observed(similarity, importance, features)
        self.guard.before(self)
        plan = self._observed(similarity, importance, features)
        self.guard.after(self, plan)
        return plan

    def _observed(self, similarity: Scores | None, importance: Scores | None, features: FloatArray | None) -> Plan:
        if self.observer is None:
            return self._decide(similarity, importance, features)
        read = similarity if self.wants_similarity else None, importance if self.wants_importance else None
        plan = self._decide(similarity, importance, features)
        first, second = (None if scores is None else scores.copy() for scores in read)  # buffers are overwritten
        self.observer(Decision(first, second, plan))
        return plan

    def _scores(self, name: str, scores: Scores | None) -> Scores:
        if scores is None:
            raise ValueError(f"{name} is missing at call {self.call}; give it wherever wants_{name} says so")
        if scores.shape != self.labels.shape:
            raise ValueError(f"{name} has shape {scores.shape} at call {self.call}; give {self.labels.shape}")
        return scores


class Reduction(ReductionState):
    """The adaptive policy: the thresholds decide per video, as in the paper."""

    def __init__(self, settings: ReductionSettings, labels: npt.ArrayLike) -> None:
        super().__init__(labels)
        self.settings = settings
        self._merging = True

    @property
    def wants_similarity(self) -> bool:
        """Whether the next call reads the similarity: while merging goes on."""
        return not self.finished and self._merging

    @property
    def wants_importance(self) -> bool:
        """Whether the next call may read the importance: it prunes, or merging nothing would overdraw the budget."""
        return not self.finished and (not self._merging or self._overdraws(0.0))

    def _decide(self, similarity: Scores | None, importance: Scores | None, features: FloatArray | None) -> Plan:
        if self._merging:
            return self._merge(self._scores("similarity", similarity), importance)
        return self._prune(importance)

    def _merge(self, similarity: Scores, importance: Scores | None) -> Plan:
        mergeable = tracks.previous_in_track(self.labels) >= 0
        similar = mergeable & (similarity >= self.settings.similarity_lower_bound)
        share = int(np.count_nonzero(similar)) / self.num_visual
        needed = self._required_drop()
        if share >= needed:  # the threshold overshoots the budget: the most similar ones that meet it
            self.finished = True
            count = math.floor(needed * self.num_visual)
            return merge_plan(self.labels, top(tracks.snap_identical(similarity), count, among=mergeable))
        if self._overdraws(share):
            return self._prune(importance)
        self._merging = share >= self.settings.ratio_lower_bound and self.call < self.settings.depth
        return merge_plan(self.labels, similar)

    def _prune(self, importance: Scores | None) -> Plan:
        self.finished = True
        keep = budget.kept_by_prune(self.num_visual, self._required_drop())
        if keep == self.num_visual:
            return keep_all(self.labels)
        return prune_plan(self.labels, self._scores("importance", importance), keep)

    def _required_drop(self) -> float:
        return budget.required_drop(self.shares, self.settings.cost, self.settings.num_layers)

    def _overdraws(self, share: float) -> bool:
        """Whether a merge of this share leaves more tokens than the budget can pay, so that no later prune meets it."""
        after = budget.spent([*self.shares, share])
        return self.call >= 1 and after > self.settings.cost * self.settings.num_layers


class FixedReduction(ReductionState):
    """The fixed mode of a bundle, decision for decision: set counts by rank, merges from call 0 and one prune."""

    def __init__(self, schedule: budget.FixedSchedule, labels: npt.ArrayLike) -> None:
        super().__init__(labels)
        self.schedule = schedule
        self._drops = budget.drop_counts(schedule, self.num_visual, tracks.count_tracks(self.labels))

    @property
    def wants_similarity(self) -> bool:
        """Whether the next call reads the similarity: the first calls merge."""
        return not self.finished and self.call < len(self.schedule.merge_shares)

    @property
    def wants_importance(self) -> bool:
        """Whether the next call reads the importance: one call prunes."""
        return not self.finished and self.call == self.schedule.prune_layer + 1

    def _decide(self, similarity: Scores | None, importance: Scores | None, features: FloatArray | None) -> Plan:
        if self.wants_similarity:
            scores = tracks.snap_identical(self._scores("similarity", similarity))
            drop = self._drops[self.call]
            return merge_plan(self.labels, top(scores, drop, among=tracks.previous_in_track(self.labels) >= 0))
        if not self.wants_importance:
            return keep_all(self.labels)
        self.finished = True
        return prune_plan(self.labels, self._scores("importance", importance), self.num_visual - self._drops[-1])


def top(scores: Scores, count: int, among: Mask, within: float = 0.0) -> Mask:
    """Mark the `count` highest scores among the tokens marked, ties to the lower index. NaN is lower than anything.

    Scores that differ from the last one chosen by no more than `within` tie with it: rounding must not choose.
    """
    candidates = np.flatnonzero(among)
    ranked = np.where(np.isnan(scores), -np.inf, scores)[candidates]
    chosen = np.zeros(among.size, dtype=np.bool_)
    count = min(count, candidates.size)
    if count > 0:
        limit = np.partition(ranked, candidates.size - count)[candidates.size - count]
        above = candidates[ranked > limit + within]
        ties = candidates[(ranked <= limit + within) & (ranked >= limit - within)]
        chosen[above] = True
        chosen[ties[: count - above.size]] = True
    return chosen


def keep_all(labels: IntArray) -> Plan:
    """Return the plan that changes nothing."""
    return Plan("none", np.arange(labels.size), _NOTHING, _NOTHING, _NOTHING)


def prune_plan(labels: IntArray, scores: Scores, keep: int) -> Plan:
    """Return the plan that keeps all text and the `keep` visual tokens with the highest scores."""
    kept = np.flatnonzero(top(scores, keep, among=labels != TEXT) | (labels == TEXT))
    return Plan("prune", kept, _NOTHING, _NOTHING, _NOTHING) if kept.size < labels.size else keep_all(labels)


def merge_plan(labels: IntArray, merged: Mask) -> Plan:
    """Return the plan that merges each run of marked tokens into the token before the run, along the tracks."""
    if not merged.any():
        return keep_all(labels)
    order = tracks.track_order(labels)
    joins = merged[order]  # whether a token joins the one before it; false for the first of each track
    leads = np.append(joins[1:], False) & ~joins
    members = np.flatnonzero(joins | leads)
    return Plan("merge", np.flatnonzero(~merged), order[leads], order[members], np.flatnonzero(leads[members]))


def apply_plan(hidden: npt.NDArray[np.floating], plan: Plan) -> npt.NDArray[np.floating]:
    """Return the hidden states after a plan, as a new array: runs become their mean, summed in run order in fp32.

    hidden [S, D] -> [K, D], of the same dtype.
    """
    reduced = hidden[plan.kept]
    lengths = np.diff(plan.run_starts, append=plan.members.size)
    longest_first = np.argsort(-lengths, kind="stable")
    heads = plan.heads[longest_first]
    starts = plan.run_starts[longest_first]
    lengths = lengths[longest_first]
    means = hidden[heads].astype(np.float32, copy=False)
    # One pass per place in the run: the sums of np.add.reduceat, in its order, several times faster on wide rows.
    for place in range(1, lengths.max(initial=0)):
        runs = np.count_nonzero(lengths > place)
        means[:runs] += hidden[plan.members[starts[:runs] + place]]
    reduced[np.searchsorted(plan.kept, heads)] = means / lengths[:, None].astype(np.float32)
    return reduced
