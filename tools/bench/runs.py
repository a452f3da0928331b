"""What the benchmarks of prefill and decode share: a bundle on the backend to be measured, and its runs.

A run is one prefill and a few decoded tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np

from framefusion.export.options import BuildOptions, DType
from framefusion.export.plan.sizes import BUCKET_MULTIPLE
from framefusion.runtime.backends.choice import Choice, choose
from framefusion.runtime.backends.table import engine_kinds
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.commands.flags import BACKENDS
from framefusion.runtime.format.engine_record import EngineKind
from framefusion.runtime.generation.decode import Decoder, GreedyDecoder
from framefusion.runtime.generation.prefill import Prefilled
from framefusion.runtime.media.preprocess import normalised_levels
from framefusion.runtime.media.visual_input import BytePatches, Grid, Tiles, VisualInput
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.positions import decode_positions
from tools.bench.big_checkpoint import BigShape, write_big_checkpoint
from tools.bench.eager import Eager
from tools.bench.setting import SEED, SHAPES, Film, draw_film, open_bundle, write_checkpoint

BEFORE = 10
AFTER = 22  # tokens of text around the film
BUCKET_RATIO = 0.95  # of neighbouring buckets: a bundle for users has fewer, here padding is not to hide the limit
PRESETS: dict[str, dict[str, Any]] = {
    "qwen2-vl-7b": {  # the setting of the paper's speed figures
        "shape": "qwen2-vl-7b", "frames": 64, "grid": (14, 15), "dtype": "float16", "costs": [1.0, 0.7, 0.5, 0.3]
    }
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser, costs: list[float]) -> None:
    """Flags that say what is measured."""
    parser.add_argument("--preset", choices=PRESETS, help="sets shape, frames, grid, dtype and costs")
    parser.add_argument("--backend", choices=BACKENDS[1:], default="onnxruntime")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the best for the backend")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--dtype", choices=get_args(DType), help="default: what the backend takes first")
    parser.add_argument("--frames", type=int, default=16, help="temporal grids")
    parser.add_argument("--grid", type=_pair, default=(16, 8), help="rows x columns of tokens in one")
    parser.add_argument("--costs", type=lambda text: [float(x) for x in text.split(",")], default=costs)
    parser.add_argument("--depth", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("/tmp/framefusion-bench"), help="checkpoint and bundle")
    parser.add_argument("--write", action="store_true", help="write a file under results/")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags, a preset's values in their places."""
    arguments = parser.parse_args()
    for name, value in PRESETS.get(arguments.preset, {}).items():
        setattr(arguments, name, value)
    return arguments


