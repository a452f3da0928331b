"""Qwen2.5-VL's rule: Qwen2-VL's, with temporal positions that tell how many seconds lie between the grids.

Its tower attends in square windows of a grid; how a grid is cut into them is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError
from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing
from framefusion.runtime.media.preprocess import MAX_ASPECT_RATIO
from framefusion.runtime.media.tower_kinds import COUNT, Range, RopeSettings, TowerCall
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.visual_input import Tiles, VisualInput
from framefusion.storage.records import Rule

MASKED = np.float32(-65504)
"""What masks a key: the lowest number of fp16, so that graphs of every type take it."""


@dataclass(frozen=True, kw_only=True)
class Qwen25VLPreprocessing(QwenVLPreprocessing):
    """Pixel limits are per frame; `tokens_per_second` temporal positions stand for a second of film."""

    rule: ClassVar[str] = "qwen2_5_vl"
    field_rules: ClassVar[Mapping[str, Rule]] = {"tokens_per_second": Rule(0, 1e4, above=True)}

    tokens_per_second: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokens_per_second > 0:
            raise BundleError(f"tokens_per_second {self.tokens_per_second} is impossible: it must be more than 0")

    def video(self, video: Video, index: int = 0) -> VisualInput:
        """As Qwen2-VL's; a temporal grid is `tokens_per_second` positions a second after the one before."""
        sampled_fps = len(video.indices) / video.counted_frames * video.fps
        seconds = np.float32(self.temporal_patch_size / sampled_fps)  # of a grid; rounded where transformers rounds
        interval = float(np.float32(self.tokens_per_second) * seconds)
        return self.shown(self.patches(video), self.video_pad, interval)


@dataclass(frozen=True, kw_only=True)
class WindowSettings(RopeSettings):
    """As Qwen2-VL's tower, and how a grid is cut into windows.

    Attributes:
        window: side of a window in merge blocks.
    """

    kind: ClassVar[str] = "rope_2d_windows"
    inputs: ClassVar[tuple[str, ...]] = (*RopeSettings.inputs, "units", "slots", "mask")
    field_rules: ClassVar[Mapping[str, Rule]] = {"window": COUNT}

    window: int

    def call(self, tiles: Tiles, head_dim: int) -> TowerCall:
        """Besides, units [V, U] and slots [P / merge_size^2] as `windows_of` says, and mask [V, 1, S, S] of keys."""
        inputs, rows = super().call(tiles, head_dim)
        grid = tiles.grid.merged(self.merge_size)
        units, slots = windows_of(grid.height, grid.width, self.window)
        empty = np.repeat(units < 0, self.merge_size**2, axis=1)  # [V, S]
        mask = np.where(empty, MASKED, np.float32(0))[:, None, None]  # [V, 1, 1, S]
        mask = np.repeat(mask, mask.shape[-1], axis=2)
        return TowerCall({**inputs, "units": np.maximum(units, 0), "slots": slots, "mask": mask}, rows)

    def ranges(self, low: int, high: int) -> Mapping[str, Range]:
        """merge_blocks, and windows: the most where a picture is as long and thin as pictures may be."""
        blocks = super().ranges(low, high)
        fewest, _, most = blocks["merge_blocks"]
        side = self.window
        outline = math.sqrt(most) * (math.sqrt(MAX_ASPECT_RATIO) + 1) + 2  # rows and columns together
        square = -(-math.isqrt(most) // side)
        usual = max(square**2, -(-most // side**2))
        return {**blocks, "windows": (-(-fewest // side**2), usual, math.ceil(most / side**2 + outline / side + 1))}


def windows_of(rows: int, columns: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Square windows over a grid of cells: the cell in each slot [V, side^2], -1 for none; the slot of each cell."""
    over = ((0, -rows % side), (0, -columns % side))
    cells = np.pad(np.arange(rows * columns).reshape(rows, columns), over, constant_values=-1)
    blocks = cells.reshape(cells.shape[0] // side, side, -1, side).transpose(0, 2, 1, 3)
    units = blocks.reshape(-1, side * side)
    slots = np.empty(rows * columns, np.int64)
    slots[units[units >= 0]] = np.flatnonzero(units >= 0)
    return units, slots
