"""Qwen2-VL's rule: frames of any shape within pixel limits, two frames to a temporal grid, patches in merge blocks.

The numbers are those of Hugging Face's Qwen2-VL image processor, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError, VideoError
from framefusion.runtime.media.frame_sampling import FrameSampling, Indices, frame_rule, linspace_fp32
from framefusion.runtime.media.preprocess import (
    BLOCK,
    MAX_ASPECT_RATIO,
    PIXELS,
    Preprocessing,
    check_frames,
    check_shape,
    normalised_levels,
    resize,
    resize_rounded_once,
)
from framefusion.runtime.media.tiles.panels import Panel, cells, even
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.visual_input import BytePatches, Grid, Piece, Rows, Tiles, VisualInput
from framefusion.runtime.text.positions import grid_places
from framefusion.storage.records import Rule


@dataclass(frozen=True, kw_only=True)
class QwenVLPreprocessing(Preprocessing):
    """Patch geometry and limits of pixels; those of a video are per frame."""

    rule: ClassVar[str] = "qwen_vl"
    byte_patches: ClassVar[bool] = True
    field_rules: ClassVar[Mapping[str, Rule]] = {
        "merge_size": BLOCK,
        "temporal_patch_size": BLOCK,
        "min_pixels": PIXELS,
        "max_pixels": PIXELS,
        "total_pixels": Rule(1, math.ldexp(1, 53)),
        "image_min_pixels": PIXELS,
        "image_max_pixels": PIXELS,
    }

    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    # The pixels of all frames together, shared out evenly (qwen_vl_utils: 128000 * 28 * 28 * 0.9); None = no such cap.
    total_pixels: float | None = None
    # How often resized levels are rounded: Hugging Face's processor on Pillow rounds twice, qwen-vl-utils once.
    resize_rounding: Literal["twice", "once"] = "twice"
    image_min_pixels: int | None = None  # limits of single images; None takes those of a frame
    image_max_pixels: int | None = None
    start: str = "<|vision_start|>"
    end: str = "<|vision_end|>"
    video_pad: str = "<|video_pad|>"
    image_pad: str = "<|image_pad|>"

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.merge_size, self.temporal_patch_size, self.min_pixels)
        if min(sizes) < 1 or self.max_pixels < self.min_pixels:
            raise BundleError(
                f"preprocessing with sizes {sizes} and max_pixels {self.max_pixels} is impossible: "
                "all must be positive and min_pixels <= max_pixels"
            )
        if self.image_max_pixels is not None and (self.image_min_pixels or 0) > self.image_max_pixels:
            raise BundleError(
                f"image_min_pixels {self.image_min_pixels} is above image_max_pixels {self.image_max_pixels}"
            )

    @property
    def factor(self) -> int:
        """Pixels along one side of a token."""
        return self.patch_size * self.merge_size

    def frame_max_pixels(self, num_frames: int) -> float:
        """The limit for each of `num_frames` frames, never so low that it falls under `min_pixels`."""
        if self.total_pixels is None:
            return self.max_pixels
        share = self.total_pixels / num_frames * self.temporal_patch_size
        return min(self.max_pixels, max(share, int(self.min_pixels * 1.05)))

    def with_options(self, **given: Any) -> QwenVLPreprocessing:
        """A limit that is given draws the other one with it."""
        low = given.get("min_pixels")
        high = given.get("max_pixels")
        if high is not None and low is None:
            given["min_pixels"] = min(self.min_pixels, high)
        if high is not None and self.image_max_pixels is not None:
            given["image_max_pixels"] = min(self.image_max_pixels, high)
            given["image_min_pixels"] = min(self.image_min_pixels or self.min_pixels, high)
        if given.get("total_pixels") is not None:
            given["total_pixels"] = float(given["total_pixels"])
        return super().with_options(**given)

    def frame_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that each of so many frames is resized to."""
        return smart_resize(height, width, self.factor, self.min_pixels, self.frame_max_pixels(num_frames))

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that an image is resized to."""
        if self.image_max_pixels is None:
            return self.frame_size(1, height, width)
        low = self.min_pixels if self.image_min_pixels is None else self.image_min_pixels
        return smart_resize(height, width, self.factor, low, self.image_max_pixels)

    def frames_per_patch(self) -> int:
        """Frames of a temporal grid."""
        return self.temporal_patch_size

    def block_side(self) -> int:
        """Patches along one side of a merge block."""
        return self.merge_size

    def most_pixels(self) -> int:
        """The lower limits, up to which small pictures are enlarged."""
        return max(self.min_pixels, self.image_min_pixels or 0)

    def picture_patches(self) -> tuple[int, int]:
        """Within the limits of frames and images, less what whole tokens round off, more where one side is a token."""
        lows = (self.min_pixels, self.image_min_pixels)
        highs = (self.max_pixels, self.image_max_pixels)
        low = min(limit for limit in lows if limit is not None)
        high = max(limit for limit in highs if limit is not None)
        factor = self.factor
        ratio = math.sqrt(MAX_ASPECT_RATIO)
        rounded_up = (math.sqrt(low) / ratio + factor) * (math.sqrt(low) * ratio + factor)
        most = max(high, rounded_up, math.sqrt(high) * ratio * factor)
        least = low / 4  # rounded down to whole tokens, a side loses less than half of itself
        fewest = max(1, int(least // factor**2)) * self.merge_size**2
        fullest = max(1, int(most // factor**2)) * self.merge_size**2
        return fewest, fullest

    def video(self, video: Video, index: int = 0) -> VisualInput:
        """One run of rows between the start and the end token; a place of the grid is a track."""
        return self.shown(self.patches(video), self.video_pad)

    def shrink(self, frame: NDArray[np.uint8], count: int) -> tuple[NDArray[np.uint8], ...]:
        """The frame in the size that all of so many get."""
        height, width = _grid(count, self.frame_size(count, *frame.shape[:2]), self)[1:]
        return (self.resized(frame, height * self.patch_size, width * self.patch_size),)

    def resized(self, frame: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
        """A frame in another size, rounded as often as this checkpoint's processor does."""
        by = resize if self.resize_rounding == "twice" else resize_rounded_once
        return by(frame, height, width, self.resample)

    def patches(self, video: Video) -> Tiles:
        """A video's frames, resized and cut."""
        (frames,) = self.pictures(video)
        return patchify(frames, self, (frames.shape[1], frames.shape[2]))

    def image(self, pixels: NDArray[np.uint8], index: int = 0) -> VisualInput:
        """A video of one temporal grid."""
        check_frames(pixels[None])
        size = self.image_size(*pixels.shape[:2])
        return self.shown(patchify(pixels[None], self, size), self.image_pad)

    def panels(self, height: int, width: int, frames: int | None = None) -> list[Panel]:
        """One for each temporal grid."""
        count = frames or 1
        depth = self.temporal_patch_size
        size = self.image_size(height, width) if frames is None else self.frame_size(count, height, width)
        grid = _grid(count, size, self).merged(self.merge_size)
        boxes = cells(even(grid.height), even(grid.width))
        return [Panel(range(first, min(first + depth, count)), boxes) for first in range(0, count, depth)]

    def longest_track(self, max_frames: int) -> int:
        """A token for each temporal grid."""
        return -(-max_frames // self.temporal_patch_size)

    def shown(self, tiles: Tiles, pad: str, interval: float = 1.0) -> VisualInput:
        """One run of rows between start and end; temporal grids are `interval` positions apart, rounded down."""
        grid = tiles.grid.merged(self.merge_size)
        labels = np.tile(np.arange(grid.height * grid.width), grid.frames)
        pieces: tuple[Piece, ...] = (self.start, Rows(labels, grid_places(grid, interval), pad), self.end)
        return VisualInput((tiles,), pieces)


def smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """The nearest size whose sides divide by `factor` and whose area lies within the limits, shape kept."""
    check_shape(height, width)
    rows = round(height / factor) * factor
    columns = round(width / factor) * factor
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * scale / factor) * factor
        columns = math.ceil(width * scale / factor) * factor
    return rows, columns


