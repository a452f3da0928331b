"""The thread that computes, with jobs that compute nothing: whatever one of them does, it goes on with the others."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from threading import Event

import pytest

from framefusion.runtime.request import Step
from framefusion.runtime.server import engine as engine_module
from framefusion.runtime.server.engine import DECODE_SECONDS, Engine, Job
from tests.patience import PATIENCE

STEP_SECONDS = 0.0001


class Clock:
    """Seconds that pass while jobs compute, and then alone."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Counting(Job):
    """Steps without end, or one that is given to nobody."""

    nbytes = 1
    steps = 0
    since = 0.0

    def __init__(self, broken: str = "", prefill_seconds: float = 0.0, clock: Clock | None = None) -> None:
        super().__init__()
        self._prefill_seconds = prefill_seconds
        self._clock = clock or Clock()
        self.begun = Event()
        self.finished = Event()
        self.errors: list[BaseException | None] = []
        self._broken = broken

    def start(self) -> Generator[Step, None, None]:
        self._clock.now += self._prefill_seconds
        while True:
            yield Step("token")

    def give(self, step: Step) -> None:
        self.steps += 1
        self._clock.now += STEP_SECONDS
        if not self.begun.is_set():
            self.since = self._clock.now
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
    assert first.begun.wait(PATIENCE)
    first.cancel()
    assert first.finished.wait(PATIENCE)
    second = Counting()
    engine.submit(second)
    assert second.begun.wait(PATIENCE)
    assert len(first.errors) == 1
    assert (first.errors[0] is not None) == (broken == "give")


def test_whoever_leaves_at_any_moment_is_told(engine: Engine) -> None:
    for _ in range(100):
        job = Counting()
        engine.submit(job)
        assert job.begun.wait(PATIENCE)
        job.cancel()
        assert job.finished.wait(PATIENCE)
        assert job.errors == [None]


def test_who_leaves_while_waiting_is_forgotten_at_once(engine: Engine) -> None:
    """Its decoded films are large: they must not wait for the ones that run."""
    running = Counting()
    engine.submit(running)
    assert running.begun.wait(PATIENCE)
    waiting = [Counting() for _ in range(3)]
    for job in waiting:
        engine.submit(job)
    for job in waiting[:2]:
        job.cancel()
        assert job.finished.wait(PATIENCE)
    assert engine.waiting == 1
    assert not running.finished.is_set()
    assert not any(job.begun.is_set() for job in waiting)


def test_nobody_waits_for_an_engine_that_has_ended(engine: Engine) -> None:
    engine.close()
    late = Counting()
    engine.submit(late)
    assert late.errors == [None]
    assert late.cancelled


def test_those_that_run_have_their_time_between_two_prefills(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as a prefill took, and DECODE_SECONDS at most."""
    clock = Clock()
    monkeypatch.setattr(engine_module, "time", clock)
    engine = Engine(4, 10, lambda _: None)
    jobs = [Counting(prefill_seconds=seconds, clock=clock) for seconds in (0.0, 0.01, 0.1, 0.0)]
    for job in jobs:
        engine.submit(job)
    engine.start()
    try:
        for job in jobs:
            assert job.begun.wait(PATIENCE)
    finally:
        engine.close()
    a_round = 4 * STEP_SECONDS
    assert 0.0 <= jobs[1].since - jobs[0].since - 0.01 < 2 * a_round
    assert 0.0 <= jobs[2].since - jobs[1].since - 0.01 - 0.1 < 2 * a_round
    assert 0.0 <= jobs[3].since - jobs[2].since - DECODE_SECONDS < 2 * a_round
