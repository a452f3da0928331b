"""A conversation as a caller gives it, the chat layout of a family, and the prompt that becomes of both.

Turns to token ids is prompt_layout.py. Knows no pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError, PromptError
from framefusion.reduction import tracks
from framefusion.runtime.text.positions import decode_positions
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

    def tail(self, start: int) -> Prompt:
        """The tokens from `start` on, which stand where they stood in the whole."""
        rows = self.row_places[self.row_places >= start] - start
        return Prompt(
            self.token_ids[start:], self.labels[start:], self.positions[:, start:], self.rope_delta + start, rows
        )

    def head(self, end: int) -> Prompt:
        """The tokens before `end`, behind which text went on."""
        rows = self.row_places[self.row_places < end]
        return Prompt(self.token_ids[:end], self.labels[:end], self.positions[:, :end], self.rope_delta, rows)

    def followed_by(self, token_ids: Sequence[int]) -> Prompt:
        """With text behind it, such as an answer."""
        ids = np.array(token_ids, np.int64)
        labels = np.full(ids.size, tracks.TEXT)
        positions = decode_positions(self.token_ids.size, self.rope_delta, ids.size)
        return Prompt(
            np.concatenate([self.token_ids, ids]),
            np.concatenate([self.labels, labels]),
            np.concatenate([self.positions, positions], axis=1),
            self.rope_delta,
            self.row_places,
        )

    def common_length(self, other: Prompt) -> int:
        """How many tokens both begin with: the same ids, labels and positions."""
        size = min(self.token_ids.size, other.token_ids.size)
        same = self.token_ids[:size] == other.token_ids[:size]
        same &= self.labels[:size] == other.labels[:size]
        same &= (self.positions[:, :size] == other.positions[:, :size]).all(axis=0)
        return size if same.all() else int(same.argmin())


def as_turns(turns: Turn | Sequence[Turn]) -> Sequence[Turn]:
    """The turns of a conversation; one turn alone is a conversation of one.

    Raises:
        PromptError: it is something else, such as a text.
    """
    listed = (turns,) if isinstance(turns, Turn) else turns
    if isinstance(listed, str) or not isinstance(listed, Sequence) or not all(isinstance(t, Turn) for t in listed):
        raise PromptError(f"the conversation is {turns!r:.80}: give turns, such as [Turn('user', 'What happens?')]")
    return listed


def visuals_of(turns: Sequence[Turn]) -> list[Visual]:
    """What the turns show, in order."""
    return [part for turn in turns for part in turn.parts if isinstance(part, Visual)]


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


def check_length(prompt: Prompt, max_input_len: int, remedy: str) -> None:
    """Refuse a prompt that does not fit the segments built.

    Raises:
        PromptError: with its length, the limit and what a user can do.
    """
    length = prompt.token_ids.size
    if length > max_input_len:
        raise PromptError(
            f"the prompt has {length} tokens, {prompt.num_visual} of them visual, the bundle takes {max_input_len}: "
            f"{remedy}, or rebuild with --max-input-len {length}"
        )
