"""Checkpoints with one thing changed at random: each is planned, or refused with an error of ours, in time.

    python -m tools.attack.checkpoints --trials 2000 --seed 0

A tiny checkpoint of every family and of every quantized format is written; config.json, an index or the header of a
safetensors file is changed, and a build is planned, which reads all but the numbers; of quantized ones these, too.
Prints one JSON object; exit code 1 where a trial failed.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from framefusion.errors import FrameFusionError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.writing.parts import Builder
from tools.attack.alone import run_alone

SECONDS = 120
"""That a plan of a tiny checkpoint may take, whatever is in its files."""
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 7, 10**6, 10**9, 10**18, 10**400, -(10**18), 0.5, 1.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "0", "1e9", "../..", "/etc/passwd", "a\0b", "\x1b[2J", "x" * 5000, [], {}, [[]], [None],
    [-1], [1, 2], [10**9], [0.5, "x"], ["x"], {"": 1}, {"type": "x"}, {"rope_type": 1}, [[1, 2], [3]],
    "(1x1),...,(99999x99999)",
)  # fmt: skip
CHANGES = ("value", "value", "value", "value", "remove", "remove", "double", "double", "swap", "swap", "bytes", "cut")
KINDS = {"config.json": 7, "*.index.json": 2, "*.safetensors": 2}
"""Pattern of a file's name -> its share of the trials."""


class TooSlowError(BaseException):
    """A plan took longer than SECONDS; nothing that catches exceptions may catch this one."""


def attack(trials: int, seed: int, folders: Sequence[Path] = ()) -> dict[str, Any]:
    """Change checkpoints at random and plan a build of each.

    Args:
        trials: how many.
        seed: of all that is random.
        folders: whole checkpoints; none writes a tiny one of every family, one in shards, and one in every format of
            quantized ones.

    Returns:
        how many were planned and refused, the trials that ended otherwise, the slowest and the memory.
    """
    chance = random.Random(seed)
    counts = Counter[str]()
    failed = list[dict[str, Any]]()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as place:
        subjects = list(folders) or list(written(Path(place)))
        for index in range(trials):
            spoiled = Path(place) / "spoiled"
            shutil.copytree(chance.choice(subjects), spoiled)
            change = spoil(spoiled, chance)
            start = time.perf_counter()
            outcome, error = outcome_of(spoiled)
            slowest = max(slowest, time.perf_counter() - start)
            counts[outcome] += 1
            if error is not None:
                failed.append({"trial": index, "change": change, "error": error})
            shutil.rmtree(spoiled)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {
        "attack": "checkpoints", "seed": seed, "trials": trials, **counts, "failed": failed, "slowest_s": slowest,
        "peak_mb": peak,
    }  # fmt: skip


def written(place: Path) -> Iterator[Path]:
    """A tiny checkpoint of every family, one in shards, and one in every format of quantized ones."""
    from tests.families import CASES
    from tests.quantized_checkpoints import FORMATS, quantized
    from tests.random_checkpoint import random_checkpoint

    for case in CASES:
        folder = place / case.family
        folder.mkdir()
        case.write(folder, case.variants[0])
        yield folder
    yield random_checkpoint(place / "sharded", max_shard_size="60KB")
    plain = random_checkpoint(place / "plain", layers=2)
    for name in FORMATS:
        yield quantized(plain, place / name, name)


def spoil(folder: Path, chance: random.Random) -> str:
    """Change one file of a checkpoint; returns what was done."""
    files = {kind: sorted(folder.rglob(kind)) for kind in KINDS}
    shares = {kind: share for kind, share in KINDS.items() if files[kind]}
    (kind,) = chance.choices(list(shares), list(shares.values()))
    path = chance.choice(files[kind])
    change = chance.choice(CHANGES)
    content = path.read_bytes()
    if change == "bytes":
        changed = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(min(len(changed), 4000))] = chance.randrange(256)
        path.write_bytes(bytes(changed))
        return f"{path.name}: bytes"
    if change == "cut":
        path.write_bytes(content[: chance.randrange(len(content))])
        return f"{path.name}: cut"
    if path.suffix == ".json":
        edited = json.loads(content)
        what = change_object(edited, change, chance)
        path.write_text(json.dumps(edited))
        return f"{path.name}: {what}"
    length = int.from_bytes(content[:8], "little")
    edited = json.loads(content[8 : 8 + length])
    what = change_object(edited, change, chance)
    header = json.dumps(edited).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    return f"{path.name}: {what}"


def change_object(edited: Any, change: str, chance: random.Random) -> str:
    """Change one place of a JSON object; returns what was done."""
    places = list(_places(edited, ()))
    above, key, trail = chance.choice(places)
    name = ".".join(map(str, (*trail, key)))
    if change == "remove":
        del above[key]
    elif change == "double":
        above[key] = [above[key], above[key]]
    elif change == "swap":
        other, index, _ = chance.choice(places)
        above[key], other[index] = other[index], above[key]
    else:
        value = chance.choice(VALUES)
        above[key] = value
        return f"{name} = {value!r:.40}"
    return f"{change} {name}"


def _places(value: Any, trail: tuple[Any, ...]) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    """Container, key and the way to it, of everything within a JSON value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, item in items:
        yield value, key, trail
        yield from _places(item, (*trail, key))


def outcome_of(folder: Path) -> tuple[str, str | None]:
    """What planning a checkpoint came to, and what was wrong with that."""
    try:
        with _alarm():
            checkpoint = Checkpoint(folder)
            quantized = checkpoint.quantization.linears if checkpoint.quantization is not None else {}
            weights = "dequantized" if quantized else None
            Builder(BuildPlan(checkpoint, BuildOptions(cost=0.5, weights=weights))).sizes()
            for key in quantized:  # what headers have proven must be enough to read the numbers
                checkpoint.tensor(key)
                checkpoint.quantized(key)
    except FrameFusionError as error:
        return "refused", None if str(error).isprintable() else f"not printable: {error!r:.200}"
    except (Exception, TooSlowError) as error:  # any other is what the attack looks for
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f"{type(error).__name__}: {error!s:.120} ({Path(last.filename).name}:{last.lineno})"
    return "planned", None


@contextmanager
def _alarm() -> Iterator[None]:
    """Raise TooSlowError where the body takes longer than SECONDS."""

    def ring(*_: object) -> None:
        raise TooSlowError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    run_alone(__doc__, attack)
