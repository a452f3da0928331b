"""`ff-run generate`: questions about films and pictures, each answer on its own. A film is read and encoded once.

The answers go to stdout as they come, all else to stderr. Knows no backend.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from framefusion.console import messages as console
from framefusion.console.help import option
from framefusion.console.layout import counted
from framefusion.console.terminal import PATIENCE, activity
from framefusion.errors import BackendError, FrameFusionError, PromptError, VideoError
from framefusion.reduction.budget import describe_cost
from framefusion.runtime.commands.flags import (
    FILE,
    PromptOptions,
    VisualCommand,
    answering_options,
    flagged_visuals,
    open_pipeline,
    running_flags,
    running_options,
    turns_of,
)
from framefusion.runtime.commands.question.prompt_text import read_prompt
from framefusion.runtime.commands.question.subjects import Subject, list_subjects

if TYPE_CHECKING:
    from framefusion.runtime.commands.question.shared_media import SharedMedia
    from framefusion.runtime.media.frame_sampling import FrameSampling
    from framefusion.runtime.pipeline import Pipeline
    from framefusion.runtime.request import Generation, Request

ISOLATED = (VideoError, PromptError, BackendError)
"""What one film or one question can cause: the others are answered all the same."""
PICTURES_ONLY = "a picture is kept whole unless --cost asks for less"
EXAMPLES = (
    "ff-run generate bundle -v clip.mp4 -p 'What happens?' --cost 0.3",
    "ff-run generate bundle clip.mp4 -p 'Who is it?' -p 'What happens?'",
    "ff-run generate bundle films/*.mp4 -p @question.txt --jsonl > answers.jsonl",
    "echo 'What is this?' | ff-run generate bundle -i photo.png -p - -q",
)


@click.command(cls=VisualCommand, examples=EXAMPLES)
@click.argument("bundle", type=FILE)
@click.argument("files", nargs=-1, type=FILE)
@answering_options
@running_options
@option("--quiet", "-q", is_flag=True, section="Output", help="Print the answers alone.")
@option("--verbose", is_flag=True, section="Output", help="Print every reduction, stage and the backend, too.")
@console.json_option
@console.json_lines_option
def generate(
    bundle: Path,
    files: tuple[Path, ...],
    videos: tuple[Path, ...],
    images: tuple[Path, ...],
    prompts: tuple[str, ...],
    system: str | None,
    each: bool,
    quiet: bool,
    verbose: bool,
    **flags: Any,
) -> None:
    """Answer questions about films and pictures with BUNDLE.

    FILES are films and pictures; several are asked about one by one, as the files of a folder and of a quoted pattern
    are. Each --prompt is answered by itself, and a film is read and encoded once for all of them.
    """
    # 1. What the flags say, before anything is opened.
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose contradict each other: leave one out")
    running = running_flags(flags)
    options = PromptOptions([], [], flags)
    request = options.request()
    subjects = list_subjects(flagged_visuals(videos, images), files, each)
    questions = [read_prompt(prompt) for prompt in prompts]
    # 2. The bundle.
    pipeline = open_pipeline(bundle, **running, quiet=quiet)
    pipeline.limits = options.limits()
    if pipeline.choice is not None and not (pipeline.choice.ordinary or quiet or verbose or console.wants_json()):
        console.log(pipeline.choice.text)
    # 3. Every question about everything; alone, its error is the command's.
    several = len(subjects) * len(questions) > 1
    output = _output(several, quiet, verbose)
    asking = _Asking(pipeline, request, options.sampling(pipeline.manifest), system, output)
    if not several and not console.wants_json_lines():
        asking.ask(asking.read(subjects[0]), questions[0])
        output.close()
        return
    failures = [failure for subject in subjects for failure in asking.ask_all(subject, questions)]
    output.close()
    # 4. What could not be answered was said where it happened, and the exit code says it again.
    if failures:
        count = len(subjects) * len(questions)
        if count > 1:
            console.log(f"error: {len(failures)} of {count} answers are missing: see above what each needs")
        click.get_current_context().exit(failures[0].exit_code)


@dataclass(frozen=True)
class _Shown:
    """A subject that was read: what its files are, and the warnings about them."""

    subject: Subject
    kinds: Sequence[str]
    media: SharedMedia
    warnings: Sequence[str]


class _Asking:
    """One bundle and how it is asked; each answer goes to the output as it comes."""

    def __init__(
        self, pipeline: Pipeline, request: Request, sampling: FrameSampling, system: str | None, output: _Output
    ) -> None:
        self._pipeline = pipeline
        self._request = request
        self._sampling = sampling
        self._system = system
        self._output = output

    def ask_all(self, subject: Subject, questions: Sequence[str]) -> list[FrameFusionError]:
        """Answer every question about one subject; returns what went wrong, each of it said."""
        try:
            shown = self.read(subject)
        except ISOLATED as error:
            self._output.fail(subject, questions, error)
            return [error] * len(questions)
        return [failure for question in questions if (failure := self._attempt(shown, question)) is not None]

    def _attempt(self, shown: _Shown, question: str) -> FrameFusionError | None:
        try:
            self.ask(shown, question)
        except ISOLATED as error:
            self._output.fail(shown.subject, [question], error)
            return error
        return None

    def read(self, subject: Subject) -> _Shown:
        """Read the files of a subject, once for all questions.

        Raises:
            VideoError, PromptError: see `SharedMedia`.
        """
        from framefusion.runtime.commands.question.shared_media import SharedMedia

        files = [path for _, path in subject.visuals]
        before = len(console.warned())
        with activity(f"reading {', '.join(subject.names)}", after=PATIENCE):
            kinds = subject.kinds()
            media = SharedMedia(self._pipeline, turns_of(kinds, "", self._system), files, self._sampling)
        return _Shown(subject, kinds, media, console.warned()[before:])

    def ask(self, shown: _Shown, question: str) -> None:
        """Answer one question.

        Raises:
            FrameFusionError: it cannot be answered.
        """
        from framefusion.runtime.request import Generation

        output = self._output
        before = len(console.warned())
        turns = turns_of(shown.kinds, question, self._system)
        with activity("answering", after=PATIENCE) as waiting:

            def print_piece(text: str) -> None:
                waiting.end()
                output.write(text)

            output.begin(shown.subject, question)
            steps = shown.media.stream(turns, self._request)
            answer = Generation.from_steps(steps, print_piece if output.streams else None)
        facts = report(self._pipeline, answer, self._request.cost)
        facts["warnings"] = [*shown.warnings, *facts["warnings"][before:]]
        output.show(shown.subject, question, facts, self._request)


# --- Where answers go -------------------------------------------------------------------------------------------------


class _Output:
    """Text on stdout as it comes, and a line or two about it on stderr."""

    streams = True

    def __init__(self, several: bool, quiet: bool, facts_text: Callable[[Mapping[str, Any], Request], str]) -> None:
        self._several = several
        self._quiet = quiet
        self._facts_text = facts_text
        self._blocks = 0
        self._open = False  # an answer has begun on stdout

    def begin(self, subject: Subject, question: str) -> None:
        """An answer comes: name what it is about where there are several."""
        if self._several and not self._quiet:
            console.write(("\n" if self._blocks else "") + f"==> {heading(subject, question)} <==")
        self._blocks += 1

    def write(self, text: str) -> None:
        """A piece of the answer."""
        console.write(text, newline=False)
        self._open = True

    def show(self, subject: Subject, question: str, facts: dict[str, Any], request: Request) -> None:
        """The answer is whole."""
        console.write("")
        self._open = False
        if not self._quiet:
            console.log(self._facts_text(facts, request))

    def fail(self, subject: Subject, questions: Sequence[str], error: FrameFusionError) -> None:
        """There is no answer to some questions, or only its beginning."""
        if self._open:
            console.write("")
            self._open = False
        message = str(error)
        if not any(message.startswith(name) for name in subject.names):
            message = f"{heading(subject, questions[0])}: {message}"
        console.log(f"error: {message}")

    def close(self) -> None:
        """All has been said."""


class _JsonOutput(_Output):
    """One object: the answer, or all of them under "answers"; with lines, one for each as soon as it is there."""

    streams = False

    def __init__(self, several: bool, lines: bool) -> None:
        super().__init__(several, True, brief)
        self._lines = lines
        self._answers: list[dict[str, Any]] = []

    def begin(self, subject: Subject, question: str) -> None:
        """Nothing is printed before an answer is whole."""

    def show(self, subject: Subject, question: str, facts: dict[str, Any], request: Request) -> None:
        """The answer as an object."""
        if self._lines or self._several:
            facts = {"files": subject.names, "prompt": question} | facts
        self._put(facts)

    def fail(self, subject: Subject, questions: Sequence[str], error: FrameFusionError) -> None:
        """An object in the place of each answer; a message on stderr, too."""
        super().fail(subject, questions, error)
        problem = {"kind": type(error).__name__, "message": str(error)}
        for question in questions:
            self._put({"files": subject.names, "prompt": question, "error": problem})

    def close(self) -> None:
        """Print what was not printed yet."""
        if not self._lines:
            console.write(json.dumps({"answers": self._answers} if self._several else self._answers[0]))

    def _put(self, facts: dict[str, Any]) -> None:
        if self._lines:
            console.write(json.dumps(facts))
        else:
            self._answers.append(facts)


def _output(several: bool, quiet: bool, verbose: bool) -> _Output:
    if console.wants_json():
        return _JsonOutput(several, console.wants_json_lines())
    return _Output(several, quiet, (lambda facts, _: summary(facts)) if verbose else brief)


def heading(subject: Subject, question: str) -> str:
    """What an answer is about, in a line."""
    first = question.strip().partition("\n")[0]
    shown = first if len(first) <= 60 else f"{first[:57]}..."
    return ": ".join(part for part in (", ".join(subject.names), shown) if part)


# --- What is said of an answer ----------------------------------------------------------------------------------------


def report(pipeline: Pipeline, answer: Generation, cost: float | None) -> dict[str, Any]:
    """The answer and how it came about, as plain values."""
    facts = answer.to_dict()
    requested = pipeline.manifest.reduction.cost if cost is None else cost
    whole = cost is None and bool(facts["visual_tokens"]) and facts["cost"]["reached"] == 1.0 > requested
    if whole:
        requested = 1.0  # pictures alone: `Stages.with_default_cost`
    cost_facts = {"asked": requested, "reached": facts["cost"]["reached"], "asked_text": describe_cost(requested)}
    cost_facts |= {"pictures_only": True} if whole else {}
    return facts | {
        "cost": cost_facts,
        "backend": None if pipeline.choice is None else pipeline.choice.facts | {"text": pipeline.choice.text},
        "warnings": console.warned(),
    }


def brief(facts: Mapping[str, Any], request: Request) -> str:
    """Two lines for people, and one for what did not go as it was asked: a reduction, or a default."""
    seconds = facts["seconds"]
    waited = sum(seconds.values()) - seconds.get("decode", 0.0)
    prompt = f"prompt: {facts['prompt_tokens']} tokens"
    if facts["visual_tokens"]:
        prompt += f", {facts['visual_tokens']} of them visual: {describe_cost(facts['cost']['reached'])}"
    new = len(facts["token_ids"])
    answer = f"answer: {counted(new, 'token')}, first after {waited:.2f} s"
    if facts["tokens_per_second"]:
        answer += f", then {facts['tokens_per_second']:.1f} a second"
    if facts["finish_reason"] == "length":
        answer += "; cut off by " + ("--max-new-tokens" if new == request.max_new_tokens else "the bundle's caches")
    lines = [prompt, answer]
    lines += [f"call {call['call']}: {call['outcome']}" for call in facts["reduction"] if call["outcome"]]
    if facts["cost"].get("pictures_only"):
        lines.append(PICTURES_ONLY)
    return "\n".join(lines)


def summary(facts: Mapping[str, Any]) -> str:
    """All of it, for people."""
    lines = [] if facts["backend"] is None else [facts["backend"]["text"]]
    lines.append(f"prompt: {facts['prompt_tokens']} tokens, {facts['visual_tokens']} of them visual")
    for call in facts["reduction"]:
        if call["outcome"]:
            lines.append(f"call {call['call']}: {call['outcome']}")
        if call["kind"] != "none":
            kept = describe_cost(call["visual_after"] / call["visual_before"])
            counts = f"{call['tokens_before']} -> {call['tokens_after']} tokens"
            lines.append(f"call {call['call']}: {call['kind']}, {counts} ({kept} of the visual)")
    if facts["visual_tokens"]:
        lines.append(f"cost: {describe_cost(facts['cost']['reached'])}; asked: {facts['cost']['asked_text']}")
    if facts["cost"].get("pictures_only"):
        lines.append(PICTURES_ONLY)
    lines.append("seconds: " + ", ".join(f"{stage} {spent:.3f}" for stage, spent in facts["seconds"].items()))
    new = len(facts["token_ids"])
    speed = facts["tokens_per_second"]
    lines.append(f"answer: {new} tokens, {facts['finish_reason']}, {speed:.1f} tokens/s")
    return "\n".join(lines)
