"""Frames in bytes against frames in floats: from a film's frames to rows of the vision tower, and what travels.

    python -m tools.bench.frames [--frames 16] [--height 392] [--width 420] [--rounds 9] [--write]

Two bundles of one checkpoint, alike but for `--tower-input`, take the same frames by turns in one process. "host" is
what the host does before the tower: cutting patches, and for floats normalising them; "tower" is the rest. Frames are
of the size that the model sees, so that no resize is in it: that is the same for both.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from framefusion.export.options import BuildOptions, TowerInput
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.media.sources import video_of_frames
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.visual_input import BytePatches
from framefusion.runtime.pipeline import Pipeline
from tools.bench.setting import RESULTS, SEED, SHAPES, machine, open_bundle, summary, write_checkpoint


def main() -> None:
    """Measure and print, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--height", type=int, default=392)
    parser.add_argument("--width", type=int, default=420)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("/tmp/framefusion-bench"), help="checkpoint and bundles")
    parser.add_argument("--write", action="store_true", help="write results/frames.json")
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments), indent=1)
    if arguments.write:
        (RESULTS / "frames.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes of each kind of tower input."""
    # 1. One checkpoint, two bundles, one film.
    checkpoint = write_checkpoint(SHAPES[arguments.shape], arguments.work / f"{arguments.shape}-checkpoint")
    options = BuildOptions(reduction="none")
    pipelines = {}
    for kind in get_args(TowerInput):
        folder = arguments.work / f"{arguments.shape}-frames-{kind}"
        bundle = open_bundle(checkpoint, folder, replace(options, tower_input=kind))
        pipelines[kind] = Pipeline(Bundle(bundle), threads=arguments.threads)
    shape = (arguments.frames, arguments.height, arguments.width, 3)
    film = video_of_frames(np.random.default_rng(SEED).integers(0, 256, shape, np.uint8), fps=2.0)
    # 2. By turns, so that both see the same machine; the first round warms up.
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in pipelines}
    for _ in range(arguments.rounds + 1):
        for kind, pipeline in pipelines.items():
            rounds[kind].append(_once(pipeline, film))
    # 3. Medians.
    results: dict[str, Any] = {}
    for kind, runs in rounds.items():
        parts = {name: summary([run[name] for run in runs[1:]]) for name in ("host", "tower", "total")}
        results[kind] = parts | {"bytes": int(runs[0]["bytes"])}
    flags = {name: value for name, value in vars(arguments).items() if name not in ("work", "write")}
    return {"machine": machine(), "setting": flags, "results": results}


def _once(pipeline: Pipeline, film: Video) -> dict[str, float]:
    """Seconds of one film's way to rows, and the bytes of its patches."""
    start = time.perf_counter()
    visual = pipeline.manifest.preprocessing.video(film)
    (tiles,) = visual.tiles
    assert isinstance(tiles.patches, BytePatches)
    size = tiles.patches.levels.nbytes
    if pipeline.manifest.vision.input == "float":
        values = tiles.values
        size = values.nbytes
        visual = replace(visual, tiles=(replace(tiles, patches=values),))
    ready = time.perf_counter()
    device = pipeline.backend.device
    device.download(pipeline.encode_visual(visual))
    end = time.perf_counter()
    return {"host": ready - start, "tower": end - ready, "total": end - start, "bytes": size}


if __name__ == "__main__":
    main()
