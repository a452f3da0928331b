"""The budget: from the cost a user sets to the share of visual tokens each call drops, and back.

The cost is the mean over the L layers of (visual tokens entering the layer / visual tokens at the start). Call 0 comes
before the attention of layer 0, call i >= 1 after the attention of layer i-1; what call i leaves enters layer i. So
dropped shares a_0 .. a_{c-1} have spent s_0 + .. + s_{c-1} of the L x cost layers, with s_i = (1-a_0) .. (1-a_i).

Knows nothing of tokens, tracks, scores or models: shares and counts only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from framefusion.errors import BudgetError


def describe_cost(cost: float) -> str:
    """Say a cost in both senses, as every report prints it."""
    return f"keeps {100 * cost:.4g} %, drops {100 * (1 - cost):.4g} %"


def check_cost(cost: float, smallest: float = 0.0) -> None:
    """Refuse a cost outside (0, 1], or below the smallest one that can be reached.

    Raises:
        BudgetError: it is one of these.
    """
    if not 0 < cost <= 1:
        meant = cost / 100 if 1 < cost <= 100 else 0.3
        raise BudgetError(
            f"cost {cost} is outside (0, 1]: it is the share of the computation that is kept; "
            f"say for example {meant:g} ({describe_cost(meant)})"
        )
    if cost < smallest * (1 - 1e-12):  # a caller who passes 1 / num_layers means exactly that
        shown = math.ceil(smallest * 1e6) / 1e6  # upwards: what the message says is accepted
        raise BudgetError(
            f"cost {cost} ({describe_cost(cost)}) cannot be reached: the smallest cost is {shown:g} "
            f"({describe_cost(shown)}); ask at least that, or merge more and prune earlier"
        )


def remaining(shares: Sequence[float]) -> float:
    """Return the share of the visual tokens that is left after calls that dropped these shares of those present."""
    return math.prod(1 - share for share in shares)


def spent(shares: Sequence[float]) -> float:
    """Return how many layers' worth of the full token count the calls so far have spent."""
    total = 0.0
    left = 1.0
    for share in shares:
        left *= 1 - share
        total += left
    return total


def required_drop(shares: Sequence[float], cost: float, num_layers: int) -> float:
    """Return the share that the next call has to drop, if it is the last one, for the whole to meet the cost.

    Args:
        shares: what the calls before it dropped of the visual tokens present.
        cost: share of the computation over visual tokens that is kept.
        num_layers: L.

    Returns:
        A share in [0, 1]: 1 where even dropping all does not meet the cost.
    """
    entering = (num_layers - len(shares)) * remaining(shares)
    if entering <= 0:
        return 0.0
    return min(max(1 - (num_layers * cost - spent(shares)) / entering, 0.0), 1.0)


def cost_of_shares(shares: Sequence[float], num_layers: int) -> float:
    """Return the cost that a list of dropped shares ends at when nothing more is dropped after it."""
    return (spent(shares) + (num_layers - len(shares)) * remaining(shares)) / num_layers


@dataclass(frozen=True)
class FixedSchedule:
    """The constants of a bundle in fixed mode: what calls 0 .. m-1 merge, and what is pruned after which layer.

    Attributes:
        merge_shares: share of the visual tokens present that call i merges, for calls 0 .. m-1.
        prune_layer: p; the prune follows the attention of layer p, which is call p+1.
        prune_share: share of the visual tokens present that the prune drops.
    """

    merge_shares: tuple[float, ...]
    prune_layer: int
    prune_share: float

    def __post_init__(self) -> None:
        for call, share in enumerate(self.merge_shares):
            if not 0 <= share < 1:
                raise BudgetError(f"merge share {share} of call {call} is outside [0, 1); say which share merges there")
        if not 0 <= self.prune_share <= 1:
            raise BudgetError(f"prune share {self.prune_share} is outside [0, 1]; say which share is dropped")
        if self.prune_layer < self.first_prune_layer:
            raise BudgetError(
                f"prune layer {self.prune_layer} comes before the last of {len(self.merge_shares)} merge calls; "
                f"prune at layer {self.first_prune_layer} or later"
            )

    @property
    def first_prune_layer(self) -> int:
        """The first layer whose call is free for the prune."""
        return max(len(self.merge_shares) - 1, 0)

    @property
    def shares(self) -> tuple[float, ...]:
        """Dropped share of each call 0 .. p+1, the calls between the last merge and the prune included."""
        idle = self.prune_layer + 1 - len(self.merge_shares)
        return (*self.merge_shares, *[0.0] * idle, self.prune_share)

    @property
    def calls(self) -> tuple[int, ...]:
        """The call of each reduction: one for each merge, then the prune's; `drop_counts` counts in this order."""
        return (*range(len(self.merge_shares)), self.prune_layer + 1)

    def lengths(self, length: int, drops: Sequence[int], num_layers: int) -> list[int]:
        """Tokens that enter the attention of each layer, and so are in its cache.

        Args:
            length: tokens before call 0.
            drops: tokens that each of `calls` drops; call i precedes the attention of layer i.
            num_layers: of the decoder.
        """
        dropped_at = dict(zip(self.calls, drops, strict=True))
        lengths = []
        for layer in range(num_layers):
            length -= dropped_at.get(layer, 0)
            lengths.append(length)
        return lengths


