"""What codes are calibrated on: films, or a file of questions, and what the model in floats answers to them.

    film.mp4 ---------> "Describe this video." about it
    questions.jsonl --> its questions about its films and pictures (export/evaluate/questions.py)

Answers belong to the rows that layers will be given: a decode step is a row of its own kind, and which token ends an
answer is decided there. Knows no weight and no code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BudgetError, PromptError, VideoError
from framefusion.export.check.verify import memory_of_check
from framefusion.export.eager.backend import EagerBackend
from framefusion.export.eager.pipeline import eager_loaders
from framefusion.export.evaluate.questions import read_questions
from framefusion.export.machine import available_memory
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.reduction.policy import Decision
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.bundle_files import sha256_of
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.media.video.animation import still_format
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Prompt, Turn, Visual, visuals_of

PROMPT = "Describe this video."
QUESTIONS = (".jsonl", ".json")
"""Endings of a file of questions; every other file is a film."""
SHORTEN = "leave it out, ask in fewer words, give shorter films, sample fewer frames"
"""What can be done about a prompt that is longer than the bundle takes."""
ANSWER = 32
"""Tokens of an answer at most."""
STREAMED_ANSWER = 4
"""The same where the model does not fit memory: each token reads all weights once more."""


@dataclass(frozen=True)
class CalibrationPrompt:
    """A conversation whose rows codes are chosen by.

    Attributes:
        turns: up to the answer.
        files: videos and images that they show, in order.
        name: for messages: the film, or the file of questions and the question's line or id.
    """

    turns: tuple[Turn, ...]
    files: tuple[Path, ...]
    name: str

    @property
    def films(self) -> tuple[Path, ...]:
        """The videos among the files."""
        return tuple(
            file for kind, file in zip(visuals_of(self.turns), self.files, strict=True) if kind is Visual.VIDEO
        )


@dataclass(frozen=True, eq=False)
class CalibrationRows:
    """What a conversation puts into the decoder, its answer behind it.

    Attributes:
        prompt: of S tokens, the last `answer` of which are the answer's.
        rows: of these tokens.
        request: how it is reduced.
        answer: tokens of the answer that are fed back; the last one that is chosen is not.
        decisions: of the reduction, by the model in floats.
        logits: of the model in floats, which each token is chosen from.  [answer + 1, V], or [0, V] where they are not
            wanted: with a large vocabulary they are larger than the rows
    """

    prompt: Prompt
    rows: TokenRows
    request: Request
    answer: int
    decisions: tuple[Decision, ...]
    logits: NDArray[np.float32]


def read_prompts(paths: Sequence[Path]) -> list[CalibrationPrompt]:
    """The conversations of films and files of questions, in order.

    Raises:
        EvaluationError: a file of questions is none.
        VideoError: a picture is given as a film.
    """
    found = []
    for path in paths:
        if path.suffix.lower() in QUESTIONS:
            for question in read_questions(path):
                files = tuple(file for _, file in question.visuals)
                name = f"question {question.name} of {path}"
                found.append(CalibrationPrompt(tuple(question.turns(None)), files, name))
        else:
            _refuse_picture(path)
            found.append(CalibrationPrompt((Turn("user", (Visual.VIDEO, PROMPT)),), (path,), str(path)))
    return found


def _refuse_picture(path: Path) -> None:
    """Say where a picture belongs; what cannot be read is said where it is read.

    Raises:
        VideoError: the file is one.
    """
    with suppress(OSError):
        if path.is_file() and (still := still_format(path)):
            raise VideoError(
                f"{path} is an image ({still}), and --calibrate takes films and files of questions: ask about it in a "
                'file of questions, as one of the "images" of a line'
            )


def films_of(paths: Sequence[Path], purpose: str) -> tuple[Path, ...]:
    """The films that `paths` name or ask about, each once; `purpose` is for the message.

    Raises:
        BudgetError: there is none.
        EvaluationError: a file of questions is none.
    """
    films = tuple(dict.fromkeys(film for prompt in read_prompts(paths) for film in prompt.films))
    if not films:
        raise BudgetError(f"--calibrate names no film, and {purpose} by films: give questions about videos, or films")
    return films


def tokens_digest(items: Sequence[CalibrationRows]) -> str:
    """SHA-256 over the tokens of all prompts and their answers: what codes depend on beside films and options."""
    found = hashlib.sha256()
    for item in items:
        found.update(np.int64(item.prompt.token_ids.size).tobytes() + item.prompt.token_ids.astype(np.int64).tobytes())
    return found.hexdigest()


def file_digests(prompts: Sequence[CalibrationPrompt]) -> dict[Path, str]:
    """SHA-256 of each file, each once and in order, by which the manifest names them.

    Raises:
        VideoError: one cannot be read.
    """
    names = dict.fromkeys(file for prompt in prompts for file in prompt.files)
    try:
        return {file: sha256_of(file) for file in names}
    except OSError as error:
        raise VideoError(f"{error.filename} cannot be read ({error.strerror}): give a film") from None


def answer_tokens(floats: BuildPlan) -> tuple[int, bool]:
    """Most tokens of an answer, and whether weights are read from the disk as they are used."""
    streamed = memory_of_check(floats) > available_memory()
    return (STREAMED_ANSWER if streamed else ANSWER), streamed


def answered_rows(
    floats: BuildPlan,
    bundle: Bundle,
    prompts: Sequence[CalibrationPrompt],
    doing: Callable[[str], object],
    compared: Collection[int] | None = None,
) -> list[CalibrationRows]:
    """What each conversation puts into the decoder, with the answer of the model in floats behind it.

    Args:
        floats: the plan of that model, with the bundle's reduction.
        bundle: of this plan, without graphs.
        prompts: conversations.
        doing: called with what runs now.
        compared: numbers of those whose logits are kept; None keeps all.

    Raises:
        VideoError: a film or picture cannot be read.
        PromptError: a conversation is longer than the bundle takes.
    """
    tokens, streamed = answer_tokens(floats)
    pipeline = Pipeline(bundle, EagerBackend(eager_loaders(floats, streamed=streamed)))
    found = []
    for number, prompt in enumerate(prompts):
        doing(f"answer {number + 1} of {len(prompts)}")
        with named(prompt.name):
            item = _answered(pipeline, prompt, tokens)
        is_compared = compared is None or number in compared
        found.append(item if is_compared else replace(item, logits=item.logits[:0].copy()))
    return found


@contextmanager
def named(name: str) -> Iterator[None]:
    """Say of errors of a conversation which one it is, unless they do."""
    try:
        yield
    except (PromptError, VideoError) as error:
        if name in str(error):
            raise
        raise type(error)(f"{name}: {error}") from None


def _answered(pipeline: Pipeline, conversation: CalibrationPrompt, tokens: int) -> CalibrationRows:
    """A conversation with its answer."""
    turns = conversation.turns
    stopwatch = Stopwatch()
    # 1. what it shows, through the tower
    visuals = pipeline.read_visuals(turns, conversation.files, pipeline.manifest.sampling, stopwatch)
    prompt = pipeline.prompt(turns, visuals, SHORTEN)
    features = [pipeline.encode_visual(patches) for patches in visuals]
    rows = pipeline.embed(prompt, features)
    # 2. the likeliest answer, at the bundle's own cost
    greedy = replace(pipeline.manifest.generation, do_sample=False)
    request = pipeline.with_default_cost(Request(tokens, generation=greedy), visuals_of(turns))
    request = pipeline.clamp_new_tokens(request, prompt)
    decisions: list[Decision] = []
    prefilled = pipeline.prefill(prompt, rows, request, stopwatch, observer=decisions.append)
    steps = pipeline.decode(prompt, prefilled, request, stopwatch, logits=True)
    chosen = [(step.token_id, step.logits) for step in steps if step.token_id is not None and step.logits is not None]
    # 3. its tokens behind the prompt, but for the last one, which is never fed back
    room = pipeline.manifest.limits.max_input_len - prompt.token_ids.size
    fed = [token for token, _ in chosen][: max(min(len(chosen) - 1, room), 0)]
    whole = prompt.followed_by(fed)
    logits = np.stack([np.asarray(scores, np.float32) for _, scores in chosen[: len(fed) + 1]])
    embedded = pipeline.embed(whole, features)
    return CalibrationRows(whole, embedded, replace(request, max_new_tokens=1), len(fed), tuple(decisions), logits)