def grid_of(num_frames: int, height: int, width: int, preprocessing: QwenVLPreprocessing) -> Grid:
    """The grid that `patchify` will make of frames of this size, without touching a pixel."""
    return _grid(num_frames, preprocessing.frame_size(num_frames, height, width), preprocessing)


def _grid(num_frames: int, size: tuple[int, int], preprocessing: QwenVLPreprocessing) -> Grid:
    patch = preprocessing.patch_size
    return Grid(-(-num_frames // preprocessing.temporal_patch_size), size[0] // patch, size[1] // patch)


def patchify(
    frames: NDArray[np.uint8], preprocessing: QwenVLPreprocessing, size: tuple[int, int] | None = None
) -> Tiles:
    """Cut frames [N, H, W, 3] (an image is N = 1) into patches [T, h * w, 3 * depth * patch ** 2], levels as they are.

    Frames stand `temporal_patch_size` to a patch, the last one repeated until they do. Patches stand in merge blocks:
    block row, block column, row in block, column in block; within a patch: see `BytePatches`.

    Args:
        frames: RGB of one size.
        preprocessing: patch geometry, limits and levels.
        size: height and width in pixels that they are resized to; None takes that of a video's frames.

    Raises:
        VideoError: they are no RGB frames, or too long and thin.
    """
    check_frames(frames)
    # 1. The grid, from sizes alone: room for all patches is taken once.
    num_frames, height, width, _ = frames.shape
    grid = _grid(num_frames, size or preprocessing.frame_size(num_frames, height, width), preprocessing)
    depth = preprocessing.temporal_patch_size
    patch = preprocessing.patch_size
    merge = preprocessing.merge_size
    blocks = (grid.height // merge, grid.width // merge)
    levels = np.empty((grid.frames, *blocks, merge, merge, depth, patch, patch * 3), np.uint8)
    # 2. Frame by frame, so that one resized frame is held at a time: lines of a patch to their places.
    for i, frame in enumerate(frames):
        resized = preprocessing.resized(frame, grid.height * patch, grid.width * patch)
        lines = resized.reshape(blocks[0], merge, patch, blocks[1], merge, patch * 3)
        levels[i // depth, ..., i % depth, :, :] = lines.transpose(0, 3, 1, 4, 2, 5)
    # 3. The last frame again, where a patch lacks frames.
    last = (num_frames - 1) % depth
    levels[-1, ..., last + 1 :, :, :] = levels[-1, ..., last : last + 1, :, :]
    patches = levels.reshape(grid.frames, grid.height * grid.width, -1)
    return Tiles(BytePatches(patches, normalised_levels(preprocessing)), grid)


@frame_rule("qwen2_vl")
def qwen2_vl_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> Indices:
    """Evenly spread frames, first and last included; their number is a multiple of `frame_factor`.

    Raises:
        VideoError: the film has fewer frames than the model needs.
    """
    factor = sampling.frame_factor
    low = -(-sampling.min_frames // factor) * factor
    high = sampling.max_frames // factor * factor
    wanted = min(max(total_frames / video_fps * sampling.fps, low), high, total_frames)
    count = int(wanted // factor) * factor
    if count < factor:
        raise VideoError(
            f"the video has {total_frames} frame(s), the model needs {factor} or more: give a longer clip, or an image"
        )
    return linspace_fp32(total_frames - 1, count).round().astype(np.int64)
