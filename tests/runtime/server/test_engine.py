"""The thread that computes, with jobs that compute nothing: whatever one of them does, it goes on with the others."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from threading import Event

import pytest

from framefusion.runtime.request import Step
from framefusion.runtime.server.engine import Engine, Job


class Counting(Job):
    """Steps without end, or one that is given to nobody."""

    nbytes = 1

    def __init__(self, broken: str = "") -> None:
        super().__init__()
        self.begun = Event()
        self.finished = Event()
        self.errors: list[BaseException | None] = []
        self._broken = broken

    def start(self) -> Generator[Step, None, None]:
        while True:
            yield Step("token")

    def give(self, step: Step) -> None:
        self.begun.set()
        if self._broken == "give":
            raise RuntimeError("give")

    def finish(self, error: BaseException | None) -> None:
        self.errors.append(error)
        self.finished.set()
        if self._broken == "finish":
            raise RuntimeError("finish")


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(1, 10, lambda _: None)
    engine.start()
    yield engine
    engine.close()


@pytest.mark.parametrize("broken", ["give", "finish"])
def test_a_job_that_breaks_ends_alone(engine: Engine, broken: str) -> None:
    first = Counting(broken)
    engine.submit(first)
    assert first.begun.wait(5)
    first.cancel()
    assert first.finished.wait(5)
    second = Counting()
    engine.submit(second)
    assert second.begun.wait(5)
    assert len(first.errors) == 1
    assert (first.errors[0] is not None) == (broken == "give")


def test_whoever_leaves_at_any_moment_is_told(engine: Engine) -> None:
    for _ in range(300):
        job = Counting()
        engine.submit(job)
        assert job.begun.wait(5)
        job.cancel()
        assert job.finished.wait(5)
        assert job.errors == [None]


def test_who_leaves_while_waiting_is_forgotten_at_once(engine: Engine) -> None:
    """Its decoded films are large: they must not wait for the ones that run."""
    running = Counting()
    engine.submit(running)
    assert running.begun.wait(5)
    waiting = [Counting() for _ in range(3)]
    for job in waiting:
        engine.submit(job)
    for job in waiting[:2]:
        job.cancel()
        assert job.finished.wait(5)
    assert engine.waiting == 1
    assert not running.finished.is_set()
    assert not any(job.begun.is_set() for job in waiting)


def test_nobody_waits_for_an_engine_that_has_ended(engine: Engine) -> None:
    engine.close()
    late = Counting()
    engine.submit(late)
    assert late.errors == [None]
    assert late.cancelled
