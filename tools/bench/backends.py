"""Backends of one machine side by side: prefill and decode of the same weights, dense and reduced, in turn.

    python -m tools.bench.backends --write
    python -m tools.bench.backends --contenders onnxruntime:float32,openvino-bf16:float32 --rounds 3

A contender is a backend and the type of the bundle that it runs. All are open in one process and take turns, run by
run, so that other work on the machine slows all of them. Beside the seconds stand the error of the logits against the
first contender's at the same cost, and the memory of a process that holds one contender alone: its own pages, and those
of files that it has mapped, which the system takes back where memory is short.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from framefusion.runtime.backends import table
from tools.bench.prefill import median
from tools.bench.runs import Run, Setting, add_flags, parse
from tools.bench.setting import report, summary

CONTENDERS = "onnxruntime:float32,inductor:bfloat16,openvino:float32,openvino-bf16:float32"
STATUS = Path("/proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, [1.0, 0.3])
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=CONTENDERS.split(","))
    parser.add_argument("--memory-of", help="run this contender alone, dense, and print the memory of the process")
    arguments = parse(parser)
    if arguments.memory_of is not None:
        print(json.dumps(memory_of(arguments)))
        return
    memory = {name: memory_in_a_process(name) for name in arguments.contenders}  # while nothing else is open
    settings = {name: setting_of(arguments, name) for name in arguments.contenders}
    runs: dict[str, dict[str, list[Run]]] = {name: {} for name in settings}
    for turn in range(arguments.rounds + 1):
        for cost in settings[arguments.contenders[0]].requests:
            for name, setting in settings.items():
                run = setting.run(setting.requests[cost])
                if turn:  # the first one warms up
                    runs[name].setdefault(cost, []).append(run)
    first = settings[arguments.contenders[0]]
    expected = runs[arguments.contenders[0]]
    figures: dict[str, Any] = first.facts
    for fact in ("backend", "dtype", "captured_decode"):
        del figures[fact]
    figures["costs"] = arguments.costs
    figures["contenders"] = {
        name: {
            "backend": setting.choice.facts,
            "dtype": setting.model.dtype,
            "computes": table.backend(setting.choice.option.backend).computes or setting.model.dtype,
            "memory": memory[name],
        }
        | {cost: figures_of(measured, expected[cost]) for cost, measured in runs[name].items()}
        for name, setting in settings.items()
    }
    report("backends", figures, write=arguments.write)


def setting_of(arguments: argparse.Namespace, contender: str) -> Setting:
    """A bundle of the shared checkpoint in the contender's type, on its backend."""
    its = copy.copy(arguments)
    its.backend, _, its.dtype = contender.partition(":")
    return Setting(its)


def figures_of(runs: list[Run], first: list[Run]) -> dict[str, Any]:
    """Of one cost, beside the first contender's runs."""
    expected = first[0].logits
    return {
        "prefill": summary([run.prefill for run in runs]),
        "decode_per_token": summary([run.decode for run in runs]),
        "prefill_speed_up": median(first, "prefill") / median(runs, "prefill"),
        "decode_speed_up": median(first, "decode") / median(runs, "decode"),
        "kv_lengths": runs[0].lengths,
        "logits_relative_error": float(np.abs(runs[0].logits - expected).max() / np.abs(expected).max()),
    }


def memory_in_a_process(contender: str) -> dict[str, float]:
    """What `memory_of` finds in a process that loads nothing else."""
    command = [sys.executable, "-m", "tools.bench.backends", *sys.argv[1:], "--memory-of", contender]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_of(arguments: argparse.Namespace) -> dict[str, float]:
    """Megabytes of this process before the contender is opened, once it is, and behind a dense request."""
    before = pages()
    setting = setting_of(arguments, arguments.memory_of)
    opened = pages()
    setting.run(setting.requests[setting.dense])
    behind = pages()
    names = {"anonymous": "RssAnon", "mapped": "RssFile"}
    found = {f"{name}_opened_mb": opened[key] - before[key] for name, key in names.items()}
    found |= {f"{name}_answered_mb": behind[key] - before[key] for name, key in names.items()}
    return {name: round(megabytes, 1) for name, megabytes in found.items()}


def pages() -> dict[str, float]:
    """Resident megabytes by kind."""
    lines = (line.partition(":") for line in STATUS.read_text().splitlines())
    return {name: int(value.split()[0]) / 1e3 for name, _, value in lines if name.startswith("Rss")}


if __name__ == "__main__":
    main()
