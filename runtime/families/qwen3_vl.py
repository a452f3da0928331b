"""Qwen3-VL's rule: each temporal grid is shown after its time, `<1.5 seconds>`, and pixels are limited over a video.

    <0.2 seconds><|vision_start|> rows of grid 0 <|vision_end|><1.2 seconds><|vision_start|> rows of grid 1 ...

The numbers are those of Hugging Face's Qwen3-VL video processor. The tower has a square table of positions;
which of its rows lie around each patch is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BudgetError, VideoError
from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling, Indices, frame_rule
from framefusion.runtime.media.preprocess import HALF, PIXELS, check_shape
from framefusion.runtime.media.tower_kinds import COUNT, RopeSettings, TowerCall
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.visual_input import Grid, Piece, Rows, Tiles, VisualInput
from framefusion.runtime.text.positions import grid_places
from framefusion.storage.records import Rule


@dataclass(frozen=True, kw_only=True)
class Qwen3VLPreprocessing(QwenVLPreprocessing):
    """`min_pixels` and `max_pixels` are of all frames of a video together, those of images of the one picture."""

    rule: ClassVar[str] = "qwen3_vl"
    field_rules: ClassVar[Mapping[str, Rule]] = {"max_frame_tokens": PIXELS}

    patch_size: int = 16
    min_pixels: int = 128 * 32 * 32
    max_pixels: int = 768 * 32 * 32
    image_min_pixels: int | None = 56 * 56
    image_max_pixels: int | None = 1280 * 28 * 28
    image_mean: tuple[float, ...] = HALF
    image_std: tuple[float, ...] = HALF
    max_frame_tokens: int | None = None  # further limit of each frame, in merge blocks; None has no such limit

    def with_options(self, **given: Any) -> Qwen3VLPreprocessing:
        """As all Qwen-VL; there is no second limit of all frames together.

        Raises:
            BudgetError: a limit of all frames is given, or another choice that this family has not.
        """
        if given.get("total_pixels") is not None:
            raise BudgetError(
                f"--total-pixels {given['total_pixels']} does not apply to this family ({self.rule}): its --max-pixels "
                "is of all frames together"
            )
        return cast("Qwen3VLPreprocessing", super().with_options(**given))

    def video(self, video: Video, index: int = 0) -> VisualInput:
        """A run of rows for each temporal grid, behind the mean time of its frames; a place of the grid is a track."""
        tiles = self.patches(video)
        grid = tiles.grid.merged(self.merge_size)
        labels = np.arange(grid.height * grid.width)
        places = grid_places(Grid(1, grid.height, grid.width))
        depth = self.temporal_patch_size
        times = np.pad(video.moments, (0, -len(video.moments) % depth), mode="edge").reshape(-1, depth)
        pieces: list[Piece] = []
        for first, last in times[:, [0, -1]].tolist():
            pieces += [
                f"<{(first + last) / 2:.1f} seconds>{self.start}",
                Rows(labels, places, self.video_pad),
                self.end,
            ]
        return VisualInput((tiles,), tuple(pieces))

    def frame_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that each of so many frames is resized to, from the limits of all together."""
        factor = self.factor
        depth = self.temporal_patch_size
        if min(height, width) < factor:  # what is smaller than one token grows first, shape kept
            scale = max(factor / height, factor / width)
            height = int(height * scale)
            width = int(width * scale)
        check_shape(height, width)
        rows = round(height / factor) * factor
        columns = round(width / factor) * factor
        pixels = round(num_frames / depth) * depth * rows * columns
        most = self.video_max_pixels(num_frames)
        if pixels > most:
            scale = math.sqrt(num_frames * height * width / most)
            rows = max(factor, math.floor(height / scale / factor) * factor)
            columns = max(factor, math.floor(width / scale / factor) * factor)
        elif pixels < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (num_frames * height * width))
            rows = math.ceil(height * scale / factor) * factor
            columns = math.ceil(width * scale / factor) * factor
        return rows, columns

    def picture_patches(self) -> tuple[int, int]:
        """As all Qwen-VL; a frame of a long video may be as small as one token."""
        return self.merge_size**2, super().picture_patches()[1]

    def video_max_pixels(self, num_frames: int) -> int:
        """The limit of all frames together."""
        if self.max_frame_tokens is None:
            return self.max_pixels
        share = min(self.max_frame_tokens * self.factor**2, self.max_pixels // num_frames)
        return max(share, int(self.min_pixels * 1.05)) * num_frames


@dataclass(frozen=True, kw_only=True)
class TableSettings(RopeSettings):
    """As Qwen2-VL's tower, and which rows of the square position table lie around each patch.

    Attributes:
        table_side: rows of the table along one side.
    """

    kind: ClassVar[str] = "rope_2d_table"
    inputs: ClassVar[tuple[str, ...]] = (*RopeSettings.inputs, "corners", "shares")
    field_rules: ClassVar[Mapping[str, Rule]] = {"table_side": COUNT}

    table_side: int

    def call(self, tiles: Tiles, head_dim: int) -> TowerCall:
        """Besides, corners [4, P], rows of the table, and their shares [4, P], in the patches' order."""
        inputs, count = super().call(tiles, head_dim)
        (_, height, width) = tiles.grid
        merge = self.merge_size
        rows, row_shares = _neighbours(height, self.table_side)  # each [2, height]
        columns, column_shares = _neighbours(width, self.table_side)
        corners = np.stack([row[:, None] * self.table_side + column for row in rows for column in columns])  # [4, h, w]
        shares = np.stack([row[:, None] * column for row in row_shares for column in column_shares])
        blocks = (4, height // merge, merge, width // merge, merge)
        ordered = {
            name: np.ascontiguousarray(table.reshape(blocks).transpose(0, 1, 3, 2, 4).reshape(4, -1))
            for name, table in (("corners", corners), ("shares", shares))
        }
        return TowerCall({**inputs, **ordered}, count)


def _neighbours(size: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of `size` places spread corner to corner over a table of `side`: the entries around each, and their shares."""
    places = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    low = np.floor(places)
    share = places - low
    return np.minimum(np.stack([low, low + 1]).astype(np.int64), side - 1), np.stack([1 - share, share])


@frame_rule("qwen3_vl")
def qwen3_vl_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> Indices:
    """Evenly spread frames, first and last included; their number may be odd.

    Raises:
        VideoError: the film has fewer frames than the model needs.
    """
    wanted = int(total_frames / video_fps * sampling.fps)
    count = min(max(wanted, sampling.min_frames), sampling.max_frames, total_frames)
    if count < sampling.frame_factor:
        raise VideoError(
            f"the video has {total_frames} frame(s), the model needs {sampling.frame_factor} or more: give a longer "
            "clip, or an image"
        )
    return np.linspace(0, total_frames - 1, count).round().astype(np.int64)
