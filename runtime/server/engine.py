"""The one thread that computes: it takes requests one after the other into prefill and decodes all that run.

    waiting -> prefill, one at a time -> running: a token each, round after round -> done

A prefill computes all that the device can, so a second one beside it gains nothing; between two of them every running
request gets its next token, and as many more as fit the time of the last prefill, `DECODE_SECONDS` at most. Jobs of one
batch compute the tokens of a round in one call (generation/batching), others in turns. Whoever leaves is dropped in the
next round. Knows no protocol and no bundle.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from threading import Condition, Event, Thread

from framefusion.runtime.request import Step

_log = logging.getLogger("framefusion.server")
DECODE_SECONDS = 0.05
"""At most, for those that run, between two prefills: so much longer a waiting request waits, and for a round."""


class Job(ABC):
    """One request on its way through the engine; all methods but `cancel` run on the engine's thread."""

    def __init__(self) -> None:
        self._cancelled = Event()

    def cancel(self) -> None:
        """Nobody waits any more: the next round drops it. May be called by any thread, and again."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits any more."""
        return self._cancelled.is_set()

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of keys and values that it holds now."""

    @abstractmethod
    def start(self) -> Generator[Step, None, None]:
        """The steps of the answer, of which none is taken yet."""

    @abstractmethod
    def give(self, step: Step) -> None:
        """Hand a step to whoever waits."""

    @abstractmethod
    def finish(self, error: BaseException | None) -> None:
        """The last call: all steps were given, it was cancelled (both None), or it failed."""


class Engine:
    """Runs jobs on a thread of its own.

    Args:
        max_running: that decode at once.
        budget: bytes of keys and values of running jobs beyond which none begins; one alone always does.
        make_room: called with the bytes of the running ones before another begins.
    """

    def __init__(self, max_running: int, budget: int, make_room: Callable[[int], None]) -> None:
        self._max_running = max_running
        self._budget = budget
        self._make_room = make_room
        self._waiting: deque[Job] = deque()
        self._running: list[tuple[Job, Generator[Step, None, None]]] = []
        self._changed = Condition()
        self._closing = False
        self._next_prefill = 0.0  # not before, on time.monotonic's clock, while others run
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to take jobs."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; how many wait is the caller's to limit."""
        with self._changed:
            closing = self._closing
            if not closing:
                self._waiting.append(job)
            self._changed.notify()
        if closing:  # nobody takes it any more
            job.cancel()
            _finish(job, None)

    def close(self) -> None:
        """Drop what waits and what runs, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that were prefilled and are not done."""
        return len(self._running)

    def _run(self) -> None:
        """Rounds, until it is closed."""
        while True:
            with self._changed:
                while not self._waiting and not self._running and not self._closing:
                    self._changed.wait()
                if self._closing:
                    break
            self._round()
        for job, _ in self._running:
            job.cancel()
        self._drop_cancelled()
        for job in self._waiting:
            job.cancel()
            _finish(job, None)
        self._waiting.clear()

    def _round(self) -> None:
        """One prefill at most, then a token for each that runs."""
        # 1. Whoever left frees what it holds.
        self._drop_cancelled()
        # 2. One more begins, if there is room for it and those that run had their time since the last one.
        is_due = not self._running or time.monotonic() >= self._next_prefill
        if self._waiting and is_due and self._has_room():
            begun = time.monotonic()
            self._begin(self._waiting.popleft())
            ended = time.monotonic()
            self._next_prefill = ended + min(ended - begun, DECODE_SECONDS)
        # 3. Everyone gets a token.
        self._running = [(job, steps) for job, steps in self._running if self._advance(job, steps)]

    def _has_room(self) -> bool:
        if len(self._running) >= self._max_running:
            return False
        held = sum(job.nbytes for job, _ in self._running)
        if self._running and held >= self._budget:
            return False
        self._make_room(held)
        return True

    def _begin(self, job: Job) -> None:
        """Prefill, which is the first step."""
        try:
            steps = job.start()
        except Exception as error:
            _fail(job, error)
            return
        if self._advance(job, steps):
            self._running.append((job, steps))

    def _advance(self, job: Job, steps: Generator[Step, None, None]) -> bool:
        """Take a step; returns whether there are more."""
        if job.cancelled:
            _stop(job, steps)
            return False
        try:
            job.give(next(steps))
        except StopIteration:
            _finish(job, None)
            return False
        except Exception as error:
            with suppress(Exception):  # the first error is the one that counts
                steps.close()
            _fail(job, error)
            return False
        return True

    def _drop_cancelled(self) -> None:
        """Close what nobody waits for, so that its caches are free, and forget what has not begun, with its pixels."""
        with self._changed:
            gone = [job for job in self._waiting if job.cancelled]
            for job in gone:
                self._waiting.remove(job)
        for job in gone:
            _finish(job, None)
        stay = []
        for job, steps in self._running:  # looked at once each: callers may leave meanwhile
            if job.cancelled:
                _stop(job, steps)
            else:
                stay.append((job, steps))
        self._running = stay


def _stop(job: Job, steps: Generator[Step, None, None]) -> None:
    try:
        steps.close()
    except Exception as error:
        _fail(job, error)
    else:
        _finish(job, None)


def _finish(job: Job, error: BaseException | None) -> None:
    """The last call; whatever it does, the thread that all others wait for goes on."""
    try:
        job.finish(error)
    except Exception as bug:
        _log.error("a request did not end as it should", exc_info=bug)


def _fail(job: Job, error: Exception) -> None:
    """Tell whoever waits; what is nobody's fault is logged whole."""
    if getattr(error, "sender_fault", None) is not True:
        _log.error("a request failed", exc_info=error)
    _finish(job, error)
