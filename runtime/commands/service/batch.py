"""`ff-run batch`: the flags of a batch, and what they make."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from framefusion.console import messages as console
from framefusion.console.help import Command, option
from framefusion.console.terminal import activity, is_interactive
from framefusion.runtime.commands.flags import (
    COST,
    COUNT,
    FILE,
    FPS,
    MAX_FRAMES,
    MAX_NEW_TOKENS,
    REDUCER,
    SEED,
    TEMPERATURE,
    open_pipeline,
    running_flags,
    running_options,
)
from framefusion.runtime.commands.question.prompt_text import read_prompt
from framefusion.runtime.machine.cpu import available_cores

if TYPE_CHECKING:
    from framefusion.runtime.batch.run import Totals
    from framefusion.runtime.pipeline import Pipeline

LOG_SECONDS = 30.0


@click.command(cls=Command, examples=("ff-run batch bundle clips -p 'What happens?' --cost 0.3 -o answers.jsonl",))
@click.argument("bundle", type=FILE)
@click.argument("source", type=FILE)
@option(
    "--output",
    "-o",
    section="Output",
    required=True,
    type=FILE,
    help="The answers, JSONL; a run that ended early goes on behind them.",
)
@option(
    "--prompt",
    "-p",
    section="What is asked",
    help="Question about every film that has none of its own; - and @FILE read it, as those of generate do; default: "
    "every line must have one.",
)
@option(
    "--system", section="What is asked", help="System prompt of questions that have none; default: the model family's."
)
@option(
    "--shard",
    section="Load",
    default="0/1",
    show_default=True,
    metavar="I/N",
    help="The I-th of N parts, from 0, by ids.",
)
@option(
    "--model-name",
    section="What is asked",
    help="Name of the bundle in OpenAI's lines and their answers; default: the name of its folder.",
)
@option("--retry-errors", section="Output", is_flag=True, help="Ask again what an earlier run could not answer.")
@MAX_NEW_TOKENS
@COST
@REDUCER
@TEMPERATURE
@SEED
@FPS
@MAX_FRAMES
@option(
    "--decoders",
    section="Load",
    type=COUNT,
    default=max(available_cores() // 2, 1),
    help="Processes that decode films ahead; default: half of the cores.",
)
@option(
    "--together",
    section="Load",
    type=COUNT,
    default=1,
    show_default=True,
    help="Questions that are answered at once, their tokens in one call; a run that is killed repeats as many.",
)
@option(
    "--images-as-video",
    section="What is asked",
    is_flag=True,
    help="Take pictures in a row, in OpenAI's lines, for a film's frames.",
)
@option(
    "--allowed-media-domains",
    section="What is asked",
    default="",
    help="Hosts that OpenAI's lines may fetch from, with commas, or any; default: none.",
)
@option(
    "--allowed-local-media-path",
    section="What is asked",
    type=FILE,
    help="Folder of files that OpenAI's lines may open; default: none.",
)
@running_options
@console.json_option
def batch(bundle: Path, source: Path, output: Path, **flags: Any) -> None:
    """Answer the questions of SOURCE with BUNDLE: one line of JSON each, resumed where a run ended.

    SOURCE is a folder of films and pictures, a .jsonl or .parquet file of id, video or image, and prompt, or lines as
    OpenAI's batch API takes them.
    """
    from framefusion.runtime.batch.answers import AnswerFile
    from framefusion.runtime.batch.questions import Defaults, Shard, check_questions, read_questions
    from framefusion.runtime.request import Request
    from framefusion.runtime.server.protocol.request import ReductionDefaults

    # 1. All questions are read once, before anything is opened.
    running = running_flags(flags)
    shard = Shard.parse(flags["shard"])
    name = flags["model_name"] or bundle.resolve().name
    prompt = None if flags["prompt"] is None else read_prompt(flags["prompt"])
    reduction = ReductionDefaults(flags["cost"], flags["reducer"], flags["images_as_video"])
    defaults = Defaults(prompt, flags["system"], reduction, name)
    with activity(f"reading {source}"):
        count = check_questions(source, defaults, shard)
    if shard.count > 1:
        output = output.with_name(f"{output.stem}-{shard.index}-of-{shard.count}{output.suffix}")
    request = Request(
        flags["max_new_tokens"], flags["cost"], seed=flags["seed"], reducer=flags["reducer"],
        temperature=flags["temperature"],
    )  # fmt: skip
    # 2. The bundle, and the answers that are there.
    run, pipeline = _run(bundle, name, running, request, flags)
    settings = {
        "bundle": pipeline.bundle.digest,
        "shard": f"{shard.index}/{shard.count}",
        "request": asdict(request),
        "defaults": {"prompt": prompt, "system": flags["system"], "images_as_video": flags["images_as_video"]},
        "frames": {"fps": flags["fps"], "max_frames": flags["max_frames"]},
    }
    with AnswerFile(output, settings, flags["retry_errors"]) as answers, activity(f"0 of {count}") as line:
        reported = [0.0]  # seconds of the run at which a log got a line

        def report(totals: Totals) -> None:
            done = len(answers.done)
            rate = (totals.answered + totals.failed) / totals.seconds if totals.seconds else 0.0
            left = f", {(count - done) / rate:.0f} s left" if rate else ""
            progress = f"{done} of {count}, {answers.errors} errors, {rate:.2f} a second{left}"
            line.say(progress)
            if not is_interactive(sys.stderr) and totals.seconds > reported[-1] + LOG_SECONDS:
                reported.append(totals.seconds)
                console.log(progress)

        totals = run.run(read_questions(source, defaults, shard), answers, report)
    # 3. What it came to.
    console.show({"answers": str(output), "errors": answers.errors, **asdict(totals)}, _summary)


def _run(bundle: Path, name: str, running: dict[str, Any], request: Any, flags: dict[str, Any]) -> tuple[Any, Pipeline]:
    """The run, and the pipeline that it answers with."""
    from framefusion.runtime.batch.reading import batch_reader, local_files
    from framefusion.runtime.batch.run import BatchRun
    from framefusion.runtime.server.media.decoding import start_decoders
    from framefusion.runtime.server.media.policy import MediaPolicy, read_domains

    start_decoders()  # before there are threads: children are copies of what it starts
    openai_policy = MediaPolicy(read_domains(flags["allowed_media_domains"]), flags["allowed_local_media_path"])
    pipeline = open_pipeline(bundle, **running)
    manifest = pipeline.manifest
    decoders = flags["decoders"]
    sampling = manifest.sampling.overridden(flags["fps"], flags["max_frames"])
    plain_reader = batch_reader(manifest, local_files(), decoders, sampling)
    openai_reader = batch_reader(manifest, openai_policy, decoders, sampling)
    run = BatchRun(pipeline, plain_reader, openai_reader, request, name, decoders, flags["together"])
    return run, pipeline


def _summary(facts: dict[str, Any]) -> str:
    """A few lines for people."""
    done = facts["answered"] + facts["failed"]
    lines = [
        f"{facts['answers']}: {facts['answered']} answered, {facts['failed']} not, {facts['skipped']} by earlier runs",
    ]
    if done:
        lines.append(f"{facts['seconds']:.1f} s, {done / facts['seconds']:.2f} a second")
    if facts["visual_tokens"]:
        share = facts["kept_tokens"] / facts["visual_tokens"]
        lines.append(f"visual tokens: {facts['visual_tokens']}, {share:.1%} of them in the last layer")
    return "\n".join(lines)
