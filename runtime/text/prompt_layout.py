"""A conversation laid out: turns to token ids, with the place of every visual token, its position and its label.

Knows the layout of a prompt, never a pixel: how a video stands in it, the video's pieces say (visual_input.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError, PromptError
from framefusion.reduction import tracks
from framefusion.runtime.media.visual_input import Piece, Rows, Token, VisualInput
from framefusion.runtime.text.positions import mrope_positions
from framefusion.runtime.text.prompt import FIRST_EXTRA, ROW, Prompt, PromptTemplate, Turn, Visual, visuals_of
from framefusion.runtime.text.tokenizer import Tokenizer


def build_prompt(
    template: PromptTemplate,
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    visuals: Sequence[VisualInput],
    extra: Sequence[str] = (),
) -> Prompt:
    """Lay out the turns, with the pieces of each visual where it is shown.

    Args:
        template: the chat layout.
        tokenizer: of the bundle.
        turns: what was said.
        visuals: what the turns show, in their order.
        extra: names of learned rows that pieces may use as tokens.
    """
    shown = visuals_of(turns)
    if not turns:
        raise PromptError("the conversation has 0 turns, it needs 1 or more: give a prompt")
    if len(shown) != len(visuals):
        raise PromptError(
            f"the conversation shows {len(shown)} video(s) and image(s), {len(visuals)} were given: give one for each"
        )
    template.check(tokenizer)
    writer = _Writer(tokenizer, extra)
    for part in _lay_out(template, turns):
        if isinstance(part, int):
            writer.show(visuals[part], part)
        elif isinstance(part, str):
            writer.template(part)
        elif isinstance(part, _Separator):
            writer.separate(part.text)
        elif part is _BEGIN:
            writer.begin_turn()
        elif part is _END:
            writer.end_turn(template.strip)
        elif isinstance(part, _PlainText):
            writer.said(part.text)
    return writer.prompt()


@dataclass(frozen=True)
class _PlainText:
    """Text of a user or of an answer, in which control tokens do not count."""

    text: str


@dataclass(frozen=True)
class _Separator:
    """Text between two parts of a turn."""

    text: str


_BEGIN = object()
_END = object()


def _lay_out(template: PromptTemplate, turns: Sequence[Turn]) -> Iterable[str | int | _PlainText | _Separator | object]:
    """Template text, users' text and numbers of visuals, in order."""
    numbers = itertools.count()
    if template.default_system and turns[0].role != "system":
        turns = [Turn("system", (template.default_system,)), *turns]
    yield template.begin
    for turn in turns:
        if turn.role not in template.turns:
            raise PromptError(f"this model has no {turn.role} turn: use {', '.join(template.turns)}")
        layout = template.turns[turn.role]
        parts = [(part, -1 if isinstance(part, str) else next(numbers)) for part in turn.parts]
        if template.visuals_first:
            parts.sort(key=lambda numbered: template.rank(numbered[0]))
        if template.strip:
            parts = _without_leading_space(parts)
        yield layout.prefix
        yield _BEGIN
        for index, (part, number) in enumerate(parts):
            if index:
                yield _Separator(template.part_separator)
            if isinstance(part, str):
                yield layout.text_prefix
                yield _PlainText(part)
            else:
                yield number
                yield template.after_visual
        yield _END
        yield layout.suffix
    yield template.generation_prefix


def _without_leading_space(parts: Sequence[tuple[str | Visual, int]]) -> list[tuple[str | Visual, int]]:
    """Parts of a turn without the white space that it begins with, which may be whole parts."""
    for first, (part, number) in enumerate(parts):
        if not isinstance(part, str):
            return list(parts[first:])
        if part.strip():
            return [(part.lstrip(), number), *parts[first + 1 :]]
    return []


