"""What the trials share, made once: a tiny checkpoint, bundles of it, engines in a cache, a film and a picture."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from tools.attack.harness import World, in_child

PORTABLE = ("--dtype", "float16", "--dialect", "portable", "--max-input-len", "256", "--buckets", "256", "--depth", "0",
            "--max-kv-cache-capacity", "288")  # fmt: skip


def world_in(folder: Path) -> World:
    """The world, made in a process that ends: the trials are forked from one that has run nothing."""
    subprocess.run((sys.executable, "-m", "tools.attack.world", str(folder)), check=True, stdout=subprocess.DEVNULL)
    load_everything()
    checkpoint = folder / "checkpoint"
    counted = in_child(lambda: _counted_build(checkpoint, folder / "reference"), 120)
    if counted.status != 0:
        raise RuntimeError(f"the reference could not be built: {counted.result}")
    has_engines = (folder / "cache").exists()
    return World(
        checkpoint, folder / "bundle", folder / "reference", int(counted.result),
        folder / "compiled" if has_engines else None, folder / "cache" if has_engines else None,
        folder / "film.mp4", folder / "picture.png", tuple(sorted((folder / "families").iterdir())),
    )  # fmt: skip


def load_everything() -> None:
    """Import what commands import, trace nothing and run no model: attacks are on what happens around the graphs."""
    import_everything()
    from framefusion.export.check import golden
    from framefusion.export.writing import parts

    setattr(golden, "_out_of_reach", lambda *_: "this build is about what happens around the graphs")  # noqa: B010
    setattr(parts, "trace_graph", lambda *_: None)  # noqa: B010
    setattr(parts, "save_graph", lambda _graph, path, *_: path.write_bytes(b"graph"))  # noqa: B010


def import_everything() -> None:
    """Import what commands import, so that no trial spends its seconds on it in a process of its own."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import framefusion.export.build
    import framefusion.export.eager.pipeline
    import framefusion.export.evaluate.answering
    import framefusion.export.evaluate.evaluation
    import framefusion.export.report.card
    import framefusion.export.report.integrity
    import framefusion.runtime.pipeline  # noqa: F401

    if find_spec("tensorrt_rtx") is not None:
        import_module("tensorrt_rtx")


def _counted_build(checkpoint: Path, target: Path) -> int:
    from tools.attack.command import call
    from tools.attack.endings import Counter

    counter = Counter()
    code, message, trace = call("ff-export", ["build", str(checkpoint), "-o", str(target), "--no-check"])
    if code != 0:
        raise RuntimeError(f"{message} {trace}")
    return counter.count


def make(folder: Path) -> None:
    """Write all of it but the reference."""
    from tests.films import write_film, write_picture
    from tests.random_checkpoint import random_checkpoint
    from tools.attack.checkpoints import written
    from tools.attack.command import call

    random_checkpoint(folder / "checkpoint", pixels=112 * 112)
    (folder / "families").mkdir()
    list(written(folder / "families"))
    write_film(folder / "film.mp4")
    write_picture(folder / "picture.png")
    build = ["build", str(folder / "checkpoint"), "--no-check"]
    _succeed(call("ff-export", [*build, "-o", str(folder / "bundle"), "--depth", "1", "--max-input-len", "512"]))
    if find_spec("tensorrt_rtx") is not None:
        _succeed(call("ff-export", [*build, "-o", str(folder / "compiled"), *PORTABLE]))
        shutil.copytree(folder / "compiled", folder / "warm")
        compiling = ["compile", str(folder / "warm"), "--backend", "tensorrt-rtx", "--target-sm", "86"]
        _succeed(call("ff-export", [*compiling, "--engine-cache", str(folder / "cache")]))


def _succeed(end: list[object]) -> None:
    if end[0] != 0:
        raise RuntimeError(json.dumps(end))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    make(Path(sys.argv[1]))
