"""Cost, shares, schedules and whole-token counts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framefusion.errors import BudgetError
from framefusion.reduction import budget

Shares = st.lists(st.floats(0, 0.9), max_size=5)


def test_describe_cost_says_both_senses() -> None:
    assert budget.describe_cost(0.3) == "keeps 30 %, drops 70 %"


@pytest.mark.parametrize(
    ("cost", "remedy"), [(0.0, "0.3"), (-1.0, "0.3"), (1.01, "0.0101"), (30, "0.3"), (float("nan"), "0.3")]
)
def test_a_cost_outside_its_range_is_refused_in_both_senses(cost: float, remedy: str) -> None:
    with pytest.raises(BudgetError, match=rf"outside \(0, 1\].*for example {remedy} \(keeps .* %, drops .* %\)"):
        budget.check_cost(cost)


@pytest.mark.parametrize("layers", [3, 4, 12, 28, 48, 80])
def test_the_cost_that_a_refusal_names_is_accepted(layers: int) -> None:
    smallest = budget.smallest_cost(layers)
    with pytest.raises(BudgetError, match="the smallest cost is") as refusal:
        budget.check_cost(smallest / 2, smallest)
    budget.check_cost(float(str(refusal.value).split("the smallest cost is ")[1].split()[0]), smallest)


def test_required_drop_without_calls_is_the_share_to_drop() -> None:
    assert budget.required_drop([], 0.3, 28) == pytest.approx(0.7)


@settings(max_examples=100)
@given(Shares, st.floats(0.05, 1), st.integers(6, 80))
def test_dropping_what_is_required_meets_the_cost(shares: list[float], cost: float, layers: int) -> None:
    drop = budget.required_drop(shares, cost, layers)
    assert 0 <= drop <= 1
    reached = budget.cost_of_shares([*shares, drop], layers)
    if 0 < drop < 1:
        assert reached == pytest.approx(cost)
    elif drop == 0:
        assert reached <= cost * (1 + 1e-9)  # more than met: nothing more to drop
    else:
        assert reached >= cost * (1 - 1e-9)


def test_cost_of_schedule_is_the_mean_over_layers() -> None:
    # layers 0 .. 3 see 0.5, 0.25, 0.25, then the prune after layer 2 halves it: calls 0, 1 merge, call 3 prunes
    assert budget.cost_of_schedule([0.5, 0.5], 2, 0.5, 5) == pytest.approx((0.5 + 0.25 + 0.25 + 0.125 + 0.125) / 5)


def test_smallest_cost_is_what_comes_before_the_prune() -> None:
    assert budget.smallest_cost(28) == pytest.approx(1 / 28)
    assert budget.smallest_cost(10, (0.5, 0.5), 2) == pytest.approx((0.5 + 0.25 + 0.25) / 10)


@settings(max_examples=100)
@given(Shares, st.integers(0, 6), st.floats(0.001, 1), st.integers(10, 60))
def test_a_schedule_meets_its_cost_or_says_what_can_be(
    merges: list[float], later: int, cost: float, layers: int
) -> None:
    layer = max(len(merges) - 1, 0) + min(later, 4)
    smallest = budget.smallest_cost(layers, merges, layer)
    largest = budget.cost_of_schedule(merges, layer, 0, layers)
    if smallest <= cost <= largest:
        schedule = budget.schedule_for_cost(cost, merges, layer, layers)
        assert budget.cost_of_schedule(merges, layer, schedule.prune_share, layers) == pytest.approx(cost)
    elif cost < smallest * (1 - 1e-9):
        with pytest.raises(BudgetError, match=r"smallest cost is 0\."):
            budget.schedule_for_cost(cost, merges, layer, layers)
    elif cost > largest * (1 + 1e-9):
        with pytest.raises(BudgetError, match="scale the merges down"):
            budget.schedule_for_cost(cost, merges, layer, layers)


@settings(max_examples=60)
@given(Shares, st.floats(0.2, 1), st.integers(10, 60))
def test_scaling_the_merges_down_reaches_any_cost_above_them(merges: list[float], cost: float, layers: int) -> None:
    layer = max(len(merges) - 1, 0)
    if cost < budget.smallest_cost(layers, merges, layer):
        return
    schedule = budget.scale_schedule(merges, layer, cost, layers)
    assert budget.cost_of_shares(schedule.shares, layers) == pytest.approx(cost)
    assert all(scaled <= share for scaled, share in zip(schedule.merge_shares, merges, strict=True))


def test_merges_that_fit_are_not_scaled() -> None:
    assert budget.scale_schedule((0.4, 0.2), 2, 0.3, 28) == budget.schedule_for_cost(0.3, (0.4, 0.2), 2, 28)


def test_drop_counts_floor_the_merges_and_spare_the_first_of_each_track() -> None:
    schedule = budget.FixedSchedule((0.5, 0.9), 1, 0.5)
    assert budget.drop_counts(schedule, 101, 10) == [50, 41, 5]  # floor, all but the 10 firsts, half of 10
    assert budget.drop_counts(schedule, 10, 10) == [0, 0, 5]
    assert budget.drop_counts(schedule, 0, 0) == [0, 0, 0]


def test_a_prune_keeps_the_even_half() -> None:
    assert [budget.kept_by_prune(n, 0.5) for n in (5, 7, 9)] == [2, 4, 4]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (((1.0,), 0, 0.5), "merge share 1.0 of call 0"),
        (((0.2,), 0, 1.5), "prune share 1.5"),
        (((0.2, 0.2, 0.2), 1, 0.5), "prune at layer 2 or later"),
    ],
)
def test_an_impossible_schedule_is_refused(schedule: tuple[tuple[float, ...], int, float], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        budget.FixedSchedule(*schedule)


def test_a_prune_after_the_last_attention_is_refused() -> None:
    with pytest.raises(BudgetError, match="prune at layer 4 or earlier"):
        budget.schedule_for_cost(0.5, (), 5, 6)


def test_lengths_of_layers_follow_the_calls_of_a_schedule() -> None:
    """Call i precedes the attention of layer i; the prune behind layer p is call p + 1."""
    schedule = budget.FixedSchedule((0.5, 0.2), 2, 0.5)
    assert schedule.calls == (0, 1, 3)
    assert schedule.lengths(100, [50, 10, 20], 5) == [50, 40, 40, 20, 20]
    with pytest.raises(ValueError, match="zip"):
        schedule.lengths(100, [50, 10], 5)
