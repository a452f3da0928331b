"""`make attack`: trials of every kind of attack on two cores, and a table of what was tried and what failed.

    python -m tools.attack --trials 10000 --seed 1 [--minutes M] [--kinds NAME ...] [--json FILE] [--write]

Exit code 1 where anything failed. --write puts the table into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import framefusion
from framefusion.runtime.machine.cpu import available_cores
from tools.attack.harness import FAULTS, Kind, Tally, World, attack, in_child
from tools.attack.kinds import KINDS
from tools.attack.world import world_in

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN = "<!-- attack -->"
END = "<!-- /attack -->"


def main() -> int:
    arguments = parse()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    kinds = [kind for kind in KINDS if arguments.kinds is None or kind.name in arguments.kinds]
    with tempfile.TemporaryDirectory(prefix="attack-") as place:
        started = time.monotonic()
        (Path(place) / "world").mkdir()
        world = world_in(Path(place) / "world")
        ready = time.monotonic()
        tallies = side_by_side(kinds, world, Path(place), arguments)
    result = facts(kinds, tallies, arguments) | {
        "seconds_of_preparation": round(ready - started, 1), "seconds": round(time.monotonic() - ready, 1),
    }  # fmt: skip
    print(table(result))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.write:
        write(result)
    return int(any(row["faults"] for row in result["kinds"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.attack", description="Attack the commands, seeded.")
    parser.add_argument("--trials", type=int, default=10_000, help="of all kinds together (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn (%(default)s)")
    parser.add_argument("--minutes", type=float, help="after which no trial begins")
    parser.add_argument("--jobs", type=int, default=min(2, available_cores()), help="processes (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=[kind.name for kind in KINDS], help="these only")
    parser.add_argument("--json", help="file for all that was counted")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    return parser.parse_args()


def side_by_side(kinds: list[Kind], world: World, place: Path, arguments: argparse.Namespace) -> dict[str, Tally]:
    """The trials in `jobs` processes; their tallies together."""
    from concurrent.futures import ThreadPoolExecutor

    def run(number: int) -> dict[str, Any]:
        scratch = place / str(number)
        scratch.mkdir()

        def trials() -> dict[str, Any]:
            tallies = attack(
                kinds, world, scratch, trials=arguments.trials, seed=arguments.seed, minutes=arguments.minutes,
                part=(number, arguments.jobs),
            )  # fmt: skip
            return {name: vars(tally) for name, tally in tallies.items()}

        end = in_child(trials, 1e9)
        if end.status != 0:
            raise RuntimeError(f"the harness failed: {end.result}")
        counted: dict[str, Any] = end.result
        return counted

    with ThreadPoolExecutor(arguments.jobs) as pool:
        parts = list(pool.map(run, range(arguments.jobs)))
    tallies = {kind.name: Tally() for kind in kinds}
    for part in parts:
        for name, counts in part.items():
            tally = tallies[name]
            tally.tried += counts["tried"]
            tally.faults += Counter(counts["faults"])
            tally.first += counts["first"]
            tally.slowest = max(tally.slowest, counts["slowest"])
            tally.largest = max(tally.largest, counts["largest"])
    return tallies


def facts(kinds: list[Kind], tallies: dict[str, Tally], arguments: argparse.Namespace) -> dict[str, Any]:
    """All that was counted, as plain values."""
    limit = f" --minutes {arguments.minutes:g}" if arguments.minutes else ""
    rows = []
    for kind in kinds:
        tally = tallies[kind.name]
        rows.append(
            {
                "kind": kind.name, "about": kind.about, "tried": tally.tried,
                "faults": dict(tally.faults), "first": tally.first,
                "slowest_seconds": round(tally.slowest, 2), "largest_bytes": tally.largest,
            }
        )  # fmt: skip
    return {
        "command": f"python -m tools.attack --trials {arguments.trials} --seed {arguments.seed}{limit}",
        "date": datetime.date.today().isoformat(), "version": framefusion.__version__,
        "python": platform.python_version(), "cores": os.cpu_count(), "kinds": rows,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """In Markdown."""
    titles = {"lost": "files lost", "traceback": "tracebacks", "hang": "hung", "memory": "over 2 GB"}
    heads = ["attack", "tried", *(titles.get(fault, fault) for fault in FAULTS), "slowest", "most memory"]
    lines = [
        f"`{result['command']}`, {result['date']}, version {result['version']}, Python {result['python']}, "
        f"{result['cores']} cores, {result['seconds'] / 60:.0f} minutes:", "",
        f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}",
    ]  # fmt: skip
    for row in result["kinds"]:
        counts = [str(row["faults"].get(fault, 0)) for fault in FAULTS]
        size = f"{row['largest_bytes'] / 1e9:.2f} GB"
        cells = [f"{row['kind']}: {row['about']}", str(row["tried"]), *counts, f"{row['slowest_seconds']} s", size]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(result: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    start = text.index(BEGIN) + len(BEGIN)
    end = text.index(END)
    PAGE.write_text(f"{text[:start]}\n\n{table(result)}\n\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
