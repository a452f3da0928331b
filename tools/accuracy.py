"""Accuracy of the tiny trained model under every reducer and cost, compiled; and whether eager torch says the same.

    python -m tools.accuracy --questions 1000 --write
    python -m tools.accuracy --questions 1000 --clips brief --write

One question a clip, held-out clips, greedy decoding, exact match, all by `framefusion.export.evaluation`. With --work
bundle and answers stay in a folder, and an interrupted run goes on from there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from framefusion.console.progress import CountLines
from framefusion.export.evaluate.answering import EAGER, Condition, Setup
from framefusion.export.evaluate.evaluation import conditions, evaluate
from framefusion.export.evaluate.questions import Question, key_of
from framefusion.export.options import BuildOptions
from framefusion.reducers import DEFAULT, REDUCERS
from framefusion.runtime.format.manifest_file import read_manifest
from framefusion.runtime.media.sources import Source
from framefusion.runtime.text.prompt import Visual
from tools.bench.setting import ROOT, open_bundle, report
from tools.tiny import clips

CHECKPOINT = ROOT / "tests" / "models" / "tiny_qwen2_vl"
COSTS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
EAGER_COSTS = (1.0, 0.3)
MAX_ANSWER = 8  # tokens
RESULTS = {"lasting": "accuracy", "brief": "accuracy_brief"}  # by `clips.STAYS`
FIRST_SEED = clips.HELD_OUT + 100_000  # not the clips that training looked at to stop


@dataclass(frozen=True)
class DrawnQuestion(Question):
    """A question about a clip that is drawn when it is read."""

    seed: int = 0
    stay: clips.Span = clips.STAY

    @property
    def files(self) -> list[Source]:
        return [clips.draw_clip(self.seed, kind=self.type, stay=self.stay).frames]

    @property
    def key(self) -> str:
        stay = [] if self.stay == clips.STAY else [str(self.stay)]
        return key_of(["tools.tiny.clips", str(self.seed), self.type, *stay])


def questions(count: int, stay: clips.Span = clips.STAY, first_seed: int = FIRST_SEED) -> list[Question]:
    """Questions about held-out clips whose objects stay for a time of `stay`, every kind equally often."""
    return [drawn(first_seed + index, clips.KINDS[index % len(clips.KINDS)], stay) for index in range(count)]


def drawn(seed: int, kind: str, stay: clips.Span) -> DrawnQuestion:
    """The question of `clips.draw_clip(seed, kind=kind, stay=stay)`, nothing drawn yet."""
    question = clips.ask(clips.scene_for(seed, kind, stay=stay), kind, np.random.default_rng((seed, 7)))
    visuals = ((Visual.VIDEO, Path(f"clip {seed}")),)
    return DrawnQuestion(f"{kind} of clip {seed}", kind, question.text, (question.answer,), (), visuals, seed, stay)


def main() -> None:
    arguments = parse()
    with working_folder(arguments.work) as work:
        question_list = questions(arguments.questions, clips.STAYS[arguments.clips])
        figures = measure(arguments.checkpoint, work, question_list, arguments.jobs)
    report(RESULTS[arguments.clips], figures, write=arguments.write)


def measure(checkpoint: Path, work: Path, question_list: list[Question], jobs: int) -> dict[str, Any]:
    """The evaluation of a bundle under all reducers of the box, and of eager torch under FrameFusion."""
    bundle = open_bundle(checkpoint, work / "bundle", BuildOptions())
    compiled = Setup(str(bundle), max_new_tokens=MAX_ANSWER, threads=1)
    eager = Setup(str(checkpoint), live=EAGER, max_new_tokens=MAX_ANSWER, threads=1)
    compiled_report = run(compiled, question_list, conditions(list(REDUCERS), COSTS), work / "compiled.json", jobs)
    same = conditions([DEFAULT], EAGER_COSTS)
    eager_report = run(eager, question_list, same, work / "eager.json", jobs)
    record = read_manifest(bundle).reduction
    return {
        "similarity_lower_bound": record.similarity_lower_bound,
        "ratio_lower_bound": record.ratio_lower_bound,
        **{name: compiled_report[name] for name in ("questions", "accuracy", "paired")},
        "eager": {
            "accuracy": eager_report["accuracy"],
            "answers": len(question_list) * len(same),
            "that_differ": differing(work / "compiled.json", work / "eager.json"),
        },
    }


def run(setup: Setup, question_list: list[Question], under: list[Condition], output: Path, jobs: int) -> dict[str, Any]:
    return evaluate(
        setup, question_list, under, output=output, jobs=jobs, on_progress=CountLines(f"questions, {output.stem}")
    )


def differing(first: Path, second: Path) -> int:
    """Answers of the second file whose text is another one in the first."""
    ours = texts(first)
    theirs = texts(second)
    return sum(ours[key] != text for key, text in theirs.items())


def texts(path: Path) -> dict[tuple[str, str, float], str]:
    """The answer to each question under each condition."""
    rows = json.loads(path.read_text(encoding="utf-8"))["answers"]
    return {(row["question"], row["reducer"], row["cost"]): row["text"] for row in rows}


@contextmanager
def working_folder(chosen: Path | None) -> Iterator[Path]:
    """The folder that was chosen, or one that goes away."""
    if chosen is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    chosen.mkdir(parents=True, exist_ok=True)
    yield chosen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--clips", choices=tuple(clips.STAYS), default="lasting", help="how long objects are seen")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--work", type=Path, help="bundle and answers; kept")
    parser.add_argument("--write", action="store_true", help="write tools/bench/results/accuracy*.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
