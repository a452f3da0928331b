"""What a family makes of one video or image: pictures for the vision tower, and pieces of the prompt that show them.

Types only; each family's rules are in `framefusion.runtime.families`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from framefusion.reduction.tracks import TEXT


class Grid(NamedTuple):
    """Patches of one video or image before they are merged: temporal x rows x columns."""

    frames: int
    height: int
    width: int

    def merged(self, merge_size: int) -> Grid:
        """The grid of tokens, `merge_size` x `merge_size` patches each.

        Raises:
            ValueError: rows or columns do not divide.
        """
        if self.height % merge_size or self.width % merge_size:
            raise ValueError(
                f"a grid of {self.height}x{self.width} patches does not divide into blocks of {merge_size}"
            )
        return Grid(self.frames, self.height // merge_size, self.width // merge_size)

    @property
    def size(self) -> int:
        """Patches in all: frames x height x width."""
        return self.frames * self.height * self.width


@dataclass(frozen=True, eq=False)
class BytePatches:
    """Patches as they are cut from pictures, a byte for each level: a fourth of what they become in floats.

    Attributes:
        levels: [N, P, W]; within a patch: frame, row, column, channel, as in the pictures.
        table: [3, 256], what each level of each channel becomes.
    """

    levels: NDArray[np.uint8]
    table: NDArray[np.float32]

    def reshaped(self, count: int) -> BytePatches:
        """The same patches, one after the other, as those of `count` pictures."""
        return BytePatches(self.levels.reshape(count, -1, self.levels.shape[2]), self.table)

    def normalised(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """The patches of some pictures, as a tower of floats takes them: [n, P, W].

        Within a patch: channel, frame, row, column, as Hugging Face's processors have it.
        """
        levels = self.levels[start:stop]
        values = np.empty((*levels.shape[:2], 3, levels.shape[2] // 3), np.float32)
        for picture, numbers in zip(levels, values, strict=True):
            for channel in range(3):
                numbers[:, channel] = self.table[channel].take(picture[:, channel::3])
        return values.reshape(levels.shape)


@dataclass(frozen=True, eq=False)
class Tiles:
    """Pictures of one size, as the vision tower takes them.

    Attributes:
        patches: [N, P, W]: N pictures or temporal grids, P patches each, W numbers a patch; bytes, or floats that are
            normalised.
        grid: N, rows and columns of patches.
        pool: how the tower pools the patches of each, where its kind does; see tower_kinds.py.
    """

    patches: BytePatches | NDArray[np.float32]
    grid: Grid
    pool: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, P, W."""
        patches = self.patches.levels if isinstance(self.patches, BytePatches) else self.patches
        count, height, width = patches.shape
        return count, height, width

    def behind(self, parts: Sequence[Tiles]) -> Tiles | None:
        """The pictures behind those of the parts, none or more; None where the parts are not the first ones."""
        start = 0
        for part in parts:
            end = start + part.shape[0]
            alike = (part.pool, part.grid[1:]) == (self.pool, self.grid[1:])
            if not alike or not _equal(self.pictures(start, end).patches, part.patches):
                return None
            start = end
        return self.pictures(start, self.grid.frames)

    def pictures(self, start: int, end: int) -> Tiles:
        """Some of the pictures."""
        grid = Grid(end - start, *self.grid[1:])
        if isinstance(self.patches, BytePatches):
            return Tiles(BytePatches(self.patches.levels[start:end], self.patches.table), grid, self.pool)
        return Tiles(self.patches[start:end], grid, self.pool)

    @property
    def values(self) -> NDArray[np.float32]:
        """All patches in floats, normalised: [N, P, W]; four times as large as bytes, and computed anew each time."""
        return self.patches.normalised() if isinstance(self.patches, BytePatches) else self.patches


def _equal(first: BytePatches | NDArray[np.float32], second: BytePatches | NDArray[np.float32]) -> bool:
    """Whether patches are the same numbers of the same kind."""
    if isinstance(first, BytePatches) and isinstance(second, BytePatches):
        return np.array_equal(first.levels, second.levels) and np.array_equal(first.table, second.table)
    return isinstance(first, np.ndarray) and isinstance(second, np.ndarray) and np.array_equal(first, second)


class Rows(NamedTuple):
    """A run of the tower's rows in the prompt."""

    labels: NDArray[np.int64]  # [n] patch_type within this visual; -1 for rows that no reduction may touch
    places: NDArray[np.int64] | None = None  # [3, n] M-RoPE offsets from the run's start; None: one after the other
    pad: str = ""  # token shown at these places, where the family has one


class Token(NamedTuple):
    """One token inside a visual with a label of its own: a learned row, or a separator that counts as a patch."""

    text: str  # what the tokenizer says in one id, or a name in EmbeddingRecord.extra
    label: int


Piece = str | Rows | Token
"""Of a prompt. A string is template text: control tokens in it count, and it is tokenized with its neighbours."""


@dataclass(frozen=True, eq=False)
class RowMap:
    """Rows of the prompt from rows of the tower: a gather, or a weighted sum of K rows each."""

    index: NDArray[np.int64]  # [n, K]
    weight: NDArray[np.float32] | None = None  # [n, K]; None: K is 1 and the row is taken as it is

    def apply(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rows of the prompt from rows of the tower.  [m, D] -> [n, D]"""
        if self.weight is None:
            return rows[self.index[:, 0]]
        mapped = self.weight[:, :1] * rows[self.index[:, 0]]
        for k in range(1, self.index.shape[1]):
            mapped += self.weight[:, k : k + 1] * rows[self.index[:, k]]
        return mapped


@dataclass(frozen=True, eq=False)
class VisualInput:
    """One video or image, preprocessed.

    The tower's rows are those of the first tiles, picture by picture, then those of the second, and so on; `rows` says
    how the prompt's come from them, None takes them as they are.
    """

    tiles: tuple[Tiles, ...]
    pieces: tuple[Piece, ...]
    rows: RowMap | None = None
    joint: int = TEXT  # label of the first token behind it, where its turn goes on and parts of a turn are separated

    @property
    def num_rows(self) -> int:
        """Rows of the tower that the prompt shows."""
        return sum(piece.labels.size for piece in self.pieces if isinstance(piece, Rows))
