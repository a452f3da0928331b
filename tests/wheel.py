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
    source = folder / "source"
    unwanted = shutil.ignore_patterns("__pycache__")
    for floor in (*FLOORS, "optimum"):
        shutil.copytree(ROOT / floor, source / floor, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source))
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel
