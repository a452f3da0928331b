"""The checkpoint and the bundles that many tests share: made once with torch, opened without it.

They lie in .bundles/, below a digest of the sources and versions that made them, so that runs and workers share them.
`python -m tests.bundles` makes what is missing there and prints the folder, `python -m tests.bundles OUT` makes them in
OUT. BUNDLES=FOLDER takes them from there, which needs no torch: `make test-runtime` runs tests/runtime so.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.random_checkpoint import random_checkpoint

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".bundles"
MAKERS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "safetensors", "tokenizers", "numpy")
MADE_OF = "made-of.txt"
GENERATIONS = 4  # how many digests keep their bundles: of branches and versions that alternate
COST = 0.4  # what the bundles are built for
ADAPTIVE: dict[str, Any] = {"cost": COST, "similarity_lower_bound": 0.9, "depth": 1}
PORTABLE: dict[str, Any] = {"dialect": "portable"}
FIXED: dict[str, Any] = {"cost": COST, "reduction": "fixed", "merge_shares": (0.3,), "prune_layer": 1}


class BundlesError(Exception):
    """Bundles are missing where none can be made, are of other sources, or were changed."""


def _built(verify: bool = False, **options: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> object:
        from framefusion.export.build import build
        from framefusion.export.checkpoints.checkpoint import Checkpoint
        from framefusion.export.options import BuildOptions

        source = Checkpoint(folder.with_name("checkpoint"))
        return build(source, folder, BuildOptions(**options), verify=verify)

    return make


RECIPES: dict[str, Callable[[Path], object]] = {
    "checkpoint": lambda folder: random_checkpoint(folder, pixels=112 * 112),
    "bundle": _built(verify=True, **ADAPTIVE, max_input_len=512),
    "int8-caches": _built(**ADAPTIVE, max_input_len=512, kv_cache_dtype="int8"),
    "portable": _built(**PORTABLE, **ADAPTIVE, max_input_len=192),
    "portable-512": _built(**PORTABLE, **ADAPTIVE, max_input_len=512),
    "fixed": _built(**PORTABLE, **FIXED, similarity_lower_bound=0.9, depth=1, max_text_len=64, max_input_len=192),
    "fixed-gqa": _built(**FIXED, max_text_len=96, max_input_len=192),
}
"""By name; a bundle is built from the checkpoint beside it."""


def shared(name: str) -> Path:
    """The folder of a checkpoint or bundle, which nobody may change: copy it first."""
    folder = _folder()
    if "BUNDLES" not in os.environ:
        _make(folder, name)
    if not (folder / name).is_dir():
        raise BundlesError(f"{folder} has no {name}: run `python -m tests.bundles {folder}` where torch is installed")
    return folder / name


def unchanged(name: str) -> bool:
    """Whether the files of a bundle are those that were made; a changed one is forgotten, and made anew next time."""
    folder = _folder()
    recorded = json.loads((folder / f"{name}.json").read_text())
    if recorded == _files(folder / name):
        return True
    (folder / f"{name}.json").unlink()
    return False


@cache
def sources_digest() -> str:
    """Of every file that has a say in what a bundle holds."""
    digest = hashlib.sha256()
    for path in sorted(_sources()):
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _sources() -> Iterator[Path]:
    yield from (Path(__file__), ROOT / "tests/random_checkpoint.py")
    for top in ("framefusion", "export", "runtime"):
        for folder, _, files in os.walk(ROOT / top):  # follows no links
            yield from (Path(folder, file) for file in files if Path(file).suffix in (".py", ".cu", ".html"))


@cache
def _folder() -> Path:
    if "BUNDLES" in os.environ:
        folder = Path(os.environ["BUNDLES"])
        made_of = folder / MADE_OF
        if not made_of.is_file() or made_of.read_text() != sources_digest():
            problem = "is of other sources" if made_of.is_file() else "holds no bundles"
            raise BundlesError(f"BUNDLES={folder} {problem}: run `python -m tests.bundles {folder}` with torch")
        return folder
    if importlib.util.find_spec("torch") is None:
        raise BundlesError("without torch no bundles can be made: run `make test-runtime`, which makes them with .venv")
    versions = [str(sys.version_info[:2]), *(f"{name} {_version(name)}" for name in MAKERS)]
    return CACHE / hashlib.sha256("\n".join([sources_digest(), *versions]).encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _make(folder: Path, name: str) -> None:
    """Whoever comes first makes it, the others wait; it has its name once it is whole."""
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _forget_old_generations()
    if name != "checkpoint":
        _make(folder, "checkpoint")
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / f"{name}.json").exists():
            return
        shutil.rmtree(folder / name, ignore_errors=True)
        RECIPES[name](folder / name)
        (folder / f"{name}.json").write_text(json.dumps(_files(folder / name)))


def _files(folder: Path) -> dict[str, list[int]]:
    """Size and time of the last change of every file."""
    found = ((str(path.relative_to(folder)), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found}


def _forget_old_generations() -> None:
    CACHE.mkdir(exist_ok=True)
    for folder in sorted(CACHE.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)[GENERATIONS:]:
        shutil.rmtree(folder, ignore_errors=True)


def main(folder: Path | None = None) -> Path:
    """Make every bundle; returns their folder."""
    target = folder or _folder()
    if folder and (folder / MADE_OF).is_file() and (folder / MADE_OF).read_text() != sources_digest():
        for name in RECIPES:
            (folder / f"{name}.json").unlink(missing_ok=True)
    for name in RECIPES:
        _make(target, name)
    (target / MADE_OF).write_text(sources_digest())
    return target


if __name__ == "__main__":
    print(main(*map(Path, sys.argv[1:2])).resolve())
