"""Films decoded while the tower has what is there, against one after the other: in Python, and in a server.

    python -m tools.bench.overlap --write
    python -m tools.bench.overlap --backend inductor --device cuda --shape qwen2-vl-7b --frames 32 --grid 14x15

One process, one bundle for each number of threads, and both ways in turn in every round: other work on the machine
slows both. A run is `Pipeline.read`: files to rows of the LLM, nothing behind it. "default" is what the pipeline
chooses by itself. A speed-up is the median of the rounds' own, so that a slow minute weighs as much as any other, and
that of the fastest runs beside it, which is nearest to a machine with nothing else to do. "emulated device" waits for
the seconds that the tower took instead of computing, as many for each picture: it leaves the CPU alone, as a GPU does.

"server" is one longer film, decoded in a process as a server's clients have it, to its rows: the tower has the film's
first pictures while the rest is decoded, or all of them behind it.
"""

from __future__ import annotations

import argparse
import asyncio
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
from framefusion.runtime.server.engine import Engine
from framefusion.runtime.server.media.ahead import ReadingAhead, TowerJob
from framefusion.runtime.server.media.decoding import start_decoders
from framefusion.runtime.server.media.policy import MediaFile, MediaPolicy
from framefusion.runtime.server.media.reader import MediaReader, OpenPart
from framefusion.runtime.server.protocol.parts import MediaPart
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
    parser.add_argument("--long-seconds", type=int, default=20, help="of the server's film; 0 leaves it out")
    parser.add_argument("--long-pictures", type=int, default=24, help="temporal grids of the server's film")
    parser.add_argument("--server-only", action="store_true", help="only the server's film, in a result of its own")
    parser.add_argument("--threads-of", type=lambda text: [int(x) for x in text.split(",")], default=[1, 2])
    arguments = parse(parser)
    # 1. Films as a camera has them, larger than the model sees them, with frames between the sampled ones.
    height, width = (ENLARGED * TOKEN * side for side in arguments.grid)
    films = [
        drawn_film(arguments.work / f"film-{width}x{height}-{arguments.seconds}s-{number}.mp4", arguments.seconds,
                   height, width, number)
        for number in range(arguments.films)
    ]  # fmt: skip
    long = None
    if arguments.long_seconds:
        long = arguments.work / f"film-{width}x{height}-{arguments.long_seconds}s-long.mp4"
        drawn_film(long, arguments.long_seconds, height, width, arguments.films)
    # 2. A pipeline for each number of threads: those of one operator of the tower.
    results = {}
    setting = None
    for threads in arguments.threads_of:
        its = copy.copy(arguments)
        its.threads = threads
        setting = Setting(its)
        results[f"{threads} threads"] = measure(setting, films, long)
    assert setting is not None  # a list of threads is never empty
    if not setting.on_gpu:
        tower = min(result["one_film_alone"]["vision"]["min_s"] for result in results.values())
        results["emulated device"] = measure(setting, films, long, tower / arguments.frames)
    facts = setting.facts | {
        "films": arguments.films,
        "film_seconds": arguments.seconds,
        "film_size": f"{width}x{height}",
        "long_film": {"seconds": arguments.long_seconds, "pictures": arguments.long_pictures} if long else None,
    }
    for name in ("threads", "tokens", "captured_decode"):
        del facts[name]
    name = "overlap_server" if arguments.server_only else "overlap"
    report(name, facts | {"results": results}, write=arguments.write, file=setting.result_file(name))


