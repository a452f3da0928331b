"""A file of questions about videos and images, and when an answer to one is right. Knows no model, runs nothing.

One JSON object a line:

    video | images   path of a film, or list of paths of pictures; a relative one starts at the file's folder
    question         text, put behind the video or images
    answer           what is right: a text, or a list of texts that all are; with choices a choice or its letter
    choices          optional list: they are put to the model as A, B, ... and the answer is one of them
    type             optional word by which the report is split
    id               optional name for messages and answers; default: the number of the line
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from framefusion.errors import EvaluationError
from framefusion.runtime.media.sources import Source
from framefusion.runtime.text.prompt import Turn, Visual

KEYS = ("video", "images", "question", "answer", "choices", "type", "id")
UNTYPED = "all"
LETTER_ONLY = "Answer with the option's letter from the given choices directly."
_LETTER = re.compile(r"(?:the )?(?:answer|option)?(?: is)?:?\s*\(?([A-Z])(?:\)|[.:](?=\s|$)|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """A question of a file: media, text, and the answers that are right.

    Attributes:
        name: for messages and answers, unique in its file.
        type: by which the report is split.
        text: without the choices.
        answers: texts that are right; with choices the one choice that is.
        choices: what the model may choose among; empty for a free answer.
        visuals: kind and file of each video or image, in order.
    """

    name: str
    type: str
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    visuals: tuple[tuple[Visual, Path], ...] = ()

    @property
    def files(self) -> list[Source]:
        """Its videos and images in order, as the runtime reads them."""
        return [file for _, file in self.visuals]

    @property
    def key(self) -> str:
        """What tells this question from any other: its texts, and names, sizes and times of its files.

        Raises:
            EvaluationError: a file is gone.
        """
        identity = [self.text, *self.answers, *self.choices]
        for kind, file in self.visuals:
            try:
                stat = file.stat()
            except OSError as error:
                raise EvaluationError(f"{self.name}: {file} cannot be read ({error.strerror})") from None
            identity += [kind.value, str(file.resolve()), str(stat.st_size), str(stat.st_mtime_ns)]
        return key_of(identity)

    @property
    def prompt(self) -> str:
        """The text that the model reads: with choices a line for each, and what to answer with."""
        if not self.choices:
            return self.text
        letters = zip(string.ascii_uppercase, self.choices, strict=False)
        options = [f"{letter}. {choice}" for letter, choice in letters]
        return "\n".join([self.text, *options, LETTER_ONLY])

    def turns(self, system: str | None = None) -> list[Turn]:
        """The conversation up to the answer."""
        before = [] if system is None else [Turn("system", (system,))]
        return [*before, Turn("user", (*(kind for kind, _ in self.visuals), self.prompt))]

    def is_right(self, answer: str) -> bool:
        """Whether a model's text is the answer."""
        if self.choices:
            return choice_of(answer, self.choices) == self.answers[0]
        return normalised(answer) in map(normalised, self.answers)


def key_of(texts: Sequence[str]) -> str:
    """Sixteen hexadecimal digits of a hash over some texts."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def normalised(text: str) -> str:
    """Without case, white space at the ends and in runs, and punctuation at the ends."""
    return " ".join(text.casefold().split()).strip(string.punctuation + " ")


def choice_of(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that a text names: written out, or by a letter that stands alone, as in B, (B), B. or "answer: B".

    None where it names none of them, which counts as wrong.
    """
    written_out = {normalised(choice): choice for choice in choices}
    if normalised(answer) in written_out:
        return written_out[normalised(answer)]
    letter = _LETTER.match(answer.strip())
    place = ord(letter[1].upper()) - ord("A") if letter else len(choices)
    return choices[place] if place < len(choices) else None


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """All questions of a file, or the first `limit`.

    Raises:
        EvaluationError: the file cannot be read or holds no question, or a line, named by its number, is no question.
    """
    try:
        if path.exists() and not path.is_file():  # a FIFO would be waited for
            raise OSError("it is no plain file")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise EvaluationError(f"{path} cannot be read ({reason}): give a file of one JSON object a line") from None
    questions = list(_questions(path, lines, limit))
    if not questions:
        raise EvaluationError(f"{path} holds no question: give one JSON object a line")
    return questions


def _questions(path: Path, lines: Sequence[str], limit: int | None) -> Iterator[Question]:
    names: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if limit is not None and len(names) == limit:
            return
        question = _question(path, number, line)
        if question.name in names:
            raise _wrong(path, number, f"id {question.name!r} is that of line {names[question.name]}, too")
        names[question.name] = number
        yield question


def _question(path: Path, number: int, line: str) -> Question:
    """One line, checked."""
    wrong = partial(_wrong, path, number)
    try:
        row = json.loads(line)
    except ValueError as error:
        raise wrong(f"no JSON ({error})") from None
    if not isinstance(row, dict):
        raise wrong(f"holds a {type(row).__name__}, expected an object")
    unknown = sorted(set(row) - set(KEYS))
    if unknown:
        raise wrong(f"unknown key {unknown[0]!r}; known are {', '.join(KEYS)}")
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise wrong(f"question is {text!r}, expected a text")
    kind = row.get("type", UNTYPED)
    if not isinstance(kind, str) or not kind:
        raise wrong(f"type is {kind!r}, expected a word")
    choices = _texts(row.get("choices", []))
    if choices is None or (choices and len(set(map(normalised, choices))) < max(2, len(choices))):
        raise wrong(f"choices are {row['choices']!r}, expected two or more different texts")
    if len(choices) > len(string.ascii_uppercase):
        raise wrong(f"has {len(choices)} choices, at most {len(string.ascii_uppercase)} have a letter")
    visuals = tuple(_visuals(path, number, row))
    return Question(str(row.get("id", number)), kind, text, _answers(path, number, row, choices), choices, visuals)


def _answers(path: Path, number: int, row: Mapping[str, Any], choices: tuple[str, ...]) -> tuple[str, ...]:
    value = row.get("answer")
    answers = _texts([value] if isinstance(value, str) else value)
    if not answers or not all(map(normalised, answers)):
        raise _wrong(path, number, f"answer is {value!r}, expected a text or a list of texts")
    if not choices:
        return answers
    chosen = choice_of(answers[0], choices)
    if len(answers) > 1 or chosen is None:
        raise _wrong(path, number, f"answer {value!r} is none of the choices: give one of them or its letter")
    return (chosen,)


def _visuals(path: Path, number: int, row: Mapping[str, Any]) -> Iterator[tuple[Visual, Path]]:
    video = row.get("video")
    images = row.get("images")
    if (video is None) == (images is None):
        raise _wrong(path, number, "has video and images, give one" if video else "has neither video nor images")
    names = _texts([video] if images is None else images)
    if not names:
        raise _wrong(path, number, f"video is {video!r}" if images is None else f"images are {images!r}")
    for name in names:
        file = path.parent / name
        if not file.is_file():
            raise _wrong(path, number, f"{file} is missing: a relative path starts at the folder of the questions")
        yield (Visual.VIDEO if images is None else Visual.IMAGE), file


def _texts(value: object) -> tuple[str, ...] | None:
    """A list of texts as a tuple; None for anything else."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return None


def _wrong(path: Path, number: int, what: str) -> EvaluationError:
    return EvaluationError(f"{path}, line {number}: {what}")
