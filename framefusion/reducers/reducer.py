"""What a reducer is: a description of a method, and what is enforced of every method after each of its decisions.

    Reducer     name, paper, what it reads, the calls it acts at, the counts it promises; `start` begins one request
    Selection   a Reducer that decides once and drops: it only says which tokens stay

Calls, plans and states are those of framefusion/policy.py, what is enforced is in guard.py. Knows no method, no model,
no bundle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from framefusion.errors import ReducerError
from framefusion.reducers.guard import Input, ReducerGuard
from framefusion.reduction import budget, tracks
from framefusion.reduction.plan import Mask, Plan, Scores, keep_all, prune_plan
from framefusion.reduction.policy import ReductionSettings, ReductionState
from framefusion.reduction.tracks import TEXT, FloatArray, IntArray


@dataclass(frozen=True)
class ReductionRequest:
    """One request as a reducer gets it.

    Attributes:
        settings: cost and thresholds, and what model and bundle allow.
        labels: of the whole prompt; a token of label -1 never goes, nor does the last one, which becomes text here. [S]
        seed: of whatever is drawn.
    """

    settings: ReductionSettings
    labels: IntArray
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tracks.request_labels(self.labels))

    @property
    def num_visual(self) -> int:
        """Visual tokens of the prompt."""
        return tracks.count_visual(self.labels)

    def kept_at(self, call: int) -> int:
        """Visual tokens that one decision at this call keeps so that the whole meets the cost, as exact as can be."""
        drop = budget.required_drop([0.0] * call, self.settings.cost, self.settings.num_layers)
        return budget.kept_by_prune(self.num_visual, drop)


class Reducer(ABC):
    """A method that reduces tokens. One object serves any number of requests: it holds none of their state.

    Attributes:
        name: as users type it.
        paper: where the method is defined.
        merges: whether tokens may become a mean of several; else some are dropped and the others stay as they are.
        query_agnostic: whether the choice is independent of the text, so that it could be used again for another turn.
        inputs: what its state may ask for: "similarity" and "importance" (framefusion.policy), and "features", the
            hidden states that enter the LLM, text included, in fp32 [S, D], which only call 0 can give.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    merges: ClassVar[bool] = False
    query_agnostic: ClassVar[bool] = True
    inputs: ClassVar[frozenset[Input]] = frozenset()

    def calls(self, settings: ReductionSettings) -> tuple[int, ...]:
        """The calls at which it may drop tokens or reads anything, ascending. Call 0 is before the LLM."""
        return (0,)

    def counts(self, request: ReductionRequest) -> Mapping[int, int] | None:
        """Visual tokens after each call that acts, known before anything is computed; None where scores decide."""
        return None

    @property
    def static(self) -> bool:
        """Whether the counts are known beforehand."""
        return type(self).counts is not Reducer.counts

    def start(self, request: ReductionRequest) -> ReductionState:
        """Begin a request.

        Raises:
            BudgetError: the method cannot reach the cost.
        """
        state = self._start(request)
        state.guard = ReducerGuard(
            self.name, self.merges, self.inputs, frozenset(self.calls(request.settings)), self.counts(request),
            request.num_visual, request.settings.cost,
        )  # fmt: skip
        return state

    @abstractmethod
    def _start(self, request: ReductionRequest) -> ReductionState:
        """The state of a request, unguarded."""


def check_cuts(reducer: Reducer, settings: ReductionSettings, cuts: Sequence[int], built_for: str) -> None:
    """Refuse a reducer that acts where the graphs of a bundle are not cut.

    Args:
        reducer: for one request.
        settings: of that request.
        cuts: calls between graphs, at which tokens can go.
        built_for: the reducer that the graphs were cut for.

    Raises:
        ReducerError: with the calls of both.
    """
    calls = reducer.calls(settings)
    if not set(calls) <= set(cuts):
        raise ReducerError(
            f"reducer {reducer.name} acts at calls {_listed(calls)} at cost {settings.cost:g}, this bundle was cut for "
            f"{built_for} at calls {_listed(cuts)}: build it with --reducer {reducer.name}"
        )


def _listed(calls: Sequence[int]) -> str:
    return ", ".join(map(str, calls))


