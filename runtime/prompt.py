"""Turns of a conversation to token ids, with the place of every visual token: its position and its patch_type label.

Knows the layout of a prompt, never a pixel: of videos and images it is given the grids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError, PromptError
from framefusion.runtime.positions import Grid, mrope_positions
from framefusion.runtime.tokenizer import Tokenizer
from framefusion.tracks import TEXT

ROLES = ("system", "user", "assistant")


class Visual(Enum):
    """A place in a turn where a video or an image is shown."""

    VIDEO = "video"
    IMAGE = "image"


@dataclass(frozen=True)
class Turn:
    """What one side said: plain text and visuals, in order."""

    role: str
    parts: tuple[str | Visual, ...]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise PromptError(f"role {self.role!r} is unknown: use one of {', '.join(ROLES)}")


@dataclass(frozen=True)
class PromptTemplate:
    """A family's chat layout as plain strings; `{role}` in the turn prefix stands for the role."""

    default_system: str
    turn_prefix: str
    turn_suffix: str
    generation_prefix: str
    video_start: str
    video_pad: str
    video_end: str
    image_start: str
    image_pad: str
    image_end: str
    video_pad_id: int
    image_pad_id: int

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer in which the pad tokens are others."""
        for token, expected in ((self.video_pad, self.video_pad_id), (self.image_pad, self.image_pad_id)):
            found = tokenizer.control_id(token)
            if found != expected:
                raise BundleError(
                    f"{token} is id {found} in the tokenizer, the bundle says {expected}: rebuild the bundle"
                )


class VisualSpan(NamedTuple):
    """The tokens of one video or image within the prompt."""

    start: int
    length: int
    grid: Grid  # of patches, before merging


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt ready for prefill.

    `labels` are FrameFusion's patch_type: -1 for text, else the token's place in its frame. Each video or image has a
    range of its own, starting where the one before it ended, so that no track ever runs from one video into the next.
    """

    token_ids: NDArray[np.int64]  # [S]
    labels: NDArray[np.int64]  # [S]
    positions: NDArray[np.int64]  # [3, S]
    rope_delta: int
    visual_spans: tuple[VisualSpan, ...]

    @property
    def num_visual(self) -> int:
        """Number of visual tokens."""
        return sum(span.length for span in self.visual_spans)


def build_prompt(
    template: PromptTemplate,
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    grids: Sequence[Grid],
    merge_size: int,
) -> Prompt:
    """Lay out the turns, with as many pad tokens for each visual as its grid has merged patches."""
    visuals = [part for turn in turns for part in turn.parts if isinstance(part, Visual)]
    if not turns:
        raise PromptError("the conversation has 0 turns, it needs 1 or more: give a prompt")
    if len(visuals) != len(grids):
        raise PromptError(
            f"the conversation shows {len(visuals)} video(s) and image(s), {len(grids)} were given: give one for each"
        )
    template.check(tokenizer)
    ids = np.array(tokenizer.encode(_lay_out(template, tokenizer, turns)), np.int64)
    pads = np.flatnonzero(np.isin(ids, (template.video_pad_id, template.image_pad_id)))
    if pads.size != len(grids):
        raise BundleError(f"the template's own text holds {pads.size - len(grids)} pad token(s): rebuild the bundle")

    repeats = np.ones(ids.size, np.int64)
    repeats[pads] = [grid.merged(merge_size).size for grid in grids]
    spans = tuple(map(VisualSpan, (np.cumsum(repeats) - repeats)[pads].tolist(), repeats[pads].tolist(), grids))
    length = int(repeats.sum())
    positions, rope_delta = mrope_positions(_text_and_grids(spans, length), merge_size)
    return Prompt(np.repeat(ids, repeats), _labels(spans, length), positions, rope_delta, spans)


def check_length(prompt: Prompt, max_input_len: int) -> None:
    """Refuse a prompt that does not fit the segments built."""
    length = prompt.token_ids.size
    if length > max_input_len:
        raise PromptError(
            f"the prompt has {length} tokens, {prompt.num_visual} of them visual, the bundle takes {max_input_len}: "
            f"sample fewer frames, lower max_pixels, or rebuild with --max-input-len {length}"
        )


def _lay_out(template: PromptTemplate, tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[str | int]:
    """Template text split into control tokens, users' text as it is, one pad token for each visual."""
    wrapped = {
        Visual.VIDEO: tokenizer.split_template(template.video_start + template.video_pad + template.video_end),
        Visual.IMAGE: tokenizer.split_template(template.image_start + template.image_pad + template.image_end),
    }
    if template.default_system and turns[0].role != "system":
        turns = [Turn("system", (template.default_system,)), *turns]
    pieces: list[str | int] = []
    for turn in turns:
        pieces += tokenizer.split_template(template.turn_prefix.replace("{role}", turn.role))
        for part in turn.parts:
            pieces += wrapped[part] if isinstance(part, Visual) else [part]
        pieces += tokenizer.split_template(template.turn_suffix)
    return pieces + tokenizer.split_template(template.generation_prefix)


def _text_and_grids(spans: Sequence[VisualSpan], length: int) -> list[int | Grid]:
    """The prompt as lengths of text with grids between them."""
    pieces: list[int | Grid] = []
    at = 0
    for span in spans:
        pieces += [span.start - at, span.grid]
        at = span.start + span.length
    return [*pieces, length - at]


def _labels(spans: Sequence[VisualSpan], length: int) -> NDArray[np.int64]:
    labels = np.full(length, TEXT, np.int64)
    first = 0
    for span in spans:
        in_frame = span.length // span.grid.frames
        labels[span.start : span.start + span.length] = np.tile(np.arange(first, first + in_frame), span.grid.frames)
        first += in_frame
    return labels
