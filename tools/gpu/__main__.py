"""Run the steps one after the other, each under its own limit, and keep what each gave at once.

    make gpu
    python -m tools.gpu [--device cpu --shape tiny] [--minutes 15] [--only kernels,attention] [--output FILE]

What a step needs and this machine lacks is said, and the step left out. The exit code is 1 where a step failed or ran
into its limit; the results of the others are kept all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from framefusion.runtime.machine.gpu import find_gpu
from tools.bench.setting import RESULTS, ROOT, SHAPES, commit, machine
from tools.gpu.steps import Step, steps

_TAIL = 2000  # characters of a step's output that are kept where it failed


def run(step: Step, seconds: float) -> dict[str, Any]:
    """What came of a step: its figures, or why there are none."""
    start = time.monotonic()
    process = subprocess.Popen(
        step.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a benchmark starts compilers
        output, errors = process.communicate()
        return {"outcome": f"ended after {seconds:.0f} s", "output": (output + errors)[-_TAIL:]}
    taken: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    if process.returncode:
        if step.is_json:  # a doctor that finds something wrong says what, and so does a benchmark that ends late
            with contextlib.suppress(ValueError):
                taken["figures"] = json.loads(output)
        return taken | {"outcome": f"failed with exit code {process.returncode}", "output": (output + errors)[-_TAIL:]}
    try:
        return taken | {"outcome": "done", "figures": json.loads(output) if step.is_json else output[-_TAIL:]}
    except ValueError:
        return taken | {"outcome": "printed no JSON", "output": output[-_TAIL:]}


def reason_to_skip(step: Step, device: str, only: list[str], left_s: float) -> str | None:
    """Why a step is left out; None where it is run."""
    if only and step.name not in only:
        return "not among --only"
    if step.on_gpu and device != "cuda":
        return "it needs a GPU"
    missing = [name for name in step.modules if not _is_installed(name)]
    if missing:
        return f"{', '.join(missing)} is not installed"
    return None if left_s > 1 else "no time is left"


def check_names(only: list[str], names: list[str]) -> None:
    """Refuse `--only` of what is no step: all would be left out, and that is no failure.

    Raises:
        SystemExit: with the names that there are.
    """
    if unknown := [name for name in only if name not in names]:
        sys.exit(f"--only: {', '.join(map(repr, unknown))} is no step: choose among {', '.join(names)}")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a package that holds it is not there
        return False


def keep(results: dict[str, Any], path: Path) -> None:
    """Write the results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp") as file:
        json.dump(results, file, indent=2)
    os.replace(file.name, path)


def main() -> None:
    """See the module."""
    arguments = parse()
    gpu = find_gpu()
    device = arguments.device or ("cuda" if gpu is not None else "cpu")
    if device == "cuda" and gpu is None:
        sys.exit("there is no NVIDIA GPU with a working driver here: --device cpu tries the steps themselves")
    name = gpu.name if device == "cuda" and gpu is not None else "cpu"
    path = arguments.output or RESULTS / "gpu" / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    if device == "cpu" and arguments.output is None:
        path = arguments.work / "gpu.json"  # figures of a CPU are none of these
    end = time.monotonic() + 60 * arguments.minutes
    results: dict[str, Any] = {"device": name, "shape": arguments.shape, "commit": commit(), "machine": machine()}
    results["steps"] = {}
    listed = steps(device, arguments.shape, arguments.work)
    check_names(arguments.only, [step.name for step in listed])
    for step in listed:
        left_s = end - time.monotonic()
        problem = reason_to_skip(step, device, arguments.only, left_s)
        outcome = {"outcome": f"left out: {problem}"} if problem else run(step, min(step.limit_s, left_s))
        results["steps"][step.name] = outcome
        keep(results, path)
        print(f"{step.name}: {outcome['outcome']}", flush=True)
    print(f"results: {path}")
    outcomes = [step["outcome"] for step in results["steps"].values()]
    sys.exit(0 if all(outcome == "done" or outcome.startswith("left out") for outcome in outcomes) else 1)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-vl-7b")
    parser.add_argument("--minutes", type=float, default=15, help="of all steps together")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="names of steps")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "framefusion-gpu")
    parser.add_argument("--output", type=Path, help="default: tools/bench/results/gpu/DEVICE.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
