"""`ff-run chat`: a conversation about films and pictures. A film is read and encoded once and stays in the caches.

Answers go to stdout as they come, all else to stderr; so it works piped, a line a message. Knows no flag and no bundle.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from framefusion.console import messages as console
from framefusion.console.terminal import PATIENCE, activity
from framefusion.errors import BudgetError, FrameFusionError, PromptError, VideoError
from framefusion.reduction.budget import describe_cost
from framefusion.runtime.pipeline import Pipeline, dense_pipeline, dense_request, requested_cost
from framefusion.runtime.request import Generation, PrefillReport, Request, Step
from framefusion.runtime.text.prompt import Turn, Visual

if TYPE_CHECKING:
    from framefusion.runtime.media.frame_sampling import FrameSampling
    from framefusion.runtime.session import Session

PROMPT = "> "
ROUNDS = 2  # of a comparison
HELP = """\
/video FILE     show a film with your next message
/image FILE     show a picture with your next message
/cost SHARE     keep this share of the computation over visual tokens of what is shown from now on, in (0, 1]
/compare        answer the last message again, reduced and with every token, and show both
/tokens         what each turn put into the caches
/history        what was said
/new            begin a new conversation
/quit           leave; so does the end of the input
//...           a message that begins with a slash"""


@dataclass
class Chat:
    """One conversation on a terminal or a pipe.

    Attributes:
        pipeline: of the bundle.
        request: how every message is answered; /cost changes it.
        sampling: of frames of every film.
        system: system prompt of the conversation, None for the family's.
        shown: films and pictures that the next message shows, in order.
        interactive: somebody types: show a prompt, and go on after an error.
    """

    pipeline: Pipeline
    request: Request
    sampling: FrameSampling
    system: str | None = None
    shown: list[tuple[Visual, Path]] = field(default_factory=list)
    interactive: bool = False

    def __post_init__(self) -> None:
        self.session: Session = self._new_session()

    def run(self, lines: Iterator[str]) -> None:
        """Take messages and commands until they end.

        Raises:
            FrameFusionError: a message could not be answered, and nobody is there to mend it.
        """
        for line in lines:
            text = line.strip()
            if text in ("/quit", "/exit"):
                return
            try:
                self.take(text)
            except FrameFusionError as error:
                if not self.interactive:
                    raise
                console.log(f"error: {error}")

    def take(self, text: str) -> None:
        """One line: a command, or a message to the model.

        Raises:
            PromptError: no such command, or its argument is missing.
            FrameFusionError: see `Session.stream`; the conversation is as before.
        """
        if not text:
            return
        if not text.startswith("/"):
            self.say(text)
        elif text.startswith("//"):
            self.say(text[1:])
        else:
            name, _, argument = text[1:].partition(" ")
            command = self._commands().get(name)
            if command is None:
                known = ", ".join(f"/{known}" for known in self._commands())
                raise PromptError(f"/{name} is unknown, known are {known}, /quit: write //{name} to say it")
            command(argument.strip())

    def say(self, text: str) -> None:
        """Put a message with what is to be shown, and print the answer as it comes; Ctrl-C stops the answer alone."""
        # 1. The message is a turn of its own; a system prompt stands before the first.
        visuals = tuple(kind for kind, _ in self.shown)
        turns = [Turn("user", (*visuals, text))]
        if self.system is not None and not self.session.turns:
            turns.insert(0, Turn("system", (self.system,)))
        # 2. Stream it: the session prefills what is new and keeps it once the answer is whole.
        steps = self.session.stream(turns, [file for _, file in self.shown], self.request)
        taken: list[Step] = []
        try:
            with activity("answering", after=PATIENCE) as waiting:
                for step in steps:
                    taken.append(step)
                    if step.text:
                        waiting.end()
                    console.write(step.text, newline=False)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            steps.close()
            console.write("")
            console.log("stopped: the message is not part of the conversation")
            return
        # 3. What was shown is in the caches now.
        self.shown.clear()
        console.write("")
        console.log(summary(taken))

    # --- Commands ---------------------------------------------------------------------------------------------------

    def _commands(self) -> Mapping[str, Callable[[str], None]]:
        return {
            "video": lambda name: self._show(Visual.VIDEO, name),
            "image": lambda name: self._show(Visual.IMAGE, name),
            "cost": self._cost,
            "compare": self._compare,
            "tokens": self._tokens,
            "history": self._history,
            "new": self._restart,
            "help": lambda _: console.log(HELP),
        }

    def _show(self, kind: Visual, name: str) -> None:
        path = Path(name).expanduser()
        if not name or not path.is_file():
            raise VideoError(f"/{kind.value} {name}: there is no such file; give the path of one")
        self.shown.append((kind, path))
        console.log(f"{path.name} is shown with your next message")

    def _cost(self, share: str) -> None:
        if share:
            try:
                cost = float(share)
            except ValueError:
                raise BudgetError(f"/cost {share} is no number: give a share in (0, 1], such as /cost 0.3") from None
            if not 0 < cost <= 1:
                raise BudgetError(f"/cost {share} is out of range: give a share in (0, 1], such as /cost 0.3")
            reduction = self.pipeline.manifest.reduction
            if reduction.mode != "adaptive" and cost != reduction.cost:
                raise BudgetError(
                    f"/cost {share}: the cost of this bundle, {reduction.cost:g}, is built in (--reduction "
                    f"{reduction.mode}): leave it, or build with --reduction adaptive"
                )
            self.request = replace(self.request, cost=cost)
        cost = requested_cost(self.pipeline.manifest, self.request)
        console.log(f"{describe_cost(cost)} of the visual tokens of what is shown from now on")

    def _compare(self, _: str) -> None:
        """Both from the start and without the caches, over the same encoded films: like with like."""
        turns = self.session.turns[:-1]
        if not turns:
            raise PromptError("/compare answers the last message again, and there is none: ask something first")
        if requested_cost(self.pipeline.manifest, self.request) == 1.0:
            raise BudgetError("/compare at cost 1 has nothing to compare, all tokens are kept: give a /cost below 1")
        # 1. What both need is done once: files, patches, tower, embedding.
        pipeline = self.pipeline
        prompt, rows = pipeline.read(turns, self.session.files, sampling=self.sampling)
        # 2. In turns, so that what else the machine does meets both; the faster of each says what it takes.
        ways = {
            "reduced": (pipeline, self.request),
            "every token": (dense_pipeline(pipeline), dense_request(pipeline.manifest, self.request)),
        }
        answers: dict[str, list[Generation]] = {name: [] for name in ways}
        with activity("answering both ways, in turns", after=PATIENCE):
            for _round in range(ROUNDS):
                for name, (way, request) in ways.items():
                    answers[name].append(way.answer(prompt, rows, request))
        # 3. Show them beside each other.
        table = [
            (name, given[0].kv_lengths[-1], f"{min(map(prefill_seconds, given)):.3f} s", given[0].text.strip())
            for name, given in answers.items()
        ]
        console.write(console.table(("", "tokens in the last layer", "prefill", "answer"), table))

    def _tokens(self, _: str) -> None:
        names = ("turn", "tokens", "visual", "from the caches", "in the last layer")
        rows = [
            (turn, report.prompt_tokens, report.visual_tokens, report.reused_tokens, report.kv_lengths[-1])
            for turn, report in enumerate(self.session.records, 1)
        ]
        console.write(console.table(names, rows))
        console.log(f"caches: {console.in_bytes(self.session.cache_bytes)}")

    def _history(self, _: str) -> None:
        for turn in self.session.turns:
            text = " ".join(part if isinstance(part, str) else f"[{part.value}]" for part in turn.parts)
            console.write(f"{turn.role}: {text.strip()}")

    def _restart(self, _: str) -> None:
        self.session = self._new_session()
        self.shown.clear()
        console.log("a new conversation")

    def _new_session(self) -> Session:
        return self.pipeline.session(sampling=self.sampling)


