"""What was found out on this device once: kept in the user's own cache, believed for the very same combination.

A proof holds for one bundle, backend, device, driver, library and code of this package. All of them are in the entry
and its name is their hash: whatever changes is another entry, and one that is damaged, another's or of other facts
counts as none. Knows no golden and runs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import framefusion
from framefusion.runtime.backends import table
from framefusion.runtime.backends.choice import Option
from framefusion.runtime.backends.fit import installed_version
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.machine import cpu
from framefusion.runtime.machine.machine import Machine
from framefusion.runtime.machine.user_cache import read_private, user_cache, write_private
from framefusion.storage.bounded_json import JsonError, parse_json

FOLDER = "proofs"  # of the user's cache
MOST_ENTRIES = 512
MOST_BYTES = 1 << 16
NVRTC = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

_ROOT = Path(__file__).parents[1]  # of the runtime
_CODE = ("backends", "families", "generation", "media", "proof", "text")
"""Folders whose code computes a proof's numbers; scores become plans in framefusion/reduction and its reducers."""


@dataclass(frozen=True)
class Combination:
    """What a proof holds for."""

    bundle: str  # digest of its manifest, which holds the hash of every file; or which building blocks
    backend: str
    device: str  # GPU and compute capability, or CPU and instruction set
    driver: str
    library: str  # and its version; on a GPU with the compiler of this package's own kernels
    code: str  # hash of this package's own

    @property
    def entry(self) -> Path:
        """The file that remembers it."""
        text = json.dumps(asdict(self), sort_keys=True)
        return user_cache(FOLDER) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


@dataclass(frozen=True)
class Verdict:
    """What a proof found, in few words."""

    right: bool
    text: str


def combination_of(bundle: Bundle, option: Option, machine: Machine) -> Combination:
    """This bundle on this backend, here and now. Nothing is loaded."""
    return _combination(bundle.digest, option, machine)


def combination_of_blocks(
    dialect: str, dtype: str, option: Option, machine: Machine, *, weights: str = ""
) -> Combination:
    """The building blocks of a dialect in a type, in place of a bundle: what `ff-run doctor` has found.

    Args:
        dialect, dtype: of the graph.
        option: that ran it.
        machine: here.
        weights: "int8" or "int4" for products of such codes, in place of the ops without weights.
    """
    blocks = f"products of {weights}" if weights else "building blocks"
    return _combination(f"{blocks} of {dialect} in {dtype}", option, machine)


def _combination(subject: str, option: Option, machine: Machine) -> Combination:
    device, driver = _processor() if option.device == "cpu" else _graphics(machine)
    return Combination(subject, option.backend, device, driver, _library(option), own_code())


def recall(combination: Combination) -> Verdict | None:
    """What was found for a combination; None where nothing was, or what is written there cannot be believed."""
    content = read_private(combination.entry, MOST_BYTES)
    try:
        entry: Any = None if content is None else parse_json(content, most_bytes=MOST_BYTES)
    except JsonError:
        return None
    if not isinstance(entry, dict) or entry.get("combination") != asdict(combination):
        return None
    right = entry.get("right")
    text = entry.get("text")
    return Verdict(right, text) if isinstance(right, bool) and isinstance(text, str) and len(text) < 1000 else None


def remember(combination: Combination, verdict: Verdict, proof: Mapping[str, Any]) -> bool:
    """Write down what was found; whether that could be done.

    Args:
        combination: that it holds for.
        verdict: what `recall` gives.
        proof: all stages, for people.
    """
    entry = {"combination": asdict(combination), **asdict(verdict), "proof": dict(proof)}
    return write_private(combination.entry, json.dumps(entry).encode(), MOST_ENTRIES)


@cache
def own_code() -> str:
    """A hash of the code of this package that a proof went through."""
    digest = hashlib.sha256(framefusion.__version__.encode())
    for path in _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def _sources() -> Iterator[Path]:
    folders = [_ROOT / name for name in _CODE]
    folders += [Path(framefusion.__file__).parent / name for name in ("reduction", "reducers")]
    for folder in folders:
        for place, names, files in os.walk(folder):
            names.sort()
            yield from (Path(place) / name for name in sorted(files) if name.endswith((".py", ".cu", ".onnx")))


def _processor() -> tuple[str, str]:
    """The CPU by name and instructions; it has no driver."""
    instructions = hashlib.sha256(" ".join(sorted(cpu.features())).encode()).hexdigest()[:16]
    return f"{cpu.model_name()}, instructions {instructions}", ""


def _graphics(machine: Machine) -> tuple[str, str]:
    gpu = machine.gpu
    if gpu is None:
        return "", ""
    driver = ".".join(map(str, gpu.cuda))
    with suppress(OSError, UnicodeDecodeError):
        driver = f"{driver}, {NVIDIA_DRIVER.read_text().splitlines()[0].strip()}"
    return f"{gpu.name}, compute capability {gpu.capability}", driver


def _library(option: Option) -> str:
    """What computes, and the versions of that."""
    row = table.backend(option.backend, option.device)
    name = row.library
    version = getattr(sys.modules.get(name), "__version__", None)
    if version is None:
        try:  # most distributions have their module's name; to search all of them takes a second
            version = version_of(name.replace("_", "-"))
        except PackageNotFoundError:
            version = " ".join(installed_version(name) or ("of", "unknown version"))
    version = version.partition("-")[0]  # a loaded openvino appends its build
    return f"{name} {version}" + (_compiler() if row.cuda_buffers and option.device == "cuda" else "")


def _compiler() -> str:
    """NVRTC and its version, which compiles what is done to rows between segments; "" where no distribution has it."""
    for name in NVRTC:
        with suppress(PackageNotFoundError):
            return f", {name} {version_of(name)}"
    return ""
