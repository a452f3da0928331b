"""Requests of lmms-eval, as the answerers of an evaluation take it; what they cannot do is refused by name.

Messages of lmms-eval's chat protocol are read by their attributes (role, content; type, text, url), the settings of a
generation as its tasks write them. Imports nothing of lmms-eval.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image

from framefusion.errors import EvaluationError
from framefusion.export.evaluate.questions import Question, key_of
from framefusion.runtime.media.sources import Source
from framefusion.runtime.text.prompt import Turn, Visual


class ChatContent(Protocol):
    """A part of a message: text by `text`, else a file or pixels by `url`."""

    type: str  # "text", or what it shows
    text: str
    url: Any


class ChatMessage(Protocol):
    """A message of lmms-eval's chat protocol."""

    role: str
    content: Sequence[ChatContent]


@dataclass(frozen=True)
class TaskQuestion(Question):
    """A document of a task: a conversation that stands as it is, and its media. The task knows what is right."""

    conversation: tuple[Turn, ...] = ()
    sources: tuple[Source, ...] = ()

    @property
    def files(self) -> list[Source]:
        """See `Question.files`."""
        return list(self.sources)

    @property
    def key(self) -> str:
        """By the texts and the document's name: its media may be no files."""
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

    def cut(self, text: str) -> str:
        """The answer up to the first text that ends it."""
        if not self.until:
            return text
        return re.split("|".join(map(re.escape, self.until)), text, maxsplit=1)[0]


def question_of(name: str, messages: Iterable[ChatMessage]) -> TaskQuestion:
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
    return TaskQuestion(
        name=name,
        type=name.split("/", maxsplit=1)[0],
        text="\n".join(part for part in turns[-1].parts if isinstance(part, str)),
        answers=(),
        conversation=tuple(turns),
        sources=tuple(sources),
    )


def _visual(name: str, kind: str) -> Visual:
    if kind not in (Visual.VIDEO.value, Visual.IMAGE.value):
        raise EvaluationError(f"{name} holds {kind}, which the model cannot take: choose a task of videos or images")
    return Visual(kind)


def _source(name: str, content: ChatContent) -> Source:
    """A file, or pixels that lmms-eval has read."""
    source = content.url
    times = [getattr(content, side, None) for side in ("start_time", "end_time")]
    if isinstance(source, Mapping):
        times += [source.get(side) for side in ("video_start", "video_end")]
        source = source.get("path") or source.get("url") or source.get("video")
    if any(time is not None for time in times):
        raise EvaluationError(f"{name} shows a part of a film by its times: cut the film before, whole ones are read")
    if isinstance(source, (Image, np.ndarray)):
        return source
    if not isinstance(source, (str, Path)):
        raise EvaluationError(
            f"{name} shows a {type(source).__name__}: a path, a PIL image or an array of uint8 is read"
        )
    if not Path(source).is_file():
        raise EvaluationError(f"{name} shows {source}, which is no file of this machine: download the task's media")
    return Path(source)


def decoding_of(generation_kwargs: Mapping[str, Any], max_new_tokens: int) -> Decoding:
    """A task's generation_kwargs.

    Args:
        generation_kwargs: keys that it does not know are left to others, as lmms-eval's models do.
        max_new_tokens: where the task does not say.

    Raises:
        EvaluationError: sampling or beams: decoding is greedy.
    """
    samples = generation_kwargs.get("do_sample", bool(generation_kwargs.get("temperature")))
    if samples or (generation_kwargs.get("num_beams") or 1) > 1:
        raise EvaluationError(
            f"the task asks for sampling or beams ({dict(generation_kwargs)}), decoding is greedy: "
            "give --gen_kwargs do_sample=False,temperature=0,num_beams=1"
        )
    most = generation_kwargs.get("max_new_tokens") or max_new_tokens
    until = generation_kwargs.get("until") or ()
    return Decoding(int(most), tuple(filter(None, _texts(until))))


def _texts(until: str | Sequence[str]) -> Sequence[str]:
    return [until] if isinstance(until, str) else until
