"""The plan: what becomes of the tokens at one call, in indices, and the two ways to make one from scores.

A plan keeps all, drops tokens (prune), or turns runs of tokens into their means (merge). The policy decides which, the
functions here only build plans and apply them. Knows numpy only: no budget, no model, no layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from framefusion.reduction import tracks
from framefusion.reduction.tracks import TEXT, IntArray

Kind = Literal["none", "merge", "prune"]
Scores = npt.NDArray[np.floating]
"""One number a token; NaN counts as lower than any.  [S]"""
Mask = npt.NDArray[np.bool_]
"""One mark a token.  [S]"""

_NOTHING: IntArray = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Plan:
    """What becomes of S tokens at one call, in indices into those S.

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

    @property
    def run_lengths(self) -> IntArray:
        """Tokens of each run, its head included.  [R]"""
        return np.diff(self.run_starts, append=self.members.size)

    @property
    def head_slots(self) -> IntArray:
        """Where each head stands among the kept tokens.  [R]"""
        return np.searchsorted(self.kept, self.heads)

    def runs_longest_first(self) -> Runs:
        """The runs in the order in which all who apply a plan add them up."""
        lengths = self.run_lengths
        order = np.argsort(-lengths, kind="stable")
        starts = self.run_starts[order]
        lengths = lengths[order]
        followers = []
        for place in range(1, lengths.max(initial=0)):
            reaching = np.count_nonzero(lengths > place)
            followers.append(self.members[starts[:reaching] + place])
        return Runs(self.heads[order], self.head_slots[order], lengths, tuple(followers))


@dataclass(frozen=True)
class Runs:
    """The runs of a plan, longest first: the runs that reach any place are then the first ones, without a gap.

    The mean of run i is the sum of heads[i] and of followers[p][i] for p = 0, 1, .. in this order, in fp32, divided by
    lengths[i]: the order fixes the rounding, so every device gives the same bits.

    Attributes:
        heads: the token that becomes the mean.  [R]
        slots: the place of the mean among the kept tokens.  [R]
        lengths: tokens of the run, descending.  [R]
        followers: for each place behind the head, the tokens there, of the runs that reach it.  [<= R] each
    """

    heads: IntArray
    slots: IntArray
    lengths: IntArray
    followers: tuple[IntArray, ...]


def top(scores: Scores, count: int, among: Mask, within: float = 0.0) -> Mask:
    """Mark the `count` highest scores among the tokens marked, ties to the lower index. NaN is lower than anything.

    Scores that differ from the last one chosen by no more than `within` tie with it: rounding must not choose. Fewer
    are marked where fewer are candidates.  scores [S], among [S] -> [S]
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
    """Return the plan that keeps every token.  labels [S]"""
    return Plan("none", np.arange(labels.size), _NOTHING, _NOTHING, _NOTHING)


def prune_plan(labels: IntArray, scores: Scores, keep: int) -> Plan:
    """Return the plan that keeps all text and the `keep` visual tokens with the highest scores.  [S], [S] -> Plan"""
    kept = np.flatnonzero(top(scores, keep, among=labels != TEXT) | (labels == TEXT))
    return Plan("prune", kept, _NOTHING, _NOTHING, _NOTHING) if kept.size < labels.size else keep_all(labels)


def merge_plan(labels: IntArray, merged: Mask) -> Plan:
    """Return the plan that merges each run of marked tokens into the token before the run, along the tracks.

    labels [S]; merged [S], false for text and for the first token of each track, which has nothing to merge into.
    """
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
    runs = plan.runs_longest_first()
    reduced = hidden[plan.kept]
    means = hidden[runs.heads].astype(np.float32, copy=False)
    # One pass per place in the run: the sums of np.add.reduceat, in its order, several times faster on wide rows.
    for members in runs.followers:
        means[: members.size] += hidden[members]
    reduced[runs.slots] = means / runs.lengths[:, None].astype(np.float32)
    return reduced
