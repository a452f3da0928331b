"""Several films in one request: the next one decoded while the tower has one, against one after the other.

    python -m tools.bench.overlap --write
    python -m tools.bench.overlap --backend inductor --device cuda --shape qwen2-vl-7b --frames 32 --grid 14x15

One process, one bundle for each number of threads, and both ways in turn in every round: other work on the machine
slows both. A run is `Pipeline.read`: files to rows of the LLM, nothing behind it. "default" is what the pipeline
chooses by itself. A speed-up is the median of the rounds' own, so that a slow minute weighs as much as any other, and
that of the fastest runs beside it, which is nearest to a machine with nothing else to do. "emulated device" waits for
the seconds that the tower took instead of computing: it leaves the CPU alone, as a GPU does.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.visual_input import VisualInput
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual
from tools.bench.runs import Setting, add_flags, parse
from tools.bench.setting import SEED, report, summary

TOKEN = 28  # pixels along a side of a token of Qwen2-VL's tower
ENLARGED = 3  # a side of a film's frames, in sides of what the model sees
RATE = 30
CODECS = ("libx264", "mpeg4")
ONE = Turn("user", (Visual.VIDEO, "What happens?"))


def main() -> None:
    """Measure and print, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, [1.0])
    parser.set_defaults(shape="tower", frames=3, depth=1, rounds=9)
    parser.add_argument("--films", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5, help="of each film")
    parser.add_argument("--threads-of", type=lambda text: [int(x) for x in text.split(",")], default=[1, 2])
    arguments = parse(parser)
    # 1. Films as a camera has them, larger than the model sees them, with frames between the sampled ones.
    height, width = (ENLARGED * TOKEN * side for side in arguments.grid)
    films = [
        drawn_film(arguments.work / f"film-{width}x{height}-{arguments.seconds}s-{number}.mp4", arguments.seconds,
                   height, width, number)
        for number in range(arguments.films)
    ]  # fmt: skip
    # 2. A pipeline for each number of threads: those of one operator of the tower.
    results = {}
    setting = None
    for threads in arguments.threads_of:
        its = copy.copy(arguments)
        its.threads = threads
        setting = Setting(its)
        results[f"{threads} threads"] = measure(setting, films)
    assert setting is not None  # a list of threads is never empty
    if not setting.on_gpu:
        tower = min(result["one_film_alone"]["vision"]["min_s"] for result in results.values())
        results["emulated device"] = measure(setting, films, tower)
    facts = setting.facts | {
        "films": arguments.films,
        "film_seconds": arguments.seconds,
        "film_size": f"{width}x{height}",
    }
    for name in ("threads", "tokens", "captured_decode"):
        del facts[name]
    report("overlap", facts | {"results": results}, write=arguments.write, file=setting.result_file("overlap"))


def measure(setting: Setting, films: list[Path], emulated: float | None = None) -> dict[str, Any]:
    """Both ways of one pipeline, in turn; a tower that is emulated takes so many seconds and no processor."""
    pipeline = setting.pipeline if emulated is None else waiting(setting.pipeline, emulated)
    arguments = setting.arguments
    default = pipeline.overlaps or emulated is not None
    preprocessing = pipeline.manifest.preprocessing.with_options(
        max_pixels=arguments.grid[0] * arguments.grid[1] * TOKEN**2
    )
    limits = replace(pipeline.manifest.limits, max_input_len=1 << 20)  # nothing is prefilled
    pipeline.manifest = replace(pipeline.manifest, preprocessing=preprocessing, limits=limits)
    sampling = pipeline.manifest.sampling.spread(2 * arguments.frames)
    runs: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    stages: dict[str, list[float]] = {"video": [], "preprocess": [], "vision": []}
    for turn in range(arguments.rounds + 1):
        for overlaps in (False, True) if turn % 2 else (True, False):
            pipeline.overlaps = overlaps
            run = _read(pipeline, films, sampling)
            if turn:  # the first round warms up
                runs[overlaps].append(run)
        alone = _stages(pipeline, films[0], sampling)
        if turn:
            for name, seconds in stages.items():
                seconds.append(alone[name])
    apart = runs[False]
    ahead = runs[True]
    return {
        "default": "overlapped" if default else "one after the other",
        "one_after_the_other": summary([wall for wall, _ in apart]),
        "overlapped": summary([wall for wall, _ in ahead]),
        "speed_up": round(median(a[0] / b[0] for a, b in zip(apart, ahead, strict=True)), 3),
        "speed_up_of_minima": round(min(a for a, _ in apart) / min(b for b, _ in ahead), 3),
        "speed_ups": [round(a[0] / b[0], 3) for a, b in zip(apart, ahead, strict=True)],
        "cpu_seconds_ratio": round(median(b[1] / a[1] for a, b in zip(apart, ahead, strict=True)), 3),
        "one_film_alone": {name: summary(seconds) for name, seconds in stages.items()},
    }


def waiting(pipeline: Pipeline, seconds: float) -> Pipeline:
    """The pipeline with a tower that computes once and then only waits; films of one size have rows of one shape."""
    encode = pipeline.encode_visual
    rows: list[Buffer] = []

    def encode_visual(visual: VisualInput) -> Buffer:
        if not rows:
            rows.append(encode(visual))
        time.sleep(seconds)
        return rows[0]

    pipeline.encode_visual = encode_visual  # type: ignore[method-assign]
    return pipeline


def _read(pipeline: Pipeline, films: list[Path], sampling: FrameSampling) -> tuple[float, float]:
    """Seconds by the clock and of processors until all films are rows on the device."""
    turn = Turn("user", (*[Visual.VIDEO] * len(films), "What differs?"))
    processors = time.process_time()
    start = time.perf_counter()
    _, rows = pipeline.read([turn], films, sampling=sampling)
    pipeline.backend.device.download(rows.hidden[:1])  # waits for the device
    return time.perf_counter() - start, time.process_time() - processors


def _stages(pipeline: Pipeline, film: Path, sampling: FrameSampling) -> dict[str, float]:
    """Seconds of what one film costs with nothing beside it."""
    stopwatch = Stopwatch()
    read = pipeline.read_media([ONE], [film], sampling, stopwatch)
    with stopwatch.stage("vision"):
        (rows,) = pipeline.encode_rest(read.visuals, read.rows)
        pipeline.backend.device.download(rows[0][:1])
    return stopwatch.seconds


def drawn_film(path: Path, seconds: int, height: int, width: int, seed: int) -> Path:
    """A film that moves everywhere, with some noise, as a camera's: written once."""
    if path.is_file():
        return path
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(SEED + seed)
    coarse = random.integers(0, 256, (height // 8 + 1, (width + RATE * seconds) // 8 + 1, 3), np.uint8)
    scene = coarse.repeat(8, axis=0).repeat(8, axis=1)
    codec = next(name for name in CODECS if name in av.codecs_available)
    part = path.with_suffix(".part.mp4")
    with av.open(str(part), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(RATE))
        stream.width = width
        stream.height = height
        stream.pix_fmt = "yuv420p"
        for t in range(seconds * RATE):
            picture = scene[:height, t : t + width].astype(np.int16) + random.integers(-4, 5, (height, width, 1))
            shown = np.clip(picture, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(shown), format="rgb24")))
        container.mux(stream.encode(None))
    part.rename(path)
    return path


if __name__ == "__main__":
    main()
