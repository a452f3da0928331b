"""`ff-export compare`: transformers, transformers with `apply_framefusion`, and a bundle's backends on one film.

Like against like: the same film, frames, pixels, tokens and positions, the same type and number of threads, greedy
answers of the same length, one process a way, which is opened before the clock starts and answers once before it
counts. All ways answer in turn, round after round, so that whatever else the machine does meets all of them. Knows no
way from inside: see worker.py.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any

from framefusion.console import messages as console
from framefusion.errors import BackendError, FrameFusionError
from framefusion.export.compare.worker import DENSE, TRANSFORMERS, Outcome, Task, Way, serve
from framefusion.export.machine import available_memory
from framefusion.runtime.backends.choice import options
from framefusion.runtime.backends.table import backend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.commands.measure.bench import faster, spread
from framefusion.runtime.machine.machine import Machine
from framefusion.runtime.trust.engines import distrust

CLOSING_S = 10  # for a process that answered all


def ways_of(bundle: Bundle, costs: Sequence[float]) -> list[Way]:
    """transformers and each backend that runs the bundle on this CPU, at cost 1 and at the costs that are given.

    Raises:
        BackendError: the bundle decides at build time, so no cost can be asked of it.
    """
    if bundle.manifest.reduction.mode != "adaptive":
        raise BackendError("only a bundle of --reduction adaptive answers at several costs: leave --bundle out")
    untrusted = [engine.kind for engine in bundle.manifest.engines if distrust(bundle, engine.kind) is not None]
    here = [option for option in options(bundle, Machine.here(), untrusted) if option.device == "cpu"]
    runs = [option.backend for option in here if option.problem is None]
    # A way is a process with all weights: of the backends that run the graphs themselves the best is taken.
    graphs = [name for name in runs if backend(name, "cpu").engines is None]
    engines = [TRANSFORMERS, *reversed([name for name in runs if name not in graphs[1:]])]
    return [Way(engine, cost) for engine in engines for cost in dict.fromkeys((DENSE, *costs))]


def compare(
    ways: Sequence[Way], task: Task, rounds: int, progress: Callable[[int, int], object] = lambda *_: None
) -> dict[str, Any]:
    """Answer one question in every way, `rounds` times in turn.

    Args:
        ways: the first one is what the others are compared with.
        task: the question.
        rounds: that count.
        progress: called with answers given and answers in all.

    Returns:
        Plain values for JSON: under "ways" for each its cost, tokens kept, the median, least and most seconds to the
        first token, those of them spent on reading, tokens a second, peak of memory, its tokens, and whether they are
        the first way's.

    Raises:
        BackendError: too little memory for all ways at once, or a process ended by itself.
        FrameFusionError: of a way, such as a film that cannot be read.
    """
    bundle = Bundle(task.bundle, verify=False)
    require_memory(bundle, ways)
    outcomes: list[list[Outcome]] = [[] for _ in ways]
    with ExitStack() as stack:
        # 1. A process for each way, opened one behind the other.
        connections = [stack.enter_context(_Process(way, task)).connection for way in ways]
        # 2. All in turn; the first round warms up.
        for index in range(rounds + 1):
            for number, (connection, way) in enumerate(zip(connections, ways, strict=True)):
                outcome: Outcome = _exchange(connection, way, "answer")
                if index:
                    outcomes[number].append(outcome)
                progress(index * len(ways) + number + 1, (rounds + 1) * len(ways))
        # 3. What each has held at most, when all is done.
        peaks = [_exchange(connection, way, "end") for connection, way in zip(connections, ways, strict=True)]
    first = outcomes[0][0]
    rows = [facts_of(way, found, peak, first) for way, found, peak in zip(ways, outcomes, peaks, strict=True)]
    for row in rows:
        row["speed_up"] = rows[0]["first_token"]["median_s"] / row["first_token"]["median_s"]
    return {
        "rounds": rounds,
        "threads": task.threads,
        "dtype": bundle.manifest.model.dtype,
        "prompt_tokens": first.prompt_tokens,
        "visual_tokens": first.visual_tokens,
        "ways": rows,
    }


def require_memory(bundle: Bundle, ways: Sequence[Way]) -> None:
    """Refuse where the weights of all ways, in fp32 on a CPU, do not fit beside each other.

    Raises:
        BackendError: with both figures.
    """
    manifest = bundle.manifest
    widened = 1 if manifest.model.dtype == "float32" else 2
    weights = sum(segment.weight_bytes for segment in manifest.segments) + manifest.vision.weight_bytes
    needed = widened * weights * len(ways)
    if needed > available_memory():
        raise BackendError(
            f"{len(ways)} processes, one for each way, hold {console.in_bytes(needed)} of weights, "
            f"{console.in_bytes(available_memory())} are free: give one --cost, or compare a smaller model"
        )


class _Process:
    """One way in a process of its own, which ends with the block."""

    def __init__(self, way: Way, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, way, task), daemon=True)
        self._way = way
        self._other = other

    def __enter__(self) -> _Process:
        self._process.start()
        self._other.close()  # so that its end is noticed
        _received(self.connection, self._way)
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self._process.join(CLOSING_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _exchange(connection: Connection, way: Way, what: str) -> Any:
    """What a process answers; see `_received`."""
    with suppress(ConnectionError):  # it ended since its last answer: what it sent at its end says why
        connection.send(what)
    return _received(connection, way)


def _received(connection: Connection, way: Way) -> Any:
    """What a process sent.

    Raises:
        FrameFusionError: its own.
        BackendError: it ended.
    """
    try:
        message = connection.recv()
    except (EOFError, ConnectionError):
        raise BackendError(f"the process of {way.name} at cost {way.cost:g} ended: out of memory?") from None
    if isinstance(message, FrameFusionError):
        raise message
    return message


def facts_of(way: Way, outcomes: Sequence[Outcome], peak: int | None, first: Outcome) -> dict[str, Any]:
    """One way as plain values."""
    outcome = outcomes[0]
    behind = len(outcome.token_ids) - 1
    return {
        "engine": way.engine,
        "way": way.name,
        "cost": way.cost,
        "visual_tokens_kept": outcome.visual_kept,
        "first_token": spread([found.first_token for found in outcomes]),
        "read_s": statistics.median(found.read for found in outcomes),
        "tokens_per_second": behind / statistics.median(found.decode for found in outcomes) if behind else None,
        "peak_resident_bytes": peak,
        "token_ids": list(outcome.token_ids),
        "same_answer": outcome.token_ids == first.token_ids,
    }


def render(facts: Mapping[str, Any]) -> str:
    """A row a way, and under the table how it was taken."""
    ways = facts["ways"]
    head = ["", "cost", "first token", "faster", "kept", "tokens/s", "memory", "answer"]
    rows = []
    for way in ways:
        speed = way["tokens_per_second"]
        peak = way["peak_resident_bytes"]
        rows.append(
            [
                way["engine"],
                f"{way['cost']:g}",
                f"{way['first_token']['median_s']:.3f} s",
                faster(way, ways[0]),
                str(way["visual_tokens_kept"]),
                "-" if speed is None else f"{speed:.1f}",
                "-" if peak is None else console.in_bytes(peak),
                "same" if way["same_answer"] else "other",
            ]
        )
    read = statistics.median(way["read_s"] for way in ways)
    threads = f"{facts['threads']} thread" + "s" * (facts["threads"] > 1)
    lines = [
        console.table(head, rows),
        f"medians of {facts['rounds']} rounds in turn behind one that does not count; {facts['dtype']}, {threads}",
        f"{facts['prompt_tokens']} tokens of prompt, {facts['visual_tokens']} visual; {read:.3f} s of each: the film",
        "transformers below cost 1: with apply_framefusion, at the bundle's thresholds",
        "film, pixels, tokens and positions are the bundle's in all",
        "memory: the most that each process had; answer: the tokens of the first row, or other ones",
    ]
    return "\n".join(lines)
