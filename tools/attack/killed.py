"""Attacks on builds: killed, interrupted or out of disk at any of their writes, once or more often, then run again.

The last run makes byte for byte what a build makes that nothing disturbs, and leaves nothing beside it.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from framefusion.export.writing import journal
from tools.attack.command import call, fault_of
from tools.attack.endings import Ending, draw_ending, run_until
from tools.attack.foreign import snapshot
from tools.attack.harness import Fault, World


def attack(rng: random.Random, world: World, folder: Path) -> Fault | None:
    """One bundle, by as many builds as it takes."""
    output = folder / "o"
    replaces = rng.random() < 0.5
    if replaces:
        shutil.copytree(world.bundle, output)
    build = ["build", str(world.checkpoint), "-o", str(output), "--no-check", *(["--force"] if replaces else [])]
    history = "--force " if replaces else ""
    for _ in range(rng.randint(1, 3)):
        ending = draw_ending(rng, world.events)
        history += f"{ending.kind} at {ending.at}, "
        end = run_until(lambda: call("ff-export", build), ending)
        fault = fault_of(end, history)
        if fault is not None:
            return fault
        if replaces and journal.valid_manifest(output) is None:
            return Fault("lost", f"{history}: no bundle has the name")
        if not replaces and output.exists():
            break
    return _last(build, history, world, folder)


def _last(build: list[str], history: str, world: World, folder: Path) -> Fault | None:
    end = run_until(lambda: call("ff-export", build), Ending("end"))
    fault = fault_of(end, history)
    if fault is not None:
        return fault
    done = end.result[0] == 0 or "exists: choose" in str(end.result[1])
    if not done:
        return Fault("wrong", f"{history}: the last build ended with {end.result}")
    left = sorted(path.name for path in folder.iterdir())
    if left != ["o"]:
        return Fault("wrong", f"{history}: left are {left}")
    built = snapshot(folder / "o")
    expected = snapshot(world.reference)
    if built != expected:
        names = [name for name in built.keys() | expected.keys() if built.get(name) != expected.get(name)]
        return Fault("wrong", f"{history}: other than a build that nothing disturbs: {names}")
    return None