class Setting:
    """A checkpoint of random weights, a bundle of it on the backend asked for, and a film.

    The bundle is built, and its engines are compiled, unless they stand in the work folder already.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.checkpoint = checkpoint_of(arguments)
        self.grid = Grid(arguments.frames, *arguments.grid)
        bundle = Bundle(self.built(arguments))
        self.choice: Choice = choose(bundle, arguments.backend, arguments.device)
        self.pipeline = Pipeline(bundle, threads=arguments.threads, choice=self.choice)
        self.model = self.pipeline.manifest.model
        self.film = draw_film(self.model, self.grid, BEFORE, AFTER)
        self.requests = {f"ours at cost {cost:g}": Request(arguments.new_tokens, cost=cost) for cost in arguments.costs}
        self.dense = f"ours at cost {max(arguments.costs):g}"

    @classmethod
    def built(cls, arguments: argparse.Namespace) -> Path:
        """The folder of the bundle, which is built if it is not there."""
        kind = arguments.backend if arguments.backend in engine_kinds() else None
        options = cls._options(arguments, kind)
        parts = [arguments.shape, options.dialect, options.dtype, kind or "graphs", str(options.max_input_len)]
        parts += [] if options.weights is None else [options.weights.replace(":", "_").replace("+", "_")]
        parts += [] if options.kv_cache_dtype is None else [f"caches_{options.kv_cache_dtype}"]
        folder = arguments.work / "-".join(parts)
        return open_bundle(checkpoint_of(arguments), folder, options, golden=getattr(arguments, "golden", True))

    @staticmethod
    def _options(arguments: argparse.Namespace, kind: EngineKind | None) -> BuildOptions:
        """TensorRT's engines are built for this film alone: static caches and buckets beyond it would only cost."""
        tokens = BEFORE + Grid(arguments.frames, *arguments.grid).size + AFTER
        longest = -(-(tokens + arguments.new_tokens) // BUCKET_MULTIPLE) * BUCKET_MULTIPLE
        common = {"similarity_lower_bound": 0.6, "depth": arguments.depth, "dtype": arguments.dtype, "backend": kind}
        common["weights"] = getattr(arguments, "weights", None)  # of the benchmark that compares them
        common["kv_cache_dtype"] = getattr(arguments, "kv_cache_dtype", None)  # of another one
        if kind in ("tensorrt", "tensorrt-rtx"):
            sizes = {"max_input_len": longest, "max_kv_cache_capacity": longest}
            return BuildOptions.chosen(**common, **sizes, buckets=ladder(tokens, longest, 0.8 * min(arguments.costs)))
        device = arguments.device if kind == "inductor" else None
        return BuildOptions.chosen(**common, max_input_len=max(4096, longest), device=device)

    @property
    def on_gpu(self) -> bool:
        """Whether the backend is on a GPU; then eager torch is, too."""
        return self.choice.option.device == "cuda"

    @property
    def facts(self) -> dict[str, Any]:
        """What was measured, for the report."""
        arguments = self.arguments
        return {
            "backend": self.choice.facts,
            "shape": arguments.shape,
            "dtype": self.model.dtype,
            "tokens": len(self.film.hidden),
            "film": f"{arguments.frames} x {self.grid.height * self.grid.width} tokens",
            "captured_decode": bool(getattr(self.pipeline.backend, "captured", 0)),
            "threads": arguments.threads,
            "rounds": arguments.rounds,
        }

    def result_file(self, name: str) -> str:
        """Under results/: a name of its own for each backend but the one that every machine has."""
        option = self.choice.option
        usual = (option.backend, option.device) == ("onnxruntime", "cpu")
        return name if usual else "_".join((name, option.backend.replace("-", "_"), option.device))

    def eager(self) -> Eager:
        """The same weights and film in eager torch, where the backend is."""
        arguments = self.arguments
        device = "cuda" if self.on_gpu else "cpu"
        return Eager(self.checkpoint, self.film, arguments.threads, new_tokens=arguments.new_tokens, device=device,
                     dtype=self.model.dtype if self.on_gpu else "float32")  # fmt: skip

    def run(self, request: Request) -> Run:
        """Prefill, then decode a few tokens at the end of the prompt."""
        return run_ours(self.pipeline, self.film, request)

    def stages(self, request: Request) -> dict[str, float]:
        """Seconds of each stage of one answer, each waited for at its end: together they take less than their sum."""
        pipeline = self.pipeline
        patches = self.pipeline.manifest.vision.patches_per_token
        side = round(patches**0.5)
        grid = Grid(self.grid.frames, self.grid.height * side, self.grid.width * side)
        shape = (grid.frames, grid.height * grid.width, pipeline.manifest.vision.patch_width)
        levels = np.random.default_rng(SEED).integers(0, 256, shape, np.uint8)
        drawn = BytePatches(levels, normalised_levels(pipeline.manifest.preprocessing))
        visual = VisualInput((Tiles(drawn, grid),), ())
        waiting = WaitingStopwatch(pipeline.backend.device)
        for _ in range(2):  # the first one warms up
            waiting.seconds.clear()
            with waiting.stage("vision"):
                pipeline.encode_visual(visual)
            prefilled = pipeline.prefill(self.film.prompt, self.film.rows(pipeline), request, waiting)
            with waiting.stage("decode"):
                decode(pipeline, self.film, prefilled, request.max_new_tokens)
        return dict(waiting.seconds)


def in_turn(settings: Mapping[str, Setting], rounds: int) -> dict[tuple[str, str], list[Run]]:
    """Every request of every setting in each round, by the names of both; a round before them warms up."""
    runs: dict[tuple[str, str], list[Run]] = {}
    for turn in range(rounds + 1):
        for name, setting in settings.items():
            for label, request in setting.requests.items():
                found = setting.run(request)
                if turn:
                    runs.setdefault((name, label), []).append(found)
    return runs


def checkpoint_of(arguments: argparse.Namespace) -> Path:
    """The checkpoint of random weights at the shape asked for; large ones are never whole in memory."""
    shape = SHAPES[arguments.shape]
    folder: Path = arguments.work / f"{arguments.shape}-checkpoint"
    if shape.tied:
        return write_checkpoint(shape, folder)
    if not (folder / "config.json").is_file():
        write_big_checkpoint(BigShape(shape, *shape.tower), folder)
    return folder


def ladder(tokens: int, longest: int, least: float) -> tuple[int, ...]:
    """Buckets from the whole film down to a share of it, close to each other."""
    sizes = {longest, -(-tokens // BUCKET_MULTIPLE) * BUCKET_MULTIPLE}
    size = float(tokens)
    while size > max(least * tokens, BUCKET_MULTIPLE):
        size *= BUCKET_RATIO
        sizes.add(-(-int(size) // BUCKET_MULTIPLE) * BUCKET_MULTIPLE)
    return tuple(sorted(sizes))


class WaitingStopwatch(Stopwatch):
    """Waits for the device at both ends of a stage, so that a stage's time is its own."""

    def __init__(self, device: Any) -> None:
        super().__init__()
        self._device = device

    def _wait(self) -> None:
        """A buffer comes back when all that was enqueued before it is done."""
        self._device.download(self._device.zeros((1,), np.float32))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._wait()
        with super().stage(name):
            yield
            self._wait()


class Run:
    """One prefill and its decode."""

    def __init__(self, prefilled: Prefilled, seconds: dict[str, float], decode: list[float]) -> None:
        self.logits = prefilled.logits.copy()
        self.lengths = [int(n) for cache in prefilled.caches for n in cache.lengths - len(decode)]
        self.history = [record for record in prefilled.history if record.kind != "none"]
        self.prefill = seconds["prefill"] + seconds["reduction"]
        self.overhead = seconds["reduction"] / self.prefill
        self.decode = statistics.median(decode)


def run_ours(pipeline: Pipeline, film: Film, request: Request) -> Run:
    """Prefill, then decode a few tokens at the end of the prompt.

    What is not layers begins where a request's vision tower has ended: its rows are on the device, and are put among
    those of the text there.
    """
    stopwatch = Stopwatch()
    film.upload(pipeline.backend.device)
    with stopwatch.stage("reduction"):
        rows = film.rows(pipeline)
    prefilled = pipeline.prefill(film.prompt, rows, request, stopwatch)
    return Run(prefilled, stopwatch.seconds, decode(pipeline, film, prefilled, request.max_new_tokens))


def decode(pipeline: Pipeline, film: Film, prefilled: Prefilled, new_tokens: int) -> list[float]:
    """Seconds of each step behind a prefill, as a greedy answer takes them; one token came from the prefill itself."""
    decoder = Decoder(pipeline.segments, prefilled.caches)
    rotary = pipeline.rope(decode_positions(len(film.hidden), film.prompt.rope_delta, new_tokens))
    table = pipeline.embedding.upload(decoder.device, decoder.float_type)
    greedy = GreedyDecoder(decoder, pipeline.embedding, table, rotary, pipeline.manifest.model.vocab_size)
    token = int(prefilled.logits.argmax())
    seconds = []
    for _ in range(new_tokens - 1):
        start = time.perf_counter()
        token = greedy.step(token)
        seconds.append(time.perf_counter() - start)
    return seconds


def _pair(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)
