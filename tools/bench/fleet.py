"""What a batch takes on N GPUs, simulated from measured seconds a film: where decoding becomes the limit.

    ff-run batch bundle films -p "What happens?" --decoders 1 -o answers.jsonl
    python -m tools.bench.fleet answers.jsonl [--gpus 1,8,64] [--decoders 2,4,8,16,32] [--films 100000]
    python -m tools.bench.fleet answers.jsonl --engine 0.5        # another engine than the one that answered
    python -m tools.bench.fleet answers.jsonl --check SECONDS     # beside what ff-run batch --json says of its run
    python -m tools.bench.fleet --draw FOLDER                     # films of 1080p to measure with

The simulation is of `ff-run batch`: on each GPU one part of the batch, by the ids; films decoded ahead by a pool of
processes, no more than fit; answers one after the other, in order. Seconds of decoding and of the engine are drawn, a
film's together, from the lines of a real run. What it does not know: disks and networks, cores that slow each other
down, several films in one decoding call.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from framefusion.runtime.batch.run import AHEAD
from tools.bench.setting import RESULTS, ROOT, SEED, report

BUSY = 0.95
"""Share of the time that a GPU works, from which on decoding is no limit."""
DRAWN = (20, 60, 120)
"""Seconds of the films of --draw, two of each, 24 frames a second."""
SIZE = (1920, 1080)


@dataclass(frozen=True)
class Film:
    """What one film takes.

    Attributes:
        media: seconds of one core, to open and decode it.
        engine: seconds of the GPU: tower, prefill, decoding.
    """

    media: float
    engine: float


@dataclass(frozen=True)
class Forecast:
    """What a batch takes.

    Attributes:
        seconds: until the last part ends.
        busy: share of that time for which a GPU works, over all of them.
    """

    seconds: float
    busy: float


def simulate_part(films: Sequence[Film], decoders: int) -> float:
    """Seconds that one GPU takes for its part, as `BatchRun.rows` goes through it.

    Args:
        films: in order.
        decoders: processes that decode for it.
    """
    free = [0.0] * decoders  # when each decoder has nothing to do
    decoded: list[float] = []
    answered: list[float] = []
    for number, film in enumerate(films):
        # 1. A film is handed to the decoders once there is room, which the answer of an earlier one makes.
        before = number - (decoders + AHEAD)
        submitted = answered[before] if before >= 0 else 0.0
        decoded.append(max(heapq.heappop(free), submitted) + film.media)
        heapq.heappush(free, decoded[-1])
        # 2. It is answered once it is decoded and the one before is answered.
        idle = max(decoded[-1], answered[-1] if answered else 0.0)
        answered.append(idle + film.engine)
    return answered[-1] if answered else 0.0


def simulate(measured: Sequence[Film], films: int, gpus: int, decoders: int, seed: int = SEED) -> Forecast:
    """A batch on several GPUs.

    Args:
        measured: what films took.
        films: of the batch; each takes what a drawn one of `measured` took.
        gpus: that share the batch; ids fall on them by chance.
        decoders: processes that decode for each of them.
        seed: of what is drawn.
    """
    generator = np.random.default_rng(seed)
    parts = generator.multinomial(films, [1 / gpus] * gpus)
    work = 0.0
    longest = 0.0
    for part in parts:
        drawn = [measured[index] for index in generator.integers(len(measured), size=part)]
        longest = max(longest, simulate_part(drawn, decoders))
        work += sum(film.engine for film in drawn)
    return Forecast(longest, work / (longest * gpus) if longest else 0.0)


def read_answers(path: Path, engine: float | None = None) -> tuple[list[Film], float]:
    """The films of a run.

    Args:
        path: what `ff-run batch` wrote.
        engine: seconds of another engine in place of the one that answered.

    Returns:
        What each film took.
        Seconds of decoding of all of them.
    """
    films = []
    for line in path.read_text(encoding="utf-8").splitlines():
        seconds = json.loads(line).get("seconds")
        if seconds is not None:
            rest = sum(value for stage, value in seconds.items() if stage != "media")
            films.append(Film(seconds["media"], rest if engine is None else engine))
    if not films:
        raise SystemExit(f"{path} has no answer with seconds: give what ff-run batch wrote")
    return films, sum(film.media for film in films)


def forecast(arguments: argparse.Namespace) -> dict[str, Any]:
    """Hours and busy GPUs for each number of GPUs and decoders."""
    films, media = read_answers(arguments.answers, arguments.engine)
    rows = []
    for gpus in arguments.gpus:
        for decoders in arguments.decoders:
            result = simulate(films, arguments.films, gpus, decoders)
            rows.append({"gpus": gpus, "decoders": decoders, "hours": result.seconds / 3600, "busy": result.busy})
    return {
        "films": arguments.films,
        "measured": {
            "films": len(films),
            "media_s": media / len(films),
            "engine_s": sum(film.engine for film in films) / len(films),
            "engine": "given" if arguments.engine is not None else "measured",
        },
        "rows": rows,
    }


def check(arguments: argparse.Namespace) -> str:
    """The simulation of a run beside the run."""
    films, _ = read_answers(arguments.answers)
    count = arguments.decoders[0]
    simulated = simulate_part(films, count)
    ratio = simulated / arguments.check
    return f"{len(films)} films, {count} decoder(s): {simulated:.1f} s simulated, {ratio:.2f} of the run's"


def draw(folder: Path) -> None:
    """Films of 1080p whose content moves, three of each length: H.264, as cameras and sites give them."""
    import av

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(SEED)
    width, height = SIZE
    canvas = np.kron(generator.integers(0, 256, (height // 20 + 60, width // 20 + 60, 3)), np.ones((20, 20, 1)))
    canvas = canvas.astype(np.uint8)
    for seconds in DRAWN:
        for number in range(2):
            with av.open(folder / f"{seconds}s-{number}.mp4", "w") as container:
                stream = container.add_stream("libx264", rate=24, options={"preset": "veryfast", "crf": "23"})
                stream.width = width
                stream.height = height
                stream.pix_fmt = "yuv420p"
                for index in range(24 * seconds):
                    top = (index * (2 + number)) % 1200
                    left = (index * 3) % 1200
                    shown = np.ascontiguousarray(canvas[top : top + height, left : left + width])
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
                container.mux(stream.encode())


def main() -> None:
    """Print the forecast, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, nargs="?", help="what ff-run batch wrote, with one decoder")
    parser.add_argument("--gpus", type=_numbers, default=(1, 8, 64))
    parser.add_argument("--decoders", type=_numbers, default=(2, 4, 8, 16, 32))
    parser.add_argument("--films", type=int, default=100_000)
    parser.add_argument("--engine", type=float, help="seconds of a GPU a film, in place of the measured ones")
    parser.add_argument("--check", type=float, metavar="SECONDS", help="simulate the run that wrote the answers")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="draw films to measure with, and end")
    parser.add_argument("--write", action="store_true", help=f"write {(RESULTS / 'fleet.json').relative_to(ROOT)}")
    arguments = parser.parse_args()
    if arguments.draw is not None:
        draw(arguments.draw)
    elif arguments.answers is None:
        parser.error("give the answers of a run, or --draw")
    elif arguments.check is not None:
        print(check(arguments))
    else:
        report("fleet", forecast(arguments), write=arguments.write)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    main()
