"""Results one after the other, each computed on a thread while the one before it is used: never more than one ahead.

    worker   | 0 | 1 |    | 2 |    | 3 |
    caller       | use 0  | use 1  | use 2 | use 3

A result is begun when the one before it is taken, so two are held at most: the one in use and the one behind it. Knows
no film.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from threading import Event
from typing import TypeAlias, TypeVar

Result = TypeVar("Result")


Job: TypeAlias = "Callable[[Callable[[], bool]], Result]"
"""Given `is_ended`, which says whether its result is not wanted any more; one that takes long asks it."""


def in_turn(jobs: Sequence[Job[Result]]) -> Generator[Result, None, None]:
    """The jobs' results, each computed when it is asked for, by whoever asks."""
    for job in jobs:
        yield job(lambda: False)


def one_ahead(
    jobs: Sequence[Job[Result]], name: str = "framefusion-ahead", meanwhile: Callable[[int], None] = lambda _: None
) -> Generator[Result, None, None]:
    """The jobs' results, in order. Close the generator (`contextlib.closing`) where they are not taken to the end.

    No two jobs run at once. What one raises is raised where its result would have come, and none begins behind it. The
    end waits for the job that runs: it is over when the generator is.

    Args:
        jobs: see `Job`.
        name: of the thread.
        meanwhile: called with the number of the job whose result is wanted now, before it is waited for.
    """
    ended = Event()
    context = copy_context()  # of the caller, as asyncio.to_thread has it
    worker = ThreadPoolExecutor(1, name)
    remaining = iter(jobs)

    def begun() -> list[Future[Result]]:
        """The next job, if there is one."""
        job = next(remaining, None)
        return [] if job is None else [worker.submit(context.run, job, ended.is_set)]

    try:
        pending = begun()
        for number in range(len(jobs)):
            meanwhile(number)
            taken = [pending.pop().result()]
            pending = begun()
            yield taken.pop()  # what is large is held by the caller alone
    finally:
        ended.set()
        worker.shutdown(cancel_futures=True)
