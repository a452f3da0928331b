"""Several callers of one pipeline: threads, tasks of asyncio, whoever leaves, and Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion import Pipeline, Request
from framefusion.errors import ClosedError, PromptError, VideoError
from framefusion.runtime.concurrency.step_runner import StepRunner, runner_of
from framefusion.runtime.request import Step
from tests.patience import PATIENCE

WHAT = "What happens?"
FEW = Request(max_new_tokens=4)
MANY = Request(max_new_tokens=60, stop=("\0",))


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE))


async def until(condition: Callable[[], bool]) -> None:
    """A loop that stands still fails here."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        await asyncio.sleep(0.005)


class Slow:
    """Steps that say when they are computed, and do what the test wants meanwhile."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self.meanwhile = meanwhile
        self.computing = 0
        self.most = 0
        self.taken: list[str] = []
        self.closed: list[str] = []

    def steps(self, name: str, count: int = 4) -> Generator[Step, None, None]:
        try:
            for _ in range(count):
                self.computing += 1
                self.most = max(self.most, self.computing)
                self.meanwhile()
                self.computing -= 1
                self.taken.append(name)
                yield Step("token", name)
        finally:
            self.closed.append(name)


# --- Threads --------------------------------------------------------------------------------------------------------


def test_one_step_is_computed_at_a_time_and_threads_take_turns() -> None:
    runner = StepRunner()
    slow = Slow(lambda: time.sleep(0.004))
    together = threading.Barrier(3)

    def take(name: str) -> list[Step]:
        together.wait(PATIENCE)
        return list(runner.steps(slow.steps(name, 8)))

    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(take, "abc"))
    assert slow.most == 1
    assert [len(steps) for steps in answers] == [8, 8, 8]
    assert len(set(slow.taken[:12])) == 3  # nobody waited for the whole answer of another


def test_threads_get_the_answers_that_each_would_get_alone(pipeline: Pipeline, film: Path, picture: Path) -> None:
    requests: list[tuple[str, list[Path]]] = [(WHAT, [film]), ("Who is it?", [picture]), ("Where?", [])]
    alone = [pipeline.generate(text, files, FEW) for text, files in requests]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda request: pipeline.generate(request[0], request[1], FEW), requests))
    assert [(a.token_ids, a.kv_lengths) for a in together] == [(a.token_ids, a.kv_lengths) for a in alone]


def test_pipelines_over_one_backend_share_its_turns(pipeline: Pipeline) -> None:
    other = Pipeline(pipeline.bundle, pipeline.backend)
    assert other.runner is pipeline.runner is runner_of(pipeline.backend)

    class Backend:
        pass

    backend = Backend()
    runner = weakref.ref(runner_of(backend))
    del backend
    assert runner() is None


def test_a_turn_within_a_turn_is_the_same_one() -> None:
    runner = StepRunner()
    slow = Slow(lambda: None)
    with runner.turn(), runner.turn():
        assert len(list(runner.steps(slow.steps("a")))) == 4
    with ThreadPoolExecutor(1) as threads:  # all of it is given back
        assert len(threads.submit(list, runner.steps(slow.steps("b"))).result(PATIENCE)) == 4


def test_a_session_refuses_a_second_turn_from_another_thread(pipeline: Pipeline, film: Path) -> None:
    chat = pipeline.chat(film, request=FEW)
    steps = chat.stream(WHAT)
    next(steps)
    with ThreadPoolExecutor(1) as threads, pytest.raises(PromptError, match="a turn of this session is not over"):
        threads.submit(chat.ask, WHAT).result()
    rest = [step.token_id for step in steps if step.token_id is not None]
    assert tuple(rest) == pipeline.generate(WHAT, [film], FEW).token_ids


def test_closing_waits_for_the_step_of_another_thread(pipeline: Pipeline) -> None:
    opened = Pipeline(pipeline.bundle, pipeline.backend)
    begun = threading.Event()
    free = threading.Event()

    def hold() -> bool:
        with opened.runner.turn():
            begun.set()
            free.wait(PATIENCE)
            return "backend" in vars(opened)

    with ThreadPoolExecutor(2) as threads:
        held = threads.submit(hold)
        assert begun.wait(PATIENCE)
        closing = threads.submit(opened.close)
        time.sleep(0.02)
        assert not closing.done()
        free.set()
        assert held.result()
        closing.result()
    with pytest.raises(ClosedError):
        opened.generate(WHAT)


@pytest.mark.slow
def test_ctrl_c_leaves_a_pipeline_usable(pipeline: Pipeline, film: Path) -> None:
    expected = pipeline.generate(WHAT, [film], MANY).token_ids
    main = threading.main_thread().ident
    assert main is not None
    interrupted = 0
    for delay in (0.0, 0.003, 0.01, 0.02, 0.03):
        timer = threading.Timer(delay, signal.pthread_kill, (main, signal.SIGINT))
        try:
            timer.start()
            while timer.is_alive():
                pipeline.generate(WHAT, [film], MANY)
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
    assert interrupted == 5
    assert pipeline.generate(WHAT, [film], MANY).token_ids == expected
    with ThreadPoolExecutor(1) as threads:  # no turn was left behind
        assert threads.submit(pipeline.generate, WHAT, [film], MANY).result(PATIENCE).token_ids == expected


def test_whoever_waits_for_a_turn_can_be_interrupted() -> None:
    runner = StepRunner()
    begun = threading.Event()
    free = threading.Event()

    def hold() -> None:
        with runner.turn():
            begun.set()
            free.wait(PATIENCE)

    holder = threading.Thread(target=hold)
    holder.start()
    assert begun.wait(PATIENCE)
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        while not runner._turnstile.locked():  # held by whoever waits next
            time.sleep(0.001)
        signal.pthread_kill(main, signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt), runner.turn():
        raise AssertionError("it was another's turn")
    interrupting.join()
    free.set()
    holder.join()
    with runner.turn():
        pass


# --- asyncio --------------------------------------------------------------------------------------------------------


def test_steps_and_answers_are_those_of_the_other_door(pipeline: Pipeline, film: Path) -> None:
    expected = pipeline.generate(WHAT, [film], FEW)

    async def ask() -> None:
        steps = [step async for step in pipeline.astream(WHAT, [film], FEW, logits=True)]
        assert tuple(step.token_id for step in steps if step.kind == "token") == expected.token_ids
        assert all(step.logits is not None for step in steps if step.kind == "token")
        pieces: list[str] = []
        answer = await pipeline.agenerate(WHAT, [film], FEW, on_text=pieces.append)
        assert (answer.token_ids, answer.kv_lengths) == (expected.token_ids, expected.kv_lengths)
        assert "".join(pieces) == answer.text
        chat = pipeline.chat(film, request=FEW)
        assert (await chat.aask(WHAT)).token_ids == expected.token_ids
        assert [step.kind async for step in chat.astream("Who?")][-1] == "end"
        assert chat.records[1].reused_tokens > expected.prompt_tokens

    run(ask())


def test_errors_arrive_where_they_are_awaited(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="cannot be opened"):
        run(pipeline.agenerate(WHAT, [tmp_path / "none.mp4"]))
    with pytest.raises(PromptError, match="files is one name"):
        run(pipeline.agenerate(WHAT, "clip.mp4"))


def test_the_loop_runs_on_and_two_tasks_take_turns() -> None:
    runner = StepRunner()
    ticked = threading.Event()

    def wait_for_a_tick() -> None:
        ticked.clear()
        assert ticked.wait(PATIENCE)

    slow = Slow(wait_for_a_tick)

    async def tick() -> None:
        while True:
            ticked.set()
            await asyncio.sleep(0.002)

    async def take(name: str) -> list[Step]:
        return [step async for step in runner.async_steps(slow.steps(name))]

    async def both() -> None:
        ticking = asyncio.create_task(tick())
        answers = await asyncio.gather(take("a"), take("b"))
        ticking.cancel()
        assert [len(steps) for steps in answers] == [4, 4]

    run(both())
    assert slow.most == 1
    assert sorted(slow.taken[:2]) == ["a", "b"]


def test_two_tasks_on_one_pipeline_get_their_answers(pipeline: Pipeline, film: Path, picture: Path) -> None:
    async def both() -> Any:
        return await asyncio.gather(pipeline.agenerate(WHAT, [film], FEW), pipeline.agenerate("Who?", [picture], FEW))

    first, second = run(both())
    assert first.token_ids == pipeline.generate(WHAT, [film], FEW).token_ids
    assert second.token_ids == pipeline.generate("Who?", [picture], FEW).token_ids


@pytest.mark.parametrize("leave", ["cancel", "aclose", "break", "timeout"])
def test_whoever_leaves_stops_the_request_at_its_next_step(leave: str) -> None:
    runner = StepRunner()
    slow = Slow(lambda: time.sleep(0.01))

    async def go() -> None:
        steps: AsyncGenerator[Step, None] = runner.async_steps(slow.steps("a", 1000))

        async def take() -> None:
            async for _ in steps:
                if leave == "break":
                    break

        if leave == "timeout":
            await steps.__anext__()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(take(), 0.03)
        elif leave == "cancel":
            task = asyncio.create_task(take())
            await until(lambda: len(slow.taken) > 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif leave == "aclose":
            await steps.__anext__()
            await steps.aclose()
        else:
            await take()
            await steps.aclose()
        await until(lambda: slow.closed == ["a"])

    run(go())
    assert len(slow.taken) < 20


def test_a_cancelled_request_frees_its_caches_and_its_session_goes_on(pipeline: Pipeline, film: Path) -> None:
    async def go() -> None:
        chat = pipeline.chat(film, request=MANY)
        task = asyncio.create_task(chat.aask(WHAT))
        await until(lambda: chat.cache_bytes >= 0 and pipeline.runner._owner is not None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert chat.turns == ()
        answer = await chat.aask(WHAT, request=FEW)  # at once: the worker closes the first turn before it begins this
        assert answer.token_ids == pipeline.generate(WHAT, [film], FEW).token_ids
        assert len(chat.records) == 1

    run(go())


def test_a_loop_that_ends_leaves_no_work_behind(pipeline: Pipeline, film: Path) -> None:
    """asyncio.run cancels what still runs; the next loop asks the same pipeline."""

    async def leave() -> None:
        task = asyncio.create_task(pipeline.agenerate(WHAT, [film], MANY))
        await asyncio.sleep(0.005)
        assert not task.done()

    asyncio.run(leave())
    answer = run(pipeline.agenerate(WHAT, [film], FEW))
    assert answer.token_ids == pipeline.generate(WHAT, [film], FEW).token_ids


def test_nothing_of_a_request_is_computed_before_its_first_step(pipeline: Pipeline) -> None:
    class Untouched:
        def __array__(self, *_: Any, **__: Any) -> np.ndarray[Any, Any]:
            raise AssertionError("nobody wanted a step")

    pipeline.stream(WHAT, [Untouched()])
    pipeline.astream(WHAT, [Untouched()])