def measure(setting: Setting, films: list[Path], long: Path | None, emulated: float | None = None) -> dict[str, Any]:
    """Both ways of one pipeline, in turn; an emulated tower takes so many seconds a picture, and no processor."""
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
        for overlaps in () if arguments.server_only else (False, True) if turn % 2 else (True, False):
            pipeline.overlaps = overlaps
            run = _read(pipeline, films, sampling)
            if turn:  # the first round warms up
                runs[overlaps].append(run)
        alone = _stages(pipeline, films[0], sampling)
        if turn:
            for name, seconds in stages.items():
                seconds.append(alone[name])
    results: dict[str, Any] = {"default": "overlapped" if default else "one after the other"}
    results |= {} if arguments.server_only else compared(runs)
    results["one_film_alone"] = {name: summary(seconds) for name, seconds in stages.items()}
    if long is not None:
        results["server"] = serve(pipeline, long, arguments.long_pictures, arguments.rounds)
    return results


def compared(runs: dict[bool, list[tuple[float, float]]]) -> dict[str, Any]:
    """Seconds of both ways, by the clock and of processors, of rounds that had both in turn."""
    apart = runs[False]
    ahead = runs[True]
    return {
        "one_after_the_other": summary([wall for wall, _ in apart]),
        "overlapped": summary([wall for wall, _ in ahead]),
        "speed_up": round(median(a[0] / b[0] for a, b in zip(apart, ahead, strict=True)), 3),
        "speed_up_of_minima": round(min(a for a, _ in apart) / min(b for b, _ in ahead), 3),
        "speed_ups": [round(a[0] / b[0], 3) for a, b in zip(apart, ahead, strict=True)],
        "cpu_seconds_ratio": round(median(b[1] / a[1] for a, b in zip(apart, ahead, strict=True)), 3),
    }


def serve(pipeline: Pipeline, film: Path, pictures: int, rounds: int) -> dict[str, Any]:
    """A server's way from one film to its rows, both ways in turn; nobody else asks.

    Processor time is the server's alone, without the child's that decodes.
    """
    manifest = pipeline.manifest
    sampling = manifest.sampling.spread(2 * pictures)
    reader = MediaReader(MediaPolicy(), manifest.preprocessing, sampling, decoders=1)
    engine = Engine(1, 1 << 30, lambda held: None)
    ahead = ReadingAhead(pipeline, reader, engine)
    part = OpenPart(
        MediaPart(Visual.VIDEO, (film.as_uri(),), "the film"), (MediaFile(film, "", "the film"),), sampling, None, ""
    )
    engine.start()
    start_decoders()

    async def rows() -> None:
        reading = ahead.begin(pipeline.session(), [ONE])
        if reading is None:
            decoded = await asyncio.to_thread(reader.decode, [part], 0, lambda: False)
        else:
            decoded = await ahead.decode(reading, [part], 0, lambda: False)

        def encode() -> None:  # as a prefill begins
            files = [each.media for each in decoded]
            read = reading.result() if reading else pipeline.read_media([ONE], files, sampling, Stopwatch())
            encoded = pipeline.encode_rest(read.visuals, read.rows)
            pipeline.backend.device.download(encoded[0][0][:1])  # waits for the device

        job = TowerJob(pipeline, encode)
        engine.submit(job)
        await asyncio.wrap_future(job.done)

    runs: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    try:
        for turn in range(rounds + 1):
            for overlaps in (False, True) if turn % 2 else (True, False):
                pipeline.overlaps = overlaps
                processors = time.process_time()
                start = time.perf_counter()
                asyncio.run(rows())
                run = (time.perf_counter() - start, time.process_time() - processors)
                if turn:  # the first round warms up
                    runs[overlaps].append(run)
    finally:
        engine.close()
        reader.close()
    return compared(runs)


def waiting(pipeline: Pipeline, seconds: float) -> Pipeline:
    """The pipeline with a tower that computes once and then only waits, so many seconds for each picture.

    Films of one size and as many pictures have rows of one shape.
    """
    encode = pipeline.encode_visual
    rows: dict[int, Buffer] = {}

    def encode_visual(visual: VisualInput) -> Buffer:
        pictures = sum(tiles.shape[0] for tiles in visual.tiles)
        if pictures not in rows:
            rows[pictures] = encode(visual)
        time.sleep(seconds * pictures)
        return rows[pictures]

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
