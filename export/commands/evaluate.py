"""The commands that answer questions: `eval` a file of them, `compare` engines, `view` what became of each token.

Builds library objects of the flags and prints reports. A checkpoint runs in eager torch, which is imported then.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from framefusion.console import messages as console
from framefusion.console.help import Command, option
from framefusion.console.progress import CountLines, progress_lines
from framefusion.console.terminal import activity
from framefusion.export.commands.build import LOADING, missing_package, open_checkpoint
from framefusion.export.commands.flags import CHECKPOINT_REVISION, COUNT, FILE, POSITIVE, eval_options
from framefusion.runtime.commands.flags import (
    COMPARE,
    OPEN,
    OUTPUT,
    THREADS,
    CommaList,
    PromptOptions,
    VisualCommand,
    question_options,
)
from framefusion.runtime.machine.cpu import default_threads, physical_cores

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.runtime.pipeline import Pipeline

# --- eval -----------------------------------------------------------------------------------------------------------


@click.command(
    name="eval",
    cls=Command,
    examples=("ff-export eval bundle --questions questions.jsonl --cost 1,0.3 -o out.json",),
)
@click.argument("model", metavar="BUNDLE|CHECKPOINT")
@CHECKPOINT_REVISION
@eval_options
@THREADS
@console.json_option
def evaluate_command(
    model: str,
    questions: Path,
    reducer: tuple[str, ...] | None,
    cost: tuple[float, ...] | None,
    output: Path | None,
    limit: int | None,
    jobs: int,
    against: str | None,
    **setup: Any,
) -> None:
    """Answer a file of questions under every reducer and cost, and report accuracy with intervals.

    A bundle answers as `ff-run generate` does; a checkpoint live, reduced in eager torch, in fp32, and nothing is
    built. Decoding is greedy.
    """
    try:
        with activity(LOADING):
            from framefusion.export.evaluate.against.counterpart import counterpart
            from framefusion.export.evaluate.answering import Setup, default_condition
            from framefusion.export.evaluate.evaluation import conditions, render
            from framefusion.export.evaluate.evaluation import evaluate as run
            from framefusion.export.evaluate.questions import read_questions
    except ImportError as error:
        raise missing_package(error) from None

    question_list = read_questions(questions, limit)
    opened = Setup(model, **setup)
    if not opened.is_bundle:
        open_checkpoint(model, opened.revision)
    default = default_condition(opened)
    under = conditions(reducer or (default.reducer,), cost or (1.0, default.cost))
    other = None
    if against is not None:
        with CountLines(f"questions, {Path(against).name}") as count:
            other = counterpart(against, opened, question_list, under, jobs=jobs, on_progress=count)
    with CountLines("questions") as count:
        report = run(opened, question_list, under, output=output, jobs=jobs, on_progress=count, against=other)
    console.show({"file": str(questions)} | report, render)


# --- compare --------------------------------------------------------------------------------------------------------


@click.command(
    name="compare",
    cls=VisualCommand,
    examples=("ff-export compare path/to/Qwen2-VL -v clip.mp4 -p 'What happens?'",),
)
@click.argument("checkpoint")
@CHECKPOINT_REVISION
@option(
    "--video",
    "-v",
    "videos",
    multiple=True,
    required=True,
    type=FILE,
    help="Film to show; repeatable, shown in order.",
)
@option("--prompt", "-p", required=True, help="Question about the films.")
@option("--cost", "costs", type=CommaList(float), default="0.3", show_default=True, help="Costs beside 1, with commas.")
@option("--bundle", type=FILE, help="Bundle of the checkpoint; default: one is built, without its check.")
@option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True, help="Answers of each that count.")
@option("--max-new-tokens", "-n", type=COUNT, default=16, show_default=True, help="Longest answer, in tokens.")
@option("--fps", type=POSITIVE, help="Frames taken from each second of film; default: the bundle's.")
@option("--max-frames", type=COUNT, help="Most frames taken from a film; default: the bundle's.")
@THREADS
@console.json_option
def compare_command(
    checkpoint: str,
    revision: str | None,
    costs: tuple[float, ...],
    bundle: Path | None,
    rounds: int,
    threads: int,
    **options: Any,
) -> None:
    """Measure transformers, transformers with apply_framefusion, and the backends of a bundle on one film.

    On the CPU. Each is a process of its own; all answer the same tokens in turn, with the same number of threads.
    Nothing is kept of the bundle that is built where --bundle names none.
    """
    from framefusion.reduction.budget import check_cost
    from framefusion.runtime.media.sources import source_kind

    # 1. What the flags say, before a build and the opening of every way.
    for cost in costs:
        check_cost(cost)
    fps = options.pop("fps")
    max_frames = options.pop("max_frames")
    question = PromptOptions.from_flags(**options, images=(), system=None)
    for film in question.files:
        source_kind(film)  # refuses what cannot be opened
    source = open_checkpoint(checkpoint, revision)
    from framefusion.export.build import build
    from framefusion.export.compare.compare import compare, render, ways_of
    from framefusion.export.compare.worker import Task
    from framefusion.export.options import BuildOptions
    from framefusion.runtime.bundle import Bundle

    # 2. The bundle, and every way in turn.
    with tempfile.TemporaryDirectory() as folder:
        if bundle is None:
            bundle = Path(folder) / "bundle"
            with progress_lines() as progress:
                build(source, bundle, BuildOptions(), verify=False, progress=progress)
        ways = ways_of(Bundle(bundle), costs)
        task = Task(
            checkpoint=source.folder,
            bundle=bundle,
            turns=tuple(question.turns),
            files=tuple(question.files),
            fps=fps,
            max_frames=max_frames,
            max_new_tokens=options["max_new_tokens"],
            threads=threads or default_threads() or physical_cores(),
        )
        with CountLines("answers") as count:
            report = compare(ways, task, rounds, count)
    console.show({"checkpoint": source.origin.name, "files": [str(file) for file in task.files]} | report, render)


# --- view -----------------------------------------------------------------------------------------------------------


@click.command(
    name="view",
    cls=VisualCommand,
    examples=("ff-export view path/to/Qwen2-VL -v clip.mp4 -p 'What happens?' -o page.html",),
)
@click.argument("model", metavar="BUNDLE|CHECKPOINT")
@CHECKPOINT_REVISION
@OUTPUT
@COMPARE
@OPEN
@question_options
@THREADS
@console.json_option
def view_command(
    model: str, revision: str | None, output: Path, compare: bool | None, open_it: bool, threads: int, **prompt: Any
) -> None:
    """Answer a question and draw what became of each token, as one HTML page.

    A bundle runs as `ff-run view` runs it; a checkpoint runs in eager torch, in fp32, and nothing is built.
    """
    from framefusion.runtime.bundle import Bundle
    from framefusion.runtime.commands.cli import show_page
    from framefusion.runtime.format.manifest_file import MANIFEST
    from framefusion.runtime.pipeline import Pipeline

    question = PromptOptions.from_flags(**prompt)
    if (Path(model) / MANIFEST).is_file():
        pipeline = Pipeline(Bundle(model), threads=threads)
        show_page(pipeline, Path(model).resolve().name, question, output, compare, open_it)
        return
    source = open_checkpoint(model, revision)
    with tempfile.TemporaryDirectory() as folder:
        with activity(f"opening {source.origin.name} in eager torch"):
            pipeline = _uncompiled(source, Path(folder) / "parts", threads)
        show_page(pipeline, source.origin.name, question, output, compare, open_it)


def _uncompiled(source: Checkpoint, folder: Path, threads: int) -> Pipeline:
    import torch

    from framefusion.export.eager.pipeline import eager_pipeline
    from framefusion.export.plan.build_plan import BuildPlan
    from framefusion.export.plan.stored_weights import eager_options

    if threads:
        torch.set_num_threads(threads)
    return eager_pipeline(BuildPlan(source, eager_options(source)), folder)
