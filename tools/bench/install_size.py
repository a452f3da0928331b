"""What a machine must hold to run a bundle, beside what it must hold for transformers in eager torch.

    python -m tools.bench.install_size --write

Both are read in the environment at hand, so that versions are alike: the files of every distribution that the
requirements reach, ours as pyproject.toml says them (what an editable installation recorded may be older), and the
processor's seconds of a fresh interpreter that imports what answers: those of the clock are other work's, too.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.bench.setting import ROOT, report
from tools.lock import requirements

ROUNDS = 5
OURS = "framefusion-aot"
THEIRS = ("torch", "transformers", "av", "pillow")  # eager video models of transformers need these to answer
IMPORT_OURS = (
    "import framefusion.runtime.backends.onnxruntime.backend, framefusion.runtime.pipeline, onnxruntime, av, PIL"
)
IMPORT_THEIRS = "import torch, av, PIL; from transformers import Qwen2VLForConditionalGeneration, AutoProcessor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the result under tools/bench/results")
    arguments = parser.parse_args()
    ours = {OURS: package_bytes(), **sizes_of(reached([str(line) for line in requirements("")]))}
    theirs = sizes_of(reached(THEIRS))
    seconds = import_seconds()
    figures: dict[str, Any] = {
        "runtime": {"mb": in_mb(ours), "import_s": seconds["runtime"], "packages": ours},
        "eager torch": {"mb": in_mb(theirs), "import_s": seconds["eager torch"], "packages": theirs},
    }
    report("install_size", figures, write=arguments.write)


def package_bytes() -> int:
    """Bytes of this package as a wheel installs it: the three folders, without caches."""
    folders = (ROOT / name for name in ("framefusion", "export", "runtime"))
    files = (path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts)
    real = {path.resolve() for path in files if path.is_file()}
    return sum(path.stat().st_size for path in real)


def reached(lines: Sequence[str]) -> set[str]:
    """Names of the installed distributions that requirements lead to, without extras."""
    waiting = [Requirement(line) for line in lines]
    found: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # not wanted on this machine
        found.add(name)
        waiting += [Requirement(line) for line in installed.requires or ()]
    return found


def sizes_of(names: set[str]) -> dict[str, int]:
    """Bytes on disk of each distribution, the largest first."""
    sizes = {name: size_of(distribution(name)) for name in names}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def size_of(installed: Distribution) -> int:
    """Bytes of the files that a distribution's record lists, compiled caches left out."""
    files = [Path(str(installed.locate_file(file))) for file in installed.files or () if file.suffix != ".pyc"]
    return sum(file.stat().st_size for file in files if file.is_file())


def in_mb(sizes: dict[str, int]) -> float:
    return round(sum(sizes.values()) / 1e6, 1)


def import_seconds() -> dict[str, float]:
    """Median of the processor's seconds that a fresh interpreter takes to import each side, in turns."""
    codes = {"runtime": IMPORT_OURS, "eager torch": IMPORT_THEIRS}
    taken: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(ROUNDS + 1):
        for name, code in codes.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run((sys.executable, "-c", code), cwd=ROOT, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            taken[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {
        name: round(statistics.median(seconds[1:]), 3) for name, seconds in taken.items()
    }  # the first reads the disk


if __name__ == "__main__":
    main()