class _Writer:
    """Collects the tokens of a prompt; neighbouring texts are tokenized as one, as if typed together."""

    def __init__(self, tokenizer: Tokenizer, extra: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._extra = {name: FIRST_EXTRA - k for k, name in enumerate(extra)}
        self._pending: list[str | int] = []  # text and control tokens, not tokenized yet
        self._turn = 0  # first pending piece of this turn
        self._ids: list[NDArray[np.int64]] = []
        self._labels: list[NDArray[np.int64]] = []
        self._spans: list[int | NDArray[np.int64]] = []  # see mrope_positions
        self._rows: list[tuple[int, NDArray[np.int64]]] = []  # the number of a visual, places of some of its rows
        self._length = self._first_label = 0
        self._joint = self._pending_label = tracks.TEXT  # of the token behind a visual; of the first pending token

    def template(self, text: str) -> None:
        """Write text of the layout, in which control tokens count."""
        if text:
            self._joint = tracks.TEXT
        self._pending += self._tokenizer.split_template(text)

    def separate(self, text: str) -> None:
        """Text between two parts of a turn; its first token may belong to the video before it."""
        if text and not self._pending:
            self._pending_label = self._joint
        self.template(text)

    def said(self, text: str) -> None:
        """Write text of a user, in which they do not."""
        self._pending.append(text)

    def begin_turn(self) -> None:
        """What comes now is said in a turn."""
        self._turn = len(self._pending)

    def end_turn(self, strip: bool) -> None:
        """The turn is over; the white space that it ends with may be left out, a visual's own too."""
        while strip and len(self._pending) > self._turn:
            last = self._pending.pop()
            kept = last.rstrip() if isinstance(last, str) else last
            if kept != "":
                self._pending.append(kept)
                break

    def show(self, visual: VisualInput, number: int) -> None:
        """The pieces of a video or an image, the `number`-th that was given."""
        shift = self._first_label
        top = self._first_label
        for piece in visual.pieces:
            if isinstance(piece, str):
                self.template(piece)
                continue
            ids, labels, places = self._read(piece)
            top = max(top, shift + int(labels.max(initial=-1)) + 1)
            self._flush()
            if isinstance(piece, Rows):
                self._rows.append((number, np.arange(self._length, self._length + labels.size)))
            self._write(ids, np.where(labels == tracks.TEXT, tracks.TEXT, labels + shift), places)
        if visual.joint != tracks.TEXT:
            self._flush()
            self._joint = shift + visual.joint
            top = max(top, self._joint + 1)
        self._first_label = top

    def prompt(self) -> Prompt:
        """The prompt of all that was written."""
        self._flush()
        empty = np.zeros(0, np.int64)
        given = [places for _, places in sorted(self._rows, key=itemgetter(0))]
        ids = np.concatenate([empty, *self._ids])
        labels = np.concatenate([empty, *self._labels])
        rows = np.concatenate([empty, *given])
        return Prompt(ids, labels, *mrope_positions(self._spans), rows)

    def _read(self, piece: Piece) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64] | None]:
        """Ids, labels and places of rows or of a token."""
        if isinstance(piece, Rows):
            pad = self._tokenizer.control_id(piece.pad) if piece.pad else ROW
            return np.full(piece.labels.size, pad), piece.labels, piece.places
        assert isinstance(piece, Token)
        return np.array([self._id_of(piece.text)]), np.array([piece.label]), None

    def _id_of(self, text: str) -> int:
        """The id of a learned row or of a text that is one token."""
        if text in self._extra:
            return self._extra[text]
        ids = self._tokenizer.encode(self._tokenizer.split_template(text))
        if len(ids) != 1:
            raise BundleError(f"{text!r} is {len(ids)} tokens in the tokenizer, the family needs 1: rebuild the bundle")
        return ids[0]

    def _flush(self) -> None:
        """Tokenize what is pending, as one text."""
        ids = np.array(self._tokenizer.encode(self._pending), np.int64)
        labels = np.full(ids.size, tracks.TEXT)
        labels[:1] = self._pending_label
        self._pending = []
        self._pending_label = tracks.TEXT
        self._turn = 0
        self._write(ids, labels, None)

    def _write(self, ids: NDArray[np.int64], labels: NDArray[np.int64], places: NDArray[np.int64] | None) -> None:
        self._ids.append(ids)
        self._labels.append(labels)
        self._spans.append(ids.size if places is None else places)
        self._length += ids.size