def summary(steps: Sequence[Step]) -> str:
    """A line about an answer: what was prefilled and kept, how long the first token took, and the speed behind it."""
    report = prefill_of(steps)
    end = steps[-1]
    waited = sum(steps[0].seconds.values())
    tokens = sum(step.token_id is not None for step in steps)
    seconds = end.seconds.get("decode", 0.0)
    facts = [f"{report.prompt_tokens} tokens"]
    if report.reused_tokens:
        facts.append(f"{report.reused_tokens} of them from the caches")
    facts.append(f"{report.kv_lengths[-1]} in the last layer")
    if report.restart is not None:
        facts.append(f"all prefilled afresh: {report.restart}")
    facts.append(f"first token after {waited:.2f} s")
    if tokens > 1 and seconds > 0:
        facts.append(f"{(tokens - 1) / seconds:.1f} tokens/s")
    return ", ".join(facts)


def prefill_of(steps: Sequence[Step]) -> PrefillReport:
    """What the first step of an answer says of its prefill."""
    report = steps[0].prefill
    assert report is not None
    return report


def prefill_seconds(answer: Generation) -> float:
    """Seconds from the rows of a prompt to the logits of its first new token."""
    return sum(answer.seconds.get(stage, 0.0) for stage in ("prefill", "reduction"))


def typed_lines() -> Iterator[str]:
    """Lines as somebody types them, with the keys of readline where Python has it; ends at Ctrl-D or Ctrl-C."""
    with suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  (input() uses it once it is there)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input(PROMPT)
    console.log("")


def piped_lines() -> Iterator[str]:
    """Lines of standard input."""
    yield from sys.stdin
