"""The wheel of this working tree, built from a clean copy: a build/ left behind would ship modules that are gone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = ("framefusion", "export", "runtime")
# What only the toolchain needs.
NEVER_AT_RUN_TIME = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "polygraphy"}


def build_wheel(folder: Path) -> Path:
    """Build without isolation, into a folder that holds no wheel yet."""
    done = try_to_build(clean_copy(folder / "source"), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def clean_copy(source: Path) -> Path:
    """What a wheel is built from, in a new folder."""
    unwanted = shutil.ignore_patterns("__pycache__")
    for floor in (*FLOORS, "optimum"):
        shutil.copytree(ROOT / floor, source / floor, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    return source


def try_to_build(source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Build a wheel of a copy, as pip would."""
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source))
    return subprocess.run(build, capture_output=True, text=True, check=False)
