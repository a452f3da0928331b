"""ff-run: a bundle and files in, text out. Builds library objects and prints what they answer; torch is never near.

Text goes to stdout as it comes, the summary to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import framefusion
from framefusion import console
from framefusion.budget import describe_cost

if TYPE_CHECKING:
    from framefusion.runtime.frame_sampling import FrameSampling
    from framefusion.runtime.pipeline import Generation, Pipeline
    from framefusion.runtime.sampling import GenerationConfig

FILE = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
_KINDS = "framefusion.kinds"


class VisualCommand(click.Command):
    """Remembers in which order --video and --image were given; click keeps the order only within one option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, with the kinds of the visuals noted."""
        flags = (arg.partition("=")[0] for arg in args)
        ctx.meta[_KINDS] = [flag[2:] for flag in flags if flag in ("--video", "--image")]
        return super().parse_args(ctx, args)


def visuals_in_order(kinds: Sequence[str], videos: Sequence[Path], images: Sequence[Path]) -> list[tuple[str, Path]]:
    """Kind and file of each visual as they stood on the command line."""
    if kinds.count("video") != len(videos) or kinds.count("image") != len(images):  # a flag's name was a value
        kinds = ["video"] * len(videos) + ["image"] * len(images)
    files = {"video": iter(videos), "image": iter(images)}
    return [(kind, next(files[kind])) for kind in kinds]


@click.group(cls=console.CommandGroup)
@click.version_option(framefusion.__version__)
def ff_run() -> None:
    """Run an exported video LVLM."""


@ff_run.command(cls=VisualCommand)
@click.argument("bundle", type=FILE)
@click.option("--video", "videos", multiple=True, type=FILE, help="Film to show; repeatable, shown in order.")
@click.option("--image", "images", multiple=True, type=FILE, help="Picture to show; repeatable, shown in order.")
@click.option("--prompt", required=True, help="What is asked, after videos and images.")
@click.option("--system", help="System prompt; default: the family's.")
@click.option("--max-new-tokens", type=COUNT, default=128, show_default=True, help="Of the answer.")
@click.option("--cost", type=float, help="Share of the computation over visual tokens that is kept, in (0, 1].")
@click.option("--similarity-lower-bound", type=float, help="Tokens at least this alike merge.")
@click.option("--ratio-lower-bound", type=float, help="Merging ends when a smaller share merges.")
@click.option("--temperature", type=float, help="Of drawn tokens; 0 takes the best one.")
@click.option("--top-p", type=float, help="Draw among the likeliest tokens of this total probability.")
@click.option("--top-k", type=int, help="Draw among this many tokens; 0 is off.")
@click.option("--seed", type=click.IntRange(min=0), help="Of drawn tokens.")
@click.option("--fps", type=click.FloatRange(min=0, min_open=True), help="Frames sampled from a second of film.")
@click.option("--max-frames", type=COUNT, help="Most frames sampled.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Of one operator; default: the physical cores.")
@click.option("--no-verify", is_flag=True, help="Do not compare the files of the bundle with their hashes.")
@console.json_option
def generate(
    bundle: Path,
    videos: tuple[Path, ...],
    images: tuple[Path, ...],
    prompt: str,
    system: str | None,
    threads: int,
    no_verify: bool,
    **wishes: Any,
) -> None:
    """Answer one prompt about videos and images with BUNDLE."""
    from framefusion.runtime.bundle import Bundle
    from framefusion.runtime.pipeline import Pipeline, Request
    from framefusion.runtime.prompt import Turn, Visual

    visuals = visuals_in_order(click.get_current_context().meta[_KINDS], videos, images)
    turns = [] if system is None else [Turn("system", (system,))]
    turns.append(Turn("user", (*(Visual(kind) for kind, _ in visuals), prompt)))
    pipeline = Pipeline(Bundle(bundle, verify=not no_verify), threads=threads)
    request = Request(
        wishes["max_new_tokens"], wishes["cost"], wishes["similarity_lower_bound"], wishes["ratio_lower_bound"],
        drawing(pipeline.manifest.generation, wishes["temperature"], wishes["top_p"], wishes["top_k"]), wishes["seed"],
    )  # fmt: skip
    sampling = frame_sampling(pipeline.manifest.sampling, wishes["fps"], wishes["max_frames"])
    on_text = None if console.wants_json() else _print_piece
    answer = pipeline.generate(turns, [file for _, file in visuals], request, sampling=sampling, on_text=on_text)
    facts = report(pipeline, answer, wishes["cost"])
    if on_text is not None:
        click.echo()
        console.log(summary(facts))
    else:
        console.show(facts, summary)


def drawing(
    config: GenerationConfig, temperature: float | None, top_p: float | None, top_k: int | None
) -> GenerationConfig:
    """The bundle's way of choosing tokens with what was asked; asking for any of it asks to draw."""
    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return replace(config, do_sample=True, **given) if given else config


def frame_sampling(told: FrameSampling, fps: float | None, max_frames: int | None) -> FrameSampling:
    """The bundle's sampling of frames with what was asked."""
    most = max_frames or told.max_frames
    low, force = min(told.min_frames, most), told.force and fps is None
    return replace(told, fps=fps or told.fps, max_frames=most, min_frames=low, force=force)


def _print_piece(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def report(pipeline: Pipeline, answer: Generation, cost: float | None) -> dict[str, Any]:
    """The answer and how it came about, as plain values."""
    asked = pipeline.manifest.reduction.cost if cost is None else cost
    reached, decoding = answer.cost, answer.seconds.get("decode", 0.0)
    return asdict(answer) | {
        "cost": {"asked": asked, "reached": reached, "asked_text": describe_cost(asked)},
        "tokens_per_second": (len(answer.token_ids) - 1) / decoding if decoding else 0.0,
    }


def summary(facts: dict[str, Any]) -> str:
    """A few lines for people."""
    lines = [f"prompt: {facts['prompt_tokens']} tokens, {facts['visual_tokens']} of them visual"]
    for call in facts["reduction"]:
        if call["kind"] != "none":
            kept = describe_cost(call["visual_after"] / call["visual_before"])
            counts = f"{call['tokens_before']} -> {call['tokens_after']} tokens"
            lines.append(f"call {call['call']}: {call['kind']}, {counts} ({kept} of the visual)")
    if facts["visual_tokens"]:
        lines.append(f"cost: {describe_cost(facts['cost']['reached'])}; asked: {facts['cost']['asked_text']}")
    lines.append("seconds: " + ", ".join(f"{stage} {spent:.3f}" for stage, spent in facts["seconds"].items()))
    new, speed = len(facts["token_ids"]), facts["tokens_per_second"]
    lines.append(f"answer: {new} tokens, {facts['finish_reason']}, {speed:.1f} tokens/s")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    ff_run(prog_name="ff-run")
