"""Runs trials of attacks in child processes with limits, and counts how they end. Knows no attack.

A trial is a function of a random generator, of a world prepared once, and of an empty folder; it returns what went
wrong, or nothing. It runs in a process of its own, forked from one that has imported everything: so a trial that
crashes, hangs or eats memory is one that failed, and no other notices. The same seed makes the same trials.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 120.0
"""Of one trial."""
MEMORY = 2 << 30
"""Bytes that one trial may take, resident."""
FAULTS = ("lost", "traceback", "hang", "memory", "wrong")
_KEPT = 20  # faults of a kind that are kept in full


class World(NamedTuple):
    """What the trials share; nobody changes it."""

    checkpoint: Path
    bundle: Path  # of real graphs
    reference: Path  # what a build without tracing makes of the checkpoint
    events: int  # writes of such a build, see endings.py
    compiled: Path | None  # a bundle that engines can be compiled for, all of them in `cache`
    cache: Path | None
    film: Path
    picture: Path
    checkpoints: tuple[Path, ...] = ()  # of every family


class Fault(NamedTuple):
    """What went wrong in a trial."""

    kind: str  # of FAULTS
    what: str


Attack = Callable[[random.Random, World, Path], "Fault | list[Fault] | None"]


class Kind(NamedTuple):
    """One kind of attack."""

    name: str
    about: str  # a phrase for the table
    attack: Attack
    share: float = 1.0  # of the trials, relative to the others
    batch: int = 1  # trials that one call runs
    seconds: float = SECONDS  # that one call may take


@dataclass
class Tally:
    """The trials of one kind."""

    tried: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    first: list[dict[str, Any]] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0  # bytes

    def add(self, trial: int, faults: Sequence[Fault], end: End, batch: int) -> None:
        """Count a trial, or a batch of them."""
        self.tried += batch
        self.slowest = max(self.slowest, end.seconds / batch)
        self.largest = max(self.largest, end.memory)
        for fault in faults:
            self.faults[fault.kind] += 1
            if len(self.first) < _KEPT:
                self.first.append({"trial": trial, "fault": fault.kind, "what": fault.what[-2000:]})


class End(NamedTuple):
    """How a child process ended."""

    status: int | None  # exit code, or the negative signal; None where it was ended for its time
    result: Any  # what the function returned; None where it did not come to that
    seconds: float
    memory: int  # bytes resident at the peak
    inherited: int  # of them, those of the process that it was forked from


def in_child(call: Callable[[], Any], seconds: float = SECONDS, *, group: bool = True) -> End:
    """Call a function in a forked process; what it returns must be plain.

    `group` ends those that it has forked along with it; theirs are in the group of whoever forked them.
    """
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child and group:
        with contextlib.suppress(OSError):  # the child does it, too: whoever is first
            os.setpgid(child, child)
    if child == 0:
        os.close(reading)
        _end_with(call, writing, group)
    os.close(writing)
    content = bytearray()
    timely = True
    while True:
        left = seconds - (time.monotonic() - start)
        if left <= 0 or not select.select([reading], [], [], left)[0]:
            timely = False
            (os.killpg if group else os.kill)(child, signal.SIGKILL)
            break
        piece = os.read(reading, 1 << 16)
        if not piece:
            break
        content += piece
    os.close(reading)
    _, status, usage = os.wait4(child, 0)
    inherited = 0
    value = None
    with contextlib.suppress(ValueError):
        inherited, value = json.loads(content)
    code = os.waitstatus_to_exitcode(status) if timely else None
    return End(code, value, time.monotonic() - start, usage.ru_maxrss * 1024, inherited)


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _end_with(call: Callable[[], Any], writing: int, group: bool) -> None:
    """The child's part: sends the bytes that it began with, and what the call returns; never returns."""
    # What the parent has left to its collector stays: a film's scaler would wait for its threads, which no child has.
    gc.freeze()
    inherited = _resident()
    try:
        if group:
            os.setpgid(0, 0)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nowhere, number)
        content = json.dumps([inherited, call()]).encode()
        while content:
            content = content[os.write(writing, content) :]
        os._exit(0)
    except BaseException:
        content = json.dumps([inherited, traceback.format_exc()[-20000:]]).encode()
        os.write(writing, content)
        os._exit(1)


def run_trial(kind: Kind, seed: int, trial: int, world: World, place: Path) -> tuple[list[Fault], End]:
    """One trial, or a batch of them, in a folder of its own, which is gone afterwards."""
    rng = random.Random(f"{kind.name} {seed} {trial}")
    folder = place / f"{kind.name.replace(' ', '-')}-{trial}"
    folder.mkdir()

    def attack() -> list[list[str]]:
        outcome = kind.attack(rng, world, folder)
        if outcome is None:
            return []
        faults = outcome if isinstance(outcome, list) else [outcome]
        return [list(fault) for fault in faults]

    end = in_child(attack, kind.seconds)
    shutil.rmtree(folder, ignore_errors=True)
    if end.status is None:
        return [Fault("hang", f"not done after {kind.seconds:g} s")], end
    if end.status != 0:
        return [Fault("traceback", f"the process ended with {end.status}: {end.result}")], end
    faults = [Fault(*fault) for fault in end.result]
    if end.memory - end.inherited > MEMORY:
        faults.append(Fault("memory", f"{end.memory / 1e9:.1f} GB"))
    return faults, end


def attack(
    kinds: Sequence[Kind],
    world: World,
    place: Path,
    *,
    trials: int,
    seed: int,
    minutes: float | None = None,
    part: tuple[int, int] = (0, 1),
    on_progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Tally]:
    """Run trials of all kinds, by their shares.

    Args:
        kinds: what to try.
        world: what they share.
        place: an empty folder for theirs.
        trials: of all kinds together.
        seed: of all that is drawn.
        minutes: after which no trial begins.
        part: (i, n) runs every n-th trial, from the i-th.
        on_progress: called with the number of trials that were run.
    """
    tallies = {kind.name: Tally() for kind in kinds}
    start = time.monotonic()
    for number, (trial, kind) in enumerate(_order(kinds, trials)):
        if number % part[1] != part[0]:
            continue
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            break
        faults, end = run_trial(kind, seed, trial, world, place)
        tallies[kind.name].add(trial, faults, end, kind.batch)
        on_progress(sum(tally.tried for tally in tallies.values()))
    return tallies


def _order(kinds: Sequence[Kind], trials: int) -> Iterator[tuple[int, Kind]]:
    """Calls of all kinds in turns, each with its number within its kind, until there were so many trials."""
    whole = sum(kind.share for kind in kinds)
    run = dict.fromkeys((kind.name for kind in kinds), 0)
    while (done := sum(run.values())) < trials:
        kind = max(kinds, key=lambda kind: kind.share / whole * (done + kind.batch) - run[kind.name] - kind.batch / 2)
        yield run[kind.name] // kind.batch, kind
        run[kind.name] += kind.batch


def limit_file_size(size: int) -> None:
    """From here on no file of this process grows beyond `size`: what a full disk does, by the kernel itself."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
