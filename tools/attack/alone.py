"""One attack run by itself: `python -m tools.attack.NAME --trials N --seed S` prints what was counted as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any


def run_alone(description: str | None, attack: Callable[[int, int], dict[str, Any]]) -> None:
    """Read the flags, run the attack, print its facts; exit code 1 where a trial failed.

    Args:
        description: the module's docstring, for --help.
        attack: (trials, seed) -> facts, among them the list `failed`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    facts = attack(arguments.trials, arguments.seed)
    print(json.dumps(facts))
    sys.exit(bool(facts["failed"]))
