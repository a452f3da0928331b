"""The canned request: a short film between text, drawn from a seed, the same bits on every machine.

All numbers are whole ones from -127 to 127 times a power of two, so fp32, fp16 and bf16 hold them exactly: what differs
between two backends is what they computed. A visual token is new, repeats the one before it in its track, or repeats
some of its channels, so that similarities are 1, 0 or between, far from each other. The generator is splitmix64,
written out here because numpy's streams may change from release to release.

    seed -> token ids of the text -> rows of the embedding table
         -> visual rows                                              -> `Embedder.embed`, as for any prompt
         -> a picture for the vision tower
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from framefusion.reduction.tracks import TEXT
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.media.preprocess import normalised_levels
from framefusion.runtime.media.visual_input import BytePatches, Grid, Tiles, VisualInput
from framefusion.runtime.text.positions import grid_places, mrope_positions
from framefusion.runtime.text.prompt import Prompt

LARGEST = 127  # seven bits and a sign: bf16 has eight
REPEATED_CHANNELS = (0.0, 0.0, 0.25, 1.0, 1.0, 1.0)
"""Shares of a token's channels that are those of the token before it; one is drawn for each token."""

_TOKENS = 0
_VISUAL = 1
_SHARES = 2
_CHANNELS = 3
_ADDED = 4
_PICTURE = 5
_ANSWER = 6


@dataclass(frozen=True)
class CannedRequest:
    """What the request is drawn from; a few numbers, so a bundle carries no row of it."""

    seed: int
    text_before: int  # tokens
    frames: int
    height: int
    width: int  # tokens of a frame
    text_behind: int
    answer: int  # tokens that are decoded, whatever the model would say
    scale: float  # of visual rows, a power of two near that of the embedding table

    @property
    def num_visual(self) -> int:
        """Visual tokens."""
        return self.frames * self.height * self.width

    @property
    def length(self) -> int:
        """S, tokens of the prompt."""
        return self.text_before + self.num_visual + self.text_behind

    def prompt(self, manifest: Manifest) -> Prompt:
        """Tokens, labels and positions; what stands in `token_ids` at visual places is never read."""
        # 1. Text in front of the film and behind it, so that the mask has something to hide on both sides.
        ids = drawn_indices(self.seed, _TOKENS, self.length, text_ids(manifest))
        places = np.arange(self.text_before, self.text_before + self.num_visual)
        # 2. A track is a place of the frame through time.
        labels = np.full(self.length, TEXT, np.int64)
        labels[places] = np.tile(np.arange(self.height * self.width), self.frames)
        # 3. Positions as this model counts them: one after the other, or time, row and column of the film.
        grid = grid_places(Grid(self.frames, self.height, self.width))
        film = grid if manifest.model.mrope_section else self.num_visual
        positions, rope_delta = mrope_positions([self.text_before, film, self.text_behind])
        return Prompt(ids, labels, positions, rope_delta, places)

    def answer_ids(self, manifest: Manifest) -> NDArray[np.int64]:
        """Token ids that are decoded.  [answer]"""
        return drawn_indices(self.seed, _ANSWER, self.answer, text_ids(manifest))

    def visual_rows(self, layers: int, width: int, noise: float = 0.0) -> NDArray[np.float32]:
        """What the vision tower would have given: rows, and what the first `layers` layers add.

        Args:
            layers: of the LLM that add features.
            width: D.
            noise: as a share of a row's scale; what repeats still does, and a decision that survives it is no rounding.

        Returns:
            [1 + layers, n, D]
        """
        cells = self.height * self.width
        fresh = drawn(self.seed, _VISUAL, self.num_visual * width).reshape(self.frames, cells, width)
        if noise:
            fresh = fresh + noise * drawn(self.seed + 1, _VISUAL, fresh.size).reshape(fresh.shape)
        shares = np.array(REPEATED_CHANNELS)[
            drawn_indices(self.seed, _SHARES, self.frames * cells, len(REPEATED_CHANNELS))
        ].reshape(self.frames, cells)
        order = np.argsort(drawn_indices(self.seed, _CHANNELS, width, 1 << 32), kind="stable")
        rows = fresh.copy()
        for frame in range(1, self.frames):
            repeats = order[None] < shares[frame][:, None] * width
            rows[frame] = np.where(repeats, rows[frame - 1], fresh[frame])
        added = drawn(self.seed, _ADDED, layers * self.num_visual * width).reshape(layers, self.num_visual, width)
        whole = np.concatenate([rows.reshape(1, self.num_visual, width), added])
        return (whole / (LARGEST + 1) * self.scale).astype(np.float32)


@dataclass(frozen=True)
class CannedPicture:
    """One picture for the vision tower, of a size that the family's preprocessing gives."""

    height: int
    width: int  # patches
    pool: str
    patches: int  # that the tower takes of it

    def visual(self, seed: int, manifest: Manifest) -> VisualInput:
        """The picture as the tower takes it: levels, or one number in [-1, 1] after the other."""
        shape = (1, self.patches, manifest.vision.patch_width)
        numbers = drawn(seed, _PICTURE, math.prod(shape)).reshape(shape)
        patches: BytePatches | NDArray[np.float32] = (numbers / (LARGEST + 1)).astype(np.float32)
        if manifest.vision.input == "uint8":
            levels = (numbers + LARGEST + 1).astype(np.uint8)
            patches = BytePatches(levels, normalised_levels(manifest.preprocessing))
        return VisualInput((Tiles(patches, Grid(1, self.height, self.width), self.pool),), ())


def text_ids(manifest: Manifest) -> int:
    """Token ids that have a row in the embedding table and a logit."""
    return min(manifest.model.vocab_size, manifest.embedding.rows)


def drawn(seed: int, stream: int, count: int) -> NDArray[np.int64]:
    """Whole numbers from -127 to 127.  [count]"""
    return drawn_indices(seed, stream, count, 2 * LARGEST + 1) - LARGEST


def drawn_indices(seed: int, stream: int, count: int, size: int) -> NDArray[np.int64]:
    """Whole numbers from 0 to size - 1, size at most 2^32.  [count]"""
    upper = _splitmix(seed, stream, count) >> np.uint64(32)
    return ((upper * np.uint64(size)) >> np.uint64(32)).astype(np.int64)


def _splitmix(seed: int, stream: int, count: int) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea, Flood 2014) of the numbers from a start of each stream on; products wrap."""
    start = ((seed << 8) + stream << 40) & 0xFFFF_FFFF_FFFF_FFFF
    state = np.arange(count, dtype=np.uint64) + np.uint64(start)
    state = (state + np.uint64(1)) * np.uint64(0x9E37_79B9_7F4A_7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    mixed: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed
