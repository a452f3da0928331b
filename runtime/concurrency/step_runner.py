"""Who computes when several callers want steps of one backend: one at a time, in turns.

    threads     step a | step b | step a | ...          a thread waits while the step of another one is computed
    tasks       the event loop waits for none of them   a worker thread computes, in the order in which they were wanted

A step is a whole prefill or one token: between two of them the device and its buffers belong to nobody. Knows no
pipeline and no graph.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from contextvars import copy_context
from threading import Lock, RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

from framefusion.runtime.request import Generation, Step

_runners: WeakKeyDictionary[Any, StepRunner] = WeakKeyDictionary()
_runners_lock = Lock()


class StepRunner:
    """The turns of one backend, whichever pipelines and sessions share it."""

    def __init__(self) -> None:
        self._turnstile = Lock()  # held by whoever waits next, so that nobody who just had a turn overtakes
        self._busy = RLock()
        self._owner: int | None = None  # the thread whose turn it is
        self._worker = ThreadPoolExecutor(1, "framefusion-steps")  # starts its thread when it is first used

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Compute while no other thread does. Who has the turn already goes on."""
        if self._owner == get_ident():
            yield
            return
        try:
            with self._turnstile:
                self._busy.acquire()
            self._owner = get_ident()
            yield
        finally:
            self._release()

    def _release(self) -> None:
        if self._owner == get_ident():
            self._owner = None
        try:
            self._busy.release()
        except RuntimeError:  # Ctrl-C came while it waited: it is not this thread's
            return

    def steps(self, request: Generator[Step, None, None]) -> Generator[Step, None, None]:
        """The steps of a request, each in a turn of the thread that takes it."""
        try:
            while True:
                with self.turn():
                    step = next(request, None)
                if step is None:
                    return
                yield step
        finally:
            request.close()

    async def async_steps(self, request: Generator[Step, None, None]) -> AsyncGenerator[Step, None]:
        """The same for a task: the worker computes each, and the loop runs on.

        Whoever is cancelled or closes the generator waits for nothing: the worker ends its step, if one is computed,
        and closes the request before it takes up another.
        """
        import asyncio  # whoever has a task has it imported, and all others are spared it

        loop = asyncio.get_running_loop()
        context = copy_context()  # of the task, as asyncio.to_thread has it
        steps = self.steps(request)

        def compute() -> Step | None:
            return next(steps, None)

        try:
            while True:
                step = await loop.run_in_executor(self._worker, context.run, compute)
                if step is None:
                    return
                yield step
        finally:
            with suppress(RuntimeError):  # Python ends, and the worker is gone
                self._worker.submit(steps.close)


async def gather_answer(
    steps: AsyncGenerator[Step, None], on_text: Callable[[str], object] | None = None
) -> Generation:
    """Run a request to its end; a task that is cancelled meanwhile gives the request up.

    Args:
        steps: from "prefilled" to "end".
        on_text: called on the loop's thread with each piece of text that is not empty.
    """
    async with aclosing(steps):
        taken = []
        async for step in steps:
            taken.append(step)
            if step.text and on_text is not None:
                on_text(step.text)
    return Generation.from_steps(taken)


def runner_of(backend: object) -> StepRunner:
    """The runner of a backend, one for all who share it; it lives as long as the backend."""
    with _runners_lock:
        runner = _runners.get(backend)
        if runner is None:
            runner = _runners[backend] = StepRunner()
        return runner
