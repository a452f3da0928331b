"""Accuracy of the tiny trained model, compiled and eager, dense and reduced: FrameFusion beside a random reduction.

    python -m tools.accuracy --questions 1000 --write

One question a clip, held-out clips, greedy decoding, exact match. Each clip is drawn and encoded once and then asked
under every cost, so the columns differ in nothing but the reduction. Intervals are Wilson's at 95 %.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from framefusion.export.build import build
from framefusion.export.checkpoint import Checkpoint
from framefusion.export.engines.eager import EagerBackend
from framefusion.export.plan import BuildOptions, BuildPlan
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.prompt import Turn, Visual
from tools.bench.setting import ROOT, report
from tools.tiny import clips

CHECKPOINT = ROOT / "tests" / "models" / "tiny_qwen2_vl"
COSTS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
EAGER_COSTS = (1.0, 0.3)
MAX_ANSWER = 8  # tokens
FIRST_SEED = clips.HELD_OUT + 100_000  # not the clips that training looked at to stop


def main() -> None:
    arguments = parse()
    started = time.perf_counter()
    options = BuildOptions(
        similarity_lower_bound=arguments.similarity, ratio_lower_bound=arguments.ratio, depth=arguments.depth
    )
    with tempfile.TemporaryDirectory() as folder:
        built = build(Checkpoint(arguments.checkpoint), Path(folder) / "bundle", options, verify=False)
        ask = partial(ask_some, built.folder, arguments.checkpoint, options)
        shares = [list(questions(arguments.questions))[job :: arguments.jobs] for job in range(arguments.jobs)]
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            parts = list(pool.map(ask, shares))
    right, kept = sum_up(parts)
    totals = Counter(kind for _, kind in questions(arguments.questions))
    figures = {
        "questions": dict(totals),
        "similarity_lower_bound": built.manifest.reduction.similarity_lower_bound,
        "ratio_lower_bound": arguments.ratio,
        "visual_tokens_in_last_segment": {name: round(sum(n) / len(n), 1) for name, n in kept.items()},
        "accuracy": {name: table(counts, totals) for name, counts in right.items()},
        "seconds": round(time.perf_counter() - started),
    }
    report("accuracy", figures, write=arguments.write)


def questions(count: int) -> Iterator[tuple[int, str]]:
    """Seeds and kinds of the held-out questions, every kind equally often."""
    for index in range(count):
        yield FIRST_SEED + index, clips.KINDS[index % len(clips.KINDS)]


Tally = tuple[dict[str, Counter[str]], dict[str, list[int]]]
"""Right answers by kind, and visual tokens left, of every column."""


def ask_some(folder: Path, checkpoint: Path, options: BuildOptions, asked: list[tuple[int, str]]) -> Tally:
    """One process's share of the questions, on one thread."""
    torch.set_num_threads(1)
    backend = EagerBackend(BuildPlan(Checkpoint(checkpoint), options).eager_loaders())
    pipelines = {
        "compiled": Pipeline(Bundle(folder), threads=1),
        "eager": Pipeline(Bundle(folder, verify=False), backend),
    }
    right: dict[str, Counter[str]] = {}
    kept: dict[str, list[int]] = {}
    for seed, kind in asked:
        clip = clips.draw_clip(seed, kind=kind)
        turns = [Turn("user", (Visual.VIDEO, clip.question))]
        for name, pipeline in pipelines.items():
            prompt, rows = pipeline.read(turns, [clip.frames])
            for column, request in columns(seed, name).items():
                answer = pipeline.answer(prompt, rows, request)
                label = f"{name}: {column}"
                right.setdefault(label, Counter())[kind] += answer.text.strip() == clip.answer
                left = answer.reduction[-1].visual_after if answer.reduction else answer.visual_tokens
                kept.setdefault(label, []).append(left)
    return right, kept


def sum_up(parts: list[Tally]) -> Tally:
    """The processes' tallies as one."""
    right: dict[str, Counter[str]] = {}
    kept: dict[str, list[int]] = {}
    for counts, lengths in parts:
        for column in counts:
            right[column] = right.get(column, Counter()) + counts[column]
            kept[column] = kept.get(column, []) + lengths[column]
    return right, kept


def columns(seed: int, pipeline: str) -> dict[str, Request]:
    """What every clip is asked under. Eager torch is slow: dense and one reduction show whether it is the same."""
    if pipeline == "eager":
        return {f"framefusion at cost {cost:g}": Request(MAX_ANSWER, cost=cost) for cost in EAGER_COSTS}
    asked = {f"framefusion at cost {cost:g}": Request(MAX_ANSWER, cost=cost) for cost in COSTS}
    random = {
        f"random at cost {cost:g}": Request(MAX_ANSWER, cost=cost, seed=seed, random_reduction=True)
        for cost in COSTS
        if cost < 1
    }
    return asked | random


def table(right: Counter[str], totals: Counter[str]) -> dict[str, Any]:
    """Accuracy overall with its interval, and by kind."""
    low, high = wilson(right.total(), totals.total())
    overall = {"all": round(right.total() / totals.total(), 4), "interval": [round(low, 4), round(high, 4)]}
    return overall | {kind: round(right[kind] / totals[kind], 4) for kind in totals}


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    share, spread = right / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return centre - half, centre + half


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--similarity", type=float, default=None, help="similarity_lower_bound; default: the family's")
    parser.add_argument("--ratio", type=float, default=0.1, help="ratio_lower_bound")
    parser.add_argument("--depth", type=int, default=None, help="deepest layer a reduction may follow")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--write", action="store_true", help="write tools/bench/results/accuracy.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
