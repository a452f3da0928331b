"""What this machine has for running bundles, and whether what is there computes right: no bundle is needed.

Each proof is a process of its own with a time limit (blocks/child.py), so a library that is broken, crashes or hangs is
a line of the report. Loads neither numpy nor any library, so it works where those are broken.
"""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import framefusion
from framefusion.runtime.backends import table
from framefusion.runtime.machine import cpu
from framefusion.runtime.proof.blocks.child import MARK

SCHEMA = 1
CHILD = "framefusion.runtime.proof.blocks.child"
PATIENCE = 120.0  # seconds for a proof; each takes one or two, the first load of a library of CUDA ten
ENGINE_PATIENCE = 400.0  # seconds where an engine is compiled before it is proven
AT_ONCE = 2
PACKAGES: Mapping[str, str] = {  # distribution -> what it is for
    "numpy": "everything",
    "onnxruntime": "backend onnxruntime on the CPU",
    "onnxruntime-gpu": "backend onnxruntime on CPU and GPU",
    "openvino": "backends openvino and openvino-bf16",
    "tokenizers": "prompts",
    "av": "films",
    "pillow": "pictures",
    "ml-dtypes": "bfloat16",
    "cuda-bindings": "buffers on a GPU",
    "nvidia-cuda-nvrtc": "kernels on a GPU, CUDA 13",
    "nvidia-cuda-nvrtc-cu12": "kernels on a GPU, CUDA 12",
    "tensorrt-rtx-cu13": "backend tensorrt-rtx",
    "tensorrt": "backend tensorrt",
    "torch": "ff-export, and backend inductor",
    "transformers": "ff-export",
}
BROKEN = ("wrong", "failed")
_ENGINES = "engines"  # the child's word for compiling some

Facts = dict[str, Any]


def examine(patience: float = PATIENCE, engines: bool = False) -> Facts:
    """Look at everything.

    Args:
        patience: seconds that a proof may take.
        engines: compile engines of the building blocks, too, where that is possible here, and prove them.

    Returns:
        Plain values; docs/checks.md lists them.
    """
    # 1. The driver is loaded in a process, too: one that crashes is no machine without a GPU.
    gpu = run_child(("gpu",), patience)
    seconds = gpu.pop("seconds")
    driver = (
        [] if gpu.get("state") not in BROKEN else [_of_job("driver", ("device", "cuda"), gpu | {"seconds": seconds})]
    )
    # 2. Each proof, a few at once.
    jobs = list(_jobs(has_gpu="capability" in gpu, engines=engines))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda job: run_child(job[1], patience if _ENGINES not in job[1] else ENGINE_PATIENCE), jobs)
        proofs = driver + [
            _of_job(name, arguments, facts) for (name, arguments), facts in zip(jobs, found, strict=True)
        ]
    return {
        "schema": SCHEMA,
        "framefusion": framefusion.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {"name": cpu.model_name(), "cores": cpu.available_cores(), "instructions": cpu.products()},
        "gpu": gpu if "capability" in gpu else None,
        "packages": {name: _version(name) for name in PACKAGES},
        "proofs": proofs,
        "right": all(_is_sound(proof) for proof in proofs),
    }


def _of_job(name: str, arguments: Sequence[str], facts: Facts) -> Facts:
    """A finding with what it is about."""
    backend = arguments[1] if arguments[0] == "backend" else None
    device = arguments[1] if backend is None else arguments[2]
    return {"name": name, "kind": arguments[0], "backend": backend, "device": device} | facts


def _jobs(*, has_gpu: bool, engines: bool = False) -> list[tuple[str, tuple[str, ...]]]:
    """All proofs, the devices first; the arguments are the child's."""
    devices = [("rows on cpu", ("device", "cpu")), ("rows on cuda", ("device", "cuda"))]
    backends = [
        (f"{row.name} on {device}", ("backend", row.name, device, *([_ENGINES] if engines and row.engines else [])))
        for row in table.BACKENDS
        for device in row.devices
        if has_gpu or device == "cpu" or len(row.devices) == 1
    ]
    return [*devices, *backends]


def _is_sound(proof: Facts) -> bool:
    """Not what is missing is unsound, but what is there and fails; and what the base install has to be able to do."""
    is_base = proof["device"] == "cpu" and proof["backend"] in (None, "onnxruntime")
    return proof["state"] == "right" if is_base else proof["state"] not in BROKEN


def _version(distribution: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(distribution)
    return None


def run_child(arguments: Sequence[str], patience: float) -> Facts:
    """What a process of its own finds out; that it crashed or took too long is a finding as well."""
    started = time.monotonic()
    command = [sys.executable, "-m", CHILD, *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=patience,
            check=False,
        )
        found = _last_object(done.stdout)
        facts = _ended(done.returncode, done.stderr) if found is None else found  # {} is a machine without a GPU
    except subprocess.TimeoutExpired:
        facts = _failed(f"it did not end within {patience:g} s")
    except OSError as error:
        facts = _failed(f"no process could be started ({error.strerror})")
    return facts | {"seconds": round(time.monotonic() - started, 3)}


def _last_object(output: str) -> Facts | None:
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    return json.loads(lines[-1].removeprefix(MARK)) if lines else None


def _ended(code: int, stderr: str) -> Facts:
    if code < 0:
        with suppress(ValueError):
            return _failed(f"it crashed ({signal.Signals(-code).name})")
    lines = stderr.strip().splitlines() or ["it said nothing"]
    return _failed(f"it ended with exit code {code} ({lines[-1][:300]})")


def _failed(problem: str) -> Facts:
    return {"state": "failed", "problem": problem, "remedy": "take another version of its library", "graphs": []}
