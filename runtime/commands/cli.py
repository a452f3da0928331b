"""ff-run: a bundle and files in, text out. Builds library objects and prints what they answer; torch is never near.

Text goes to stdout as it comes, the summary to stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import framefusion
from framefusion.console import messages as console
from framefusion.console.help import option
from framefusion.console.terminal import PATIENCE, activity
from framefusion.runtime.commands.check import check
from framefusion.runtime.commands.doctor import doctor
from framefusion.runtime.commands.flags import (
    COMPARE,
    FILE,
    OPEN,
    OUTPUT,
    CommaList,
    PromptOptions,
    VisualCommand,
    comparing_options,
    conversation_options,
    open_pipeline,
    question_options,
    running_flags,
    running_options,
)
from framefusion.runtime.commands.generate import generate, report, summary
from framefusion.runtime.commands.service.batch import batch
from framefusion.runtime.commands.service.serve import serve

if TYPE_CHECKING:
    from framefusion.runtime.pipeline import Pipeline


@click.group(
    cls=console.CommandGroup,
    examples=(
        "ff-run generate bundle --video clip.mp4 --prompt 'What happens?'",
        "ff-run chat bundle --video clip.mp4",
    ),
)
@click.version_option(framefusion.__version__, "--version", "-V")
def ff_run() -> None:
    """Ask a model about films and pictures: run a bundle that ff-export built, with token reduction inside its LLM."""


ff_run.add_command(generate)


@ff_run.command(
    cls=VisualCommand,
    examples=(
        "ff-run chat bundle --video clip.mp4 --cost 0.3",
        "printf 'What happens?\\nWho is it?\\n' | ff-run chat bundle -v clip.mp4",
    ),
)
@click.argument("bundle", type=FILE)
@conversation_options
@running_options
def chat(bundle: Path, system: str | None, **flags: Any) -> None:
    """Talk with BUNDLE about films and pictures.

    Each is read and encoded once and stays in the caches. A line is a message, and /help lists the commands. It works
    piped: answers go to stdout, all else to stderr.
    """
    from framefusion.runtime.commands import chat as conversation

    running = running_flags(flags)
    options = PromptOptions.from_flags(**flags, prompt="", system=system)
    pipeline = open_pipeline(bundle, **running)
    pipeline.limits = options.limits()
    talk = conversation.Chat(
        pipeline,
        options.request(),
        options.sampling(pipeline.manifest),
        system,
        options.visuals(),
        interactive=sys.stdin.isatty(),
    )
    if pipeline.choice is not None:
        console.log(pipeline.choice.text)
    if talk.interactive:
        console.log("/help lists the commands")
    talk.run(conversation.typed_lines() if talk.interactive else conversation.piped_lines())


ff_run.add_command(batch)
ff_run.add_command(serve)


@ff_run.command(
    cls=VisualCommand,
    examples=("ff-run view bundle -v clip.mp4 -p 'What happens?' -o report.html --open",),
)
@click.argument("bundle", type=FILE)
@OUTPUT
@COMPARE
@OPEN
@question_options
@running_options
@console.json_option
def view(bundle: Path, output: Path, compare: bool | None, open_it: bool, **options: Any) -> None:
    """Answer a question and draw what became of each token, as one HTML page.

    Answers as generate does. The page loads nothing from elsewhere: open it in a browser.
    """
    running = running_flags(options)
    question = PromptOptions.from_flags(**options)
    pipeline = open_pipeline(bundle, **running)
    show_page(pipeline, bundle.resolve().name, question, output, compare, open_it)


@ff_run.command(
    cls=VisualCommand, examples=("ff-run bench bundle -v clip.mp4 -p 'What happens?' --cost 1,0.5,0.3 --json",)
)
@click.argument("bundle", type=FILE)
@option(
    "--cost",
    "costs",
    type=CommaList(float),
    default=(),
    section="Measurement",
    help="Shares of the computation over visual tokens to compare, the first with the others; default: 1,0.5,0.3.",
)
@option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=3,
    show_default=True,
    section="Measurement",
    help="Answers at each cost that count, after one that does not.",
)
@option(
    "--picture",
    type=FILE,
    section="Output",
    help="SVG file that the wait for the first token is drawn to, stage by stage; only an older picture is replaced; "
    "default: none.",
)
@comparing_options
@running_options
@console.json_option
def bench(bundle: Path, costs: tuple[float, ...], rounds: int, picture: Path | None, **options: Any) -> None:
    """Measure a question at several costs, side by side: stages, first token, memory and answers."""
    from framefusion.runtime.commands.measure.bench import measure, render, ways_of
    from framefusion.runtime.commands.measure.picture import check_picture, write_picture

    if picture is not None:
        check_picture(picture)
    running = running_flags(options)
    question = PromptOptions.from_flags(**options, cost=None)
    pipeline = open_pipeline(bundle, **running)
    pipeline.limits = question.limits()
    ways = ways_of(pipeline, question.request(), costs)
    sampling = question.sampling(pipeline.manifest)
    with activity(f"measuring {len(ways)} costs, {rounds} rounds and one to warm up"):
        measured = measure(ways, question.turns, question.files, sampling, rounds)
    if picture is not None:
        write_picture(measured, picture)
        measured["picture"] = str(picture)
    console.show(measured, render)


ff_run.add_command(check)
ff_run.add_command(doctor)


@ff_run.command(examples=("ff-run reducers",))
@console.json_option
def reducers() -> None:
    """List the methods that can drop tokens: those of this package and those that installed packages add."""
    from framefusion.reducers import reducer_facts

    console.show({"reducers": reducer_facts()}, _render_reducers)


def _render_reducers(report: dict[str, Any]) -> str:
    """The table of `ff-run reducers`."""
    names = ("reducer", "reads", "counts", "tokens", "choice", "from", "paper")
    rows = [
        (
            row["name"], ", ".join(row["inputs"]) or "labels", "exact" if row["static"] else "by the scores",
            "merged, dropped" if row["merges"] else "dropped",
            "of the video" if row["query_agnostic"] else "of the question, too", row["origin"], row["paper"],
        )
        for row in report["reducers"]
    ]  # fmt: skip
    return console.table(names, rows)


def show_page(
    pipeline: Pipeline, name: str, question: PromptOptions, output: Path, compare: bool | None, open_it: bool
) -> None:
    """Answer a question, write its page, say in a few lines what is on it, and open it where that is wanted."""
    from framefusion.runtime.view import view
    from framefusion.runtime.view.page import check_writable, write_page

    check_writable(output)
    pipeline.limits = question.limits()
    request = question.request()
    sampling = question.sampling(pipeline.manifest)
    with activity("answering, and drawing the page", after=PATIENCE):
        watched = view.watch(pipeline, question.turns, question.files, request, sampling=sampling, compare=compare)
        size = write_page(view.facts(watched, pipeline, name), output)
    page = {"page": str(output), "bytes": size} | report(pipeline, watched.answer, request.cost)
    console.show(page, lambda facts: f"{facts['page']}: {console.in_bytes(size)}\n{facts['text']}\n{summary(facts)}")
    if open_it:
        import webbrowser  # it takes a tenth of a second, and few want it

        if not webbrowser.open(output.resolve().as_uri()):
            console.log(f"no browser could be started here: open {output} in one")


def main() -> None:
    """Entry point."""
    ff_run(prog_name="ff-run")