@dataclass(frozen=True)
class Reading:
    """What a `Selection` decides from, at its call. Only what it declares as inputs is there."""

    request: ReductionRequest
    keep: int  # visual tokens to choose
    similarity: Scores | None  # [S]
    importance: Scores | None  # [S]
    features: FloatArray | None  # [S, D]

    @property
    def labels(self) -> IntArray:
        """Of all tokens: nothing was dropped before.  [S]"""
        return self.request.labels


class Selection(Reducer):
    """A method that decides once, at one call, and keeps an exact number of visual tokens."""

    why_more: ClassVar[str] = ""  # a clause for people, where `count` may exceed what the budget pays for

    def call(self, settings: ReductionSettings) -> int:
        """The call at which it decides."""
        return 0

    def count(self, request: ReductionRequest) -> int:
        """Visual tokens to keep of a prompt: by default what the cost pays for."""
        return request.kept_at(self.call(request.settings))

    @abstractmethod
    def choose(self, reading: Reading) -> Mask:
        """Mark `reading.keep` visual tokens to keep; marks on text change nothing.  [S]"""

    def calls(self, settings: ReductionSettings) -> tuple[int, ...]:
        """The call at which it decides, alone."""
        return (self.call(settings),)

    def counts(self, request: ReductionRequest) -> Mapping[int, int]:
        """What `count` says, after the call at which it decides."""
        return {self.call(request.settings): self.count(request)}

    def _start(self, request: ReductionRequest) -> ReductionState:
        settings = request.settings
        call = self.call(request.settings)
        if call > 0:  # layers 0 .. call-1 see all tokens
            budget.check_cost(settings.cost, budget.smallest_cost(settings.num_layers, prune_layer=call - 1))
        return SelectionState(self, request)


class SelectionState(ReductionState):
    """A `Selection` on its way: idle until its call."""

    def __init__(self, method: Selection, request: ReductionRequest) -> None:
        super().__init__(request.labels)
        self.method = method
        self.request = request
        self._call = method.call(request.settings)

    @property
    def wants_similarity(self) -> bool:
        """Whether the next call reads the similarity."""
        return self._wants("similarity")

    @property
    def wants_importance(self) -> bool:
        """Whether the next call reads the importance."""
        return self._wants("importance")

    @property
    def wants_features(self) -> bool:
        """Whether the next call reads the hidden states."""
        return self._wants("features")

    def _wants(self, what: Input) -> bool:
        return not self.finished and self.call == self._call and what in self.method.inputs

    def _decide(self, similarity: Scores | None, importance: Scores | None, features: FloatArray | None) -> Plan:
        if self.call < self._call:
            return keep_all(self.labels)
        keep = self.method.count(self.request)
        paid = self.request.kept_at(self._call)
        if keep > paid:
            self.outcome = f"{self.name} keeps {keep} of {self.num_visual}, the cost pays for {paid}: "
            self.outcome += self.method.why_more
        if keep == self.num_visual:
            self.finished = True
            return keep_all(self.labels)
        reading = Reading(
            self.request,
            keep,
            self._scores("similarity", similarity) if self.wants_similarity else None,
            self._scores("importance", importance) if self.wants_importance else None,
            self._features(features) if self.wants_features else None,
        )
        self.finished = True
        kept = np.asarray(self.method.choose(reading))
        if kept.shape != self.labels.shape or kept.dtype != np.bool_:
            raise ReducerError(
                f"reducer {self.name} at call {self.call}: found a choice of shape {kept.shape} and type {kept.dtype}, "
                f"expected a mask of {self.labels.shape}: the method is at fault, take another with --reducer"
            )
        return prune_plan(self.labels, kept.astype(np.float32), int(np.count_nonzero(kept & (self.labels != TEXT))))

    @property
    def name(self) -> str:
        """The name of the method, for messages."""
        return self.method.name

    def _features(self, features: FloatArray | None) -> FloatArray:
        if features is None:
            raise ValueError(f"features are missing at call {self.call}; give them wherever wants_features says so")
        if features.ndim != 2 or len(features) != self.labels.size:
            raise ValueError(f"features have shape {features.shape} at call {self.call}; give ({self.labels.size}, D)")
        return features
