"""Turns of a conversation to token ids, with the place of every visual token: its position and its patch_type label.

Knows the layout of a prompt, never a pixel: how a video stands in it is told by the video's pieces (visual_input.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError, PromptError
from framefusion.reduction import tracks
from framefusion.runtime.media.visual_input import Piece, Rows, Token, VisualInput
from framefusion.runtime.text.positions import mrope_positions
from framefusion.runtime.text.tokenizer import Tokenizer
from framefusion.storage.records import to_json

ROLES = ("system", "user", "assistant")
ROW = -1
"""The id of a row of the vision tower that no token stands for."""
FIRST_EXTRA = -2
"""The id of the first learned row that belongs to no token; the next ones count down."""


class Visual(Enum):
    """A place in a turn where a video or an image is shown."""

    VIDEO = "video"
    IMAGE = "image"


@dataclass(frozen=True)
class Turn:
    """What one side said: plain text and visuals, in order; a text or a visual alone stands for itself.

    Raises:
        PromptError: the role is unknown, or a part is neither text nor a visual.
    """

    role: str
    parts: Sequence[str | Visual]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise PromptError(f"role {self.role!r} is unknown: use one of {', '.join(ROLES)}")
        alone = isinstance(self.parts, (str, Visual))
        if not alone and not isinstance(self.parts, Sequence):
            raise PromptError(f"a turn's parts are {self.parts!r:.80}: give a text, or texts and visuals in a list")
        parts = (self.parts,) if alone else tuple(self.parts)
        for part in parts:
            if not isinstance(part, (str, Visual)):
                raise PromptError(f"{part!r:.80} in a turn is neither a text nor Visual.VIDEO or Visual.IMAGE")
        object.__setattr__(self, "parts", parts)


@dataclass(frozen=True)
class TurnLayout:
    """What stands before and after the parts of a turn, and before each text among them."""

    prefix: str
    suffix: str
    text_prefix: str = ""


@dataclass(frozen=True)
class PromptTemplate:
    """A family's chat layout as plain strings, in which control tokens count.

    Attributes:
        turns: by role; a role that is not there cannot speak.
        generation_prefix: what the answer follows.
        begin: what stands before everything, such as a token for the beginning.
        default_system: said by the system where the conversation has no such turn; "" leaves the turn out.
        after_visual: between a video or an image and what follows it.
        part_separator: between any two parts of a turn.
        visuals_first: a turn's videos and images stand before its text, wherever the user put them.
        images_first: and among them the images before the videos.
        strip: white space at the ends of a turn is left out.
        pads: token -> its id as config.json says; a tokenizer in which it is another is refused.
    """

    turns: Mapping[str, TurnLayout]
    generation_prefix: str
    begin: str = ""
    default_system: str = ""
    after_visual: str = ""
    part_separator: str = ""
    visuals_first: bool = False
    images_first: bool = False
    strip: bool = False
    pads: Mapping[str, int] = field(default_factory=dict)

    def rank(self, part: str | Visual) -> int:
        """Where a part of a turn stands, where its kind decides it."""
        if isinstance(part, str):
            return 2
        return int(self.images_first and part is Visual.VIDEO)

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer in which the pad tokens are others."""
        for token, expected in self.pads.items():
            found = tokenizer.control_id(token)
            if found != expected:
                raise BundleError(
                    f"{token} is id {found} in the tokenizer, the bundle says {expected}: rebuild the bundle"
                )


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt ready for prefill.

    `labels` are FrameFusion's patch_type: -1 for text, else the token's place in its frame. Each video or image has a
    range of its own, starting where the one before it ended, so that no track ever runs from one video into the next.
    """

    token_ids: NDArray[np.int64]  # [S] below 0: rows of no token, see ROW and FIRST_EXTRA
    labels: NDArray[np.int64]  # [S]
    positions: NDArray[np.int64]  # [3, S]
    rope_delta: int
    row_places: NDArray[np.int64]  # [n] where the vision tower's rows go, in their order

    @property
    def num_visual(self) -> int:
        """Number of tokens that a reduction may touch."""
        return tracks.count_visual(self.labels)


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
    shown = [part for turn in turns for part in turn.parts if isinstance(part, Visual)]
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


def as_turns(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns of a conversation; one turn alone is a conversation of one.

    Raises:
        PromptError: it is something else, such as a text.
    """
    listed = (turns,) if isinstance(turns, Turn) else turns
    if isinstance(listed, str) or not isinstance(listed, Sequence) or not all(isinstance(t, Turn) for t in listed):
        raise PromptError(f"the conversation is {turns!r:.80}: give turns, such as [Turn('user', 'What happens?')]")
    return listed


def layout_texts(*records: Any) -> list[str]:
    """All texts in records of a manifest that say what prompts are laid out with: templates, rules of preprocessing."""
    texts: list[str] = []
    pending: list[Any] = [to_json(record) for record in records]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value
    return texts


def check_texts(turns: Sequence[Turn], tokenizer: Tokenizer, max_input_len: int) -> None:
    """Refuse texts that are far too long, before all of them is tokenized.

    Raises:
        PromptError: one has more tokens than `max_input_len`.
    """
    for part in (part for turn in turns for part in turn.parts):
        if isinstance(part, str) and tokenizer.longer_than(part, max_input_len):
            raise PromptError(
                f"a text of {len(part)} characters has more tokens than the bundle takes, {max_input_len}: shorten it, "
                "or rebuild with a higher --max-input-len"
            )


def check_length(prompt: Prompt, max_input_len: int) -> None:
    """Refuse a prompt that does not fit the segments built."""
    length = prompt.token_ids.size
    if length > max_input_len:
        raise PromptError(
            f"the prompt has {length} tokens, {prompt.num_visual} of them visual, the bundle takes {max_input_len}: "
            f"sample fewer frames, lower max_pixels, or rebuild with --max-input-len {length}"
        )


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
        """Text of the layout."""
        if text:
            self._joint = tracks.TEXT
        self._pending += self._tokenizer.split_template(text)

    def separate(self, text: str) -> None:
        """Text between two parts of a turn; its first token may belong to the video before it."""
        if text and not self._pending:
            self._pending_label = self._joint
        self.template(text)

    def said(self, text: str) -> None:
        """Text of a user."""
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
        """All of it."""
        self._flush()
        empty = np.zeros(0, np.int64)
        given = [places for _, places in sorted(self._rows, key=itemgetter(0))]
        ids, labels, rows = (np.concatenate([empty, *parts]) for parts in (self._ids, self._labels, given))
        return Prompt(ids, labels, *mrope_positions(self._spans), rows)

    def _read(self, piece: Piece) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64] | None]:
        """Ids, labels and places of rows or of a token."""
        if isinstance(piece, Rows):
            pad = self._tokenizer.control_id(piece.pad) if piece.pad else ROW
            return np.full(piece.labels.size, pad), piece.labels, piece.places
        assert isinstance(piece, Token)
        return np.array([self._id_of(piece.text)]), np.array([piece.label]), None

    def _id_of(self, text: str) -> int:
        if text in self._extra:
            return self._extra[text]
        ids = self._tokenizer.encode(self._tokenizer.split_template(text))
        if len(ids) != 1:
            raise BundleError(f"{text!r} is {len(ids)} tokens in the tokenizer, the family needs 1: rebuild the bundle")
        return ids[0]

    def _flush(self) -> None:
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