def cost_of_schedule(merge_shares: Sequence[float], prune_layer: int, prune_share: float, num_layers: int) -> float:
    """Return the cost of a schedule, before any rounding to whole tokens.

    Raises:
        BudgetError: a share or layer out of its range.
    """
    schedule = FixedSchedule(tuple(merge_shares), prune_layer, prune_share)
    _check_depth(prune_layer, num_layers)
    return cost_of_shares(schedule.shares, num_layers)


def smallest_cost(num_layers: int, merge_shares: Sequence[float] = (), prune_layer: int = 0) -> float:
    """Return the smallest reachable cost: everything is dropped at the prune, so only what came before it counts.

    Without merges, and for the adaptive policy whatever it merges, that is 1 / num_layers: layer 0 sees all.
    """
    return cost_of_schedule(merge_shares, prune_layer, 1.0, num_layers)


def schedule_for_cost(cost: float, merge_shares: Sequence[float], prune_layer: int, num_layers: int) -> FixedSchedule:
    """Return the schedule with these merges whose prune meets the cost exactly.

    Raises:
        BudgetError: the cost is outside (0, 1], smaller than what the merges and the layers before the prune spend, or
            larger than what the merges alone reach.
    """
    check_cost(cost, smallest_cost(num_layers, merge_shares, prune_layer))
    largest = cost_of_schedule(merge_shares, prune_layer, 0.0, num_layers)
    if cost > largest * (1 + 1e-12):
        raise BudgetError(
            f"cost {cost} ({describe_cost(cost)}) is above {largest:.6g} ({describe_cost(largest)}), which the merges "
            f"alone reach; ask at most that, or scale the merges down with scale_schedule"
        )
    before = FixedSchedule(tuple(merge_shares), prune_layer, 0.0).shares[:-1]
    return FixedSchedule(tuple(merge_shares), prune_layer, required_drop(before, cost, num_layers))


def scale_schedule(merge_shares: Sequence[float], prune_layer: int, cost: float, num_layers: int) -> FixedSchedule:
    """Return the schedule for the cost, with the merges scaled down together where they alone would overshoot it."""
    check_cost(cost)

    def scaled(factor: float) -> tuple[float, ...]:
        return tuple(factor * share for share in merge_shares)

    def overshoots(factor: float) -> bool:
        return cost_of_schedule(scaled(factor), prune_layer, 0.0, num_layers) < cost

    low = 0.0
    high = 1.0
    if not overshoots(high):
        return schedule_for_cost(cost, merge_shares, prune_layer, num_layers)
    for _ in range(60):
        middle = (low + high) / 2
        if overshoots(middle):
            high = middle
        else:
            low = middle
    return schedule_for_cost(cost, scaled(low), prune_layer, num_layers)


def drop_counts(schedule: FixedSchedule, num_visual: int, num_tracks: int) -> list[int]:
    """Return the whole tokens that each event drops: one number per merge, then the prune.

    The first token of each track has nothing before it to merge into, so num_tracks tokens survive every merge.
    """
    counts = []
    present = num_visual
    for share in schedule.merge_shares:
        counts.append(min(math.floor(share * present), present - num_tracks))
        present -= counts[-1]
    return [*counts, present - kept_by_prune(present, schedule.prune_share)]


def kept_by_prune(num_visual: int, share: float) -> int:
    """Return how many visual tokens a prune of this share keeps, halves going to the even number."""
    return round(num_visual * (1 - share))


def _check_depth(prune_layer: int, num_layers: int) -> None:
    if prune_layer > num_layers - 2:
        raise BudgetError(
            f"prune layer {prune_layer} leaves no layer of {num_layers} to save on; "
            f"prune at layer {num_layers - 2} or earlier"
        )
