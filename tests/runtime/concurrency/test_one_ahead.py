"""One result ahead and no more: in order, with errors where results would come, and nothing left running."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from contextvars import ContextVar

import pytest

from framefusion.runtime.concurrency.one_ahead import in_turn, one_ahead
from tests.patience import PATIENCE

NAME = "test-ahead"


class Large:
    """What a weak reference can watch."""

    def __init__(self, number: int) -> None:
        self.number = number


@pytest.fixture(autouse=True)
def nothing_runs() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(NAME)]


def jobs(count: int, begun: list[int]) -> list[Callable[[Callable[[], bool]], Large]]:
    def job(number: int) -> Callable[[Callable[[], bool]], Large]:
        def run(is_ended: Callable[[], bool]) -> Large:
            begun.append(number)
            return Large(number)

        return run

    return [job(number) for number in range(count)]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_results_are_those_of_one_after_the_other(count: int) -> None:
    ahead = [result.number for result in one_ahead(jobs(count, []), NAME)]
    assert ahead == [result.number for result in in_turn(jobs(count, []))] == list(range(count))


def test_no_result_is_begun_before_the_one_before_it_is_taken_and_none_is_kept() -> None:
    begun: list[int] = []
    taken: list[weakref.ref[Large]] = []
    gc.disable()
    try:
        with closing(one_ahead(jobs(6, begun), NAME)) as results:
            for number, result in enumerate(results):
                taken.append(weakref.ref(result))
                assert len(begun) <= number + 2
                assert [reference() is not None for reference in taken] == [*[False] * number, True]
                del result
    finally:
        gc.enable()
    assert begun == list(range(6))


def test_the_next_one_is_computed_while_the_one_before_is_used() -> None:
    reached = threading.Event()

    def first(is_ended: Callable[[], bool]) -> str:
        return "first"

    def second(is_ended: Callable[[], bool]) -> str:
        reached.set()
        return "second"

    with closing(one_ahead([first, second], NAME)) as results:
        assert next(results) == "first"
        assert reached.wait(PATIENCE)
        assert list(results) == ["second"]


def test_an_error_comes_where_its_result_would_and_ends_the_rest() -> None:
    begun: list[int] = []

    def broken(is_ended: Callable[[], bool]) -> Large:
        raise ValueError("broken")

    results = one_ahead([*jobs(1, begun), broken, *jobs(1, begun)], NAME)
    assert next(results).number == 0
    with pytest.raises(ValueError, match="broken"):
        next(results)
    assert begun == [0]


def test_whoever_leaves_ends_the_job_that_runs() -> None:
    reached = threading.Event()
    seen: list[bool] = []

    def long(is_ended: Callable[[], bool]) -> Large:
        reached.set()
        ended = threading.Event()
        while not is_ended() and not ended.wait(0.001):
            pass
        seen.append(is_ended())
        return Large(1)

    results = one_ahead([*jobs(1, []), long, *jobs(1, [])], NAME)
    next(results)
    assert reached.wait(PATIENCE)
    results.close()
    assert seen == [True]


def test_jobs_run_in_the_context_of_who_asks() -> None:
    variable: ContextVar[str] = ContextVar("variable", default="none")
    token = variable.set("asked")
    try:
        assert list(one_ahead([lambda _: variable.get()], NAME)) == ["asked"]
    finally:
        variable.reset(token)
