"""What lmms-eval asks, as the answerers of an evaluation take it; what they cannot do is refused by name.

Messages of lmms-eval's chat protocol are read by their attributes (role, content; type, text, url), the settings of a
generation as its tasks write them. Imports nothing of lmms-eval.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from framefusion.errors import EvaluationError
from framefusion.export.evaluate.questions import Question, key_of
from framefusion.runtime.media.sources import Source
from framefusion.runtime.text.prompt import Turn, Visual


@dataclass(frozen=True)
class TaskQuestion(Question):
    """One document of a task: a conversation that stands as it is, and what it shows. The task knows what is right."""

    conversation: tuple[Turn, ...] = ()
    sources: tuple[Source, ...] = ()

    @property
    def files(self) -> list[Source]:
        """See `Question.files`."""
        return list(self.sources)

    @property
    def key(self) -> str:
        """By the words and the document's name: what it shows may be no file."""
        return key_of([self.name, *(str(part) for turn in self.conversation for part in turn.parts)])

    def turns(self, system: str | None = None) -> list[Turn]:
        """The conversation; a system prompt takes the place of the task's own."""
        if system is None:
            return list(self.conversation)
        return [Turn("system", (system,)), *(turn for turn in self.conversation if turn.role != "system")]


@dataclass(frozen=True)
class Decoding:
    """How long an answer may be, and the texts at which it ends."""

    max_new_tokens: int
    until: tuple[str, ...] = ()

    def cut(self, said: str) -> str:
        """The answer up to the first text that ends it."""
        return re.split("|".join(map(re.escape, self.until)), said, maxsplit=1)[0] if self.until else said


def question_of(name: str, messages: Iterable[Any]) -> TaskQuestion:
    """A document's messages.

    Args:
        name: task, split and number of the document, for error messages.
        messages: the last of them is the user's; it alone shows something.

    Raises:
        EvaluationError: sound, a part of a film by its times, a film or picture of a kind that is not known, something
            shown in an earlier message, or no question at all.
    """
    turns = list[Turn]()
    sources = list[Source]()
    for message in messages:
        parts: list[str | Visual] = []
        for content in message.content:
            if content.type == "text":
                parts.append(content.text)
            else:
                parts.append(_visual(name, content.type))
                sources.append(_source(name, content))
        texts = [part for part in parts if isinstance(part, str)]
        turns.append(Turn(message.role, tuple(parts) if len(texts) < len(parts) else ("\n".join(texts),)))
    if not turns or turns[-1].role != "user":
        raise EvaluationError(f"{name} does not end with a message of the user: such a task cannot be answered")
    if any(isinstance(part, Visual) for turn in turns[:-1] for part in turn.parts):
        raise EvaluationError(f"{name} shows something before its last message: use --num_fewshot 0")
    asked = "\n".join(part for part in turns[-1].parts if isinstance(part, str))
    return TaskQuestion(name, name.split("/", maxsplit=1)[0], asked, (), (), (), tuple(turns), tuple(sources))


def _visual(name: str, kind: str) -> Visual:
    if kind not in (Visual.VIDEO.value, Visual.IMAGE.value):
        raise EvaluationError(f"{name} holds {kind}, which the model cannot take: choose a task of videos or images")
    return Visual(kind)


def _source(name: str, content: Any) -> Source:
    """A file, or pixels that lmms-eval has read."""
    told = content.url
    times = [getattr(content, side, None) for side in ("start_time", "end_time")]
    if isinstance(told, Mapping):
        times += [told.get(side) for side in ("video_start", "video_end")]
        told = told.get("path") or told.get("url") or told.get("video")
    if any(time is not None for time in times):
        raise EvaluationError(f"{name} shows a part of a film by its times: cut the film before, whole ones are read")
    if isinstance(told, (Image, np.ndarray)):
        return told
    if not isinstance(told, (str, Path)):
        raise EvaluationError(f"{name} shows a {type(told).__name__}: a path, a PIL image or an array of uint8 is read")
    if not Path(told).is_file():
        raise EvaluationError(f"{name} shows {told}, which is no file of this machine: download the task's media")
    return Path(told)


def decoding_of(told: Mapping[str, Any], max_new_tokens: int) -> Decoding:
    """A task's generation_kwargs.

    Args:
        told: keys that it does not know are left to others, as lmms-eval's models do.
        max_new_tokens: where the task does not say.

    Raises:
        EvaluationError: sampling or beams: decoding is greedy.
    """
    samples = told.get("do_sample", bool(told.get("temperature")))
    if samples or (told.get("num_beams") or 1) > 1:
        raise EvaluationError(
            f"the task asks for sampling or beams ({dict(told)}), decoding is greedy: "
            "give --gen_kwargs do_sample=False,temperature=0,num_beams=1"
        )
    most = told.get("max_new_tokens") or max_new_tokens
    until = told.get("until") or ()
    return Decoding(int(most), tuple(filter(None, _texts(until))))


def _texts(told: str | Sequence[str]) -> Sequence[str]:
    return [told] if isinstance(told, str) else told
