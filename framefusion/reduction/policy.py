"""The policy: two short vectors in, a plan out.  The page to read first.

Which tokens merge and which survive is decided here and nowhere else, from the similarity of each token to the one
before it in its track and the importance the last query gives it. The live torch model and every runtime call `step`
between an attention and an MLP and then only apply the plan:

    call 0       before the attention of layer 0: similarity of the embeddings, no importance yet
    call i >= 1  after the attention of layer i-1, before its MLP: its importance, similarity of its residual stream

A reduction merges call after call while enough tokens are alike, then prunes once, one call later, to meet the budget.
Tokens of label -1 are never dropped, kept tokens keep their order, ties go to the lower index.

This is FrameFusion. Other methods are behind the same state and the same plan: framefusion.reducers.

Knows numpy only: no model, no layer, no tensor but the two vectors. What a plan is, and what becomes of hidden states
by one, stands in framefusion/reduction/plan.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from framefusion.errors import BudgetError
from framefusion.reduction import budget, tracks
from framefusion.reduction.plan import Kind, Plan, Scores, keep_all, merge_plan, prune_plan, top
from framefusion.reduction.tracks import FloatArray


@dataclass(frozen=True)
class ReductionSettings:
    """The parameters of the adaptive policy: the paper's three numbers, and what the model and the bundle allow.

    Attributes:
        cost: share of the computation over visual tokens that is kept, in (0, 1].
        similarity_lower_bound: tokens at least this similar to the one before them merge, in [-1, 1].
        ratio_lower_bound: merging ends after a call that merges a smaller share than this, in [0, 1).
        num_layers: L, the model's own layer count.
        depth: D, the deepest layer whose attention a reduction may follow: calls 0 .. D may merge, D+1 is the last.

    Raises:
        BudgetError: a number out of its range, or a cost that so few layers cannot reach.
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
class CallRecord:
    """What one call did, in numbers of tokens; `outcome` says what a method could not do as required, and why."""

    call: int
    kind: Kind
    tokens_before: int
    tokens_after: int
    visual_before: int
    visual_after: int
    outcome: str = ""


@dataclass(frozen=True)
class Decision:
    """One call: the scores it read, [S] each, None where it did not read them, and what it did."""

    similarity: Scores | None
    importance: Scores | None
    plan: Plan


Observer = Callable[[Decision], None]


class Guard(Protocol):
    """Checks around each call, which may refuse it by raising: framefusion/reducers/guard.py has those of reducers."""

    def before(self, state: ReductionState) -> None:
        """The call is about to be decided."""

    def after(self, state: ReductionState, plan: Plan) -> None:
        """The call was decided, its plan not yet taken as done."""


class ReductionState(ABC):
    """One request on its way through the calls: the tokens present and what was done to them so far.

    `observer`, where one is set, gets a `Decision` for each call that decides; nothing is copied or kept without one.
    `outcome` is the remark of the call being decided: see CallRecord.
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
        """How many of the tokens present are visual."""
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
        """Plan the next call and take it as done.

        Args:
            similarity: of each token present to the one before it in its track.  [S]
            importance: attention that each token present gets.  [S]
            features: hidden states of the tokens present, in fp32.  [S, D]

        Whatever `wants_similarity`, `wants_importance` and `wants_features` deny may be None.

        Raises:
            ValueError: scores that are wanted are missing, or are not one a token.
            ReducerError: the guard refuses what the method asks for or plans.
        """
        # 1. Decide. A reduction that is finished keeps everything for the rest of the layers.
        plan = keep_all(self.labels) if self.finished else self._guarded(similarity, importance, features)
        # 2. Go on with the labels of the kept tokens only: scores of the next call are theirs.
        labels = self.labels
        self.labels = tracks.compact(labels, plan.kept)
        # 3. Record the share that went, from which the budget of later calls follows, and the counts for reports.
        before = tracks.count_visual(labels)
        after = self.num_visual
        self.shares.append((before - after) / before if before else 0.0)
        record = CallRecord(self.call, plan.kind, labels.size, self.labels.size, before, after, self.outcome)
        self.history.append(record)
        self.outcome = ""
        return plan

    def pass_over(self, call: int) -> None:
        """Take the calls before `call` as done, at which nothing can be read and nothing dropped.

        Raises:
            ValueError: the method acts at one of them; `Reducer.calls` says which must not be passed over.
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
        # what is wanted changes with the decision, and runtimes overwrite the buffers of the scores
        similarity_read = similarity.copy() if self.wants_similarity and similarity is not None else None
        importance_read = importance.copy() if self.wants_importance and importance is not None else None
        plan = self._decide(similarity, importance, features)
        self.observer(Decision(similarity_read, importance_read, plan))
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
        # 1. Merge call after call while tokens are alike; one call later, prune once and finish.
        if self._merging:
            return self._merge(self._scores("similarity", similarity), importance)
        return self._prune(importance)

    def _merge(self, similarity: Scores, importance: Scores | None) -> Plan:
        # 2. Mark what the threshold would merge: tokens alike enough to the one before them in their track.
        mergeable = tracks.previous_in_track(self.labels) >= 0
        similar = mergeable & (similarity >= self.settings.similarity_lower_bound)
        share = int(np.count_nonzero(similar)) / self.num_visual
        needed = self._required_drop()
        # 3. That many meet the budget alone: merge only the most similar ones that meet it, no prune is due.
        if share >= needed:
            self.finished = True
            count = math.floor(needed * self.num_visual)
            return merge_plan(self.labels, top(tracks.snap_identical(similarity), count, among=mergeable))
        # 4. After so small a merge no later prune could meet the budget: prune now.
        if self._overdraws(share):
            return self._prune(importance)
        # 5. Merge, and go on at the next call unless too few were alike or the depth is reached.
        self._merging = share >= self.settings.ratio_lower_bound and self.call < self.settings.depth
        return merge_plan(self.labels, similar)

    def _prune(self, importance: Scores | None) -> Plan:
        # 6. Keep the most important tokens, as many as the rest of the budget pays for.
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
