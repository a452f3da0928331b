"""Kinds of vision towers: what a graph takes beside patches, how many rows it gives, and between which bounds.

A kind is a class of the settings that a manifest keeps for it. What it computes depends on the size of the pictures
alone, so all pictures of one size share it. Here is what several families share; a kind of one family is beside that
family's preprocessing. numpy only; knows no file and no prompt.

    kind             inputs beside patches [N, P, W]                    rows of a picture
    plain            none                                               settings.rows, or P
    rope_2d          cos, sin [1, P, hd/2]                              P / settings.merge_size^2
    rope_2d_windows  those, and units [V, U], slots, mask               as rope_2d
    rope_2d_table    those, and corners, shares [4, P]                  as rope_2d
    pooled           pool [Q, P], a matrix that averages patches        Q
    block_pooled     pool [Q, settings.blocks^2], an average            Q
    scales           taps, shares [K, S * places of the finest scale]   tiles of the finest scale * settings.rows
    resampler        places [P], sincos [1, P, settings.width]          settings.rows
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from framefusion.runtime.media.tiles.pooling import pool_matrix
from framefusion.runtime.media.visual_input import Tiles
from framefusion.runtime.text.positions import vision_rope_tables
from framefusion.storage.records import Rule

COUNT = Rule(1, 1 << 20)
"""Of rows, patches or channels in the settings of a tower."""

Range = tuple[int, int, int]
"""The fewest, the usual number and the most along an axis of a graph."""


class TowerCall(NamedTuple):
    """How to call the tower for pictures of one size."""

    inputs: Mapping[str, NDArray[Any]]
    rows: int  # of each picture


@dataclass(frozen=True, kw_only=True)
class TowerSettings:
    """Numbers of a kind of tower, and what follows from them. A subclass is a kind, by `kind`.

    Attributes:
        kind: its name in `VisionRecord.kind`, beside which the settings stand.
        inputs: names of the graph's inputs beside patches, in order.
        field_rules: what each field may hold in a manifest.
    """

    sibling_tag: ClassVar[str] = "kind"
    kind: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ()
    field_rules: ClassVar[Mapping[str, Rule]] = {}

    @abstractmethod
    def call(self, tiles: Tiles, head_dim: int) -> TowerCall:
        """The inputs that all these pictures share, and the rows of each.

        Args:
            tiles: pictures of one size.  [N, P, W]
            head_dim: channels of a head of the tower.
        """

    def block_side(self) -> int | None:
        """Side of the blocks of patches that become one row, where the preprocessing orders patches by them."""
        return None

    def whole_picture(self) -> int:
        """Patches of a picture where the graph is of one size and this many are encoded at least; 0: any number."""
        return 0

    def patch_step(self) -> int:
        """What the patches of a picture are multiples of."""
        return 1

    def rowless_patches(self) -> int:
        """Patches of a picture, beside those that give rows."""
        return 0

    def ranges(self, low: int, high: int) -> Mapping[str, Range]:
        """Bounds of the axes that follow from the size of a picture, by the names that the towers give to axes.

        Args:
            low: patches of the smallest picture.
            high: patches of the largest one.
        """
        return {}


@dataclass(frozen=True, kw_only=True)
class PlainSettings(TowerSettings):
    """A tower for pictures of one fixed size.

    Attributes:
        rows: of a picture; None: as many as it has patches.
        patches: of a picture; None: within those that are encoded at once.
    """

    kind: ClassVar[str] = "plain"
    field_rules: ClassVar[Mapping[str, Rule]] = {"rows": COUNT, "patches": COUNT}

    rows: int | None = None
    patches: int | None = None

    def call(self, tiles: Tiles, head_dim: int) -> TowerCall:
        """No input beside the patches."""
        return TowerCall({}, tiles.shape[1] if self.rows is None else self.rows)

    def whole_picture(self) -> int:
        """`patches`, or 0."""
        return self.patches or 0


@dataclass(frozen=True, kw_only=True)
class RopeSettings(TowerSettings):
    """Qwen-VL's towers: rotary tables of the patches of one grid, in blocks that become one row.

    Attributes:
        merge_size: side of a block in patches.
    """

    kind: ClassVar[str] = "rope_2d"
    inputs: ClassVar[tuple[str, ...]] = ("cos", "sin")
    field_rules: ClassVar[Mapping[str, Rule]] = {"merge_size": COUNT}

    merge_size: int

    def call(self, tiles: Tiles, head_dim: int) -> TowerCall:
        """cos, sin [1, P, head_dim / 2]."""
        grid = tiles.grid
        tables = vision_rope_tables(grid.height, grid.width, self.merge_size, head_dim)
        cos, sin = (np.ascontiguousarray(table[None, :, : head_dim // 2]) for table in tables)
        return TowerCall({"cos": cos, "sin": sin}, grid.height * grid.width // self.merge_size**2)

    def block_side(self) -> int:
        """Patches along one side of a merge block."""
        return self.merge_size

    def patch_step(self) -> int:
        """Patches of a merge block."""
        return self.merge_size**2

    def ranges(self, low: int, high: int) -> Mapping[str, Range]:
        """merge_blocks: those of the smallest and of the largest picture."""
        fewest = low // self.merge_size**2
        most = high // self.merge_size**2
        return {"merge_blocks": (fewest, most, most)}


@dataclass(frozen=True, kw_only=True)
class PooledSettings(TowerSettings):
    """Patches are averaged by a matrix, so that one graph serves videos, images and every way to pool."""

    kind: ClassVar[str] = "pooled"
    inputs: ClassVar[tuple[str, ...]] = ("pool",)

    def call(self, tiles: Tiles, head_dim: int) -> TowerCall:
        """pool [Q, P] of the way that the tiles name.

        Raises:
            BundleError: the way is unknown.
        """
        matrix = pool_matrix(tiles.grid.height, tiles.grid.width, tiles.pool)
        return TowerCall({"pool": matrix}, len(matrix))

    def ranges(self, low: int, high: int) -> Mapping[str, Range]:
        """rows: a pool keeps all patches at most, and one at least."""
        return {"rows": (1, high, high)}
