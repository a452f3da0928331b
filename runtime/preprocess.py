"""Frames to patches: resize, normalise, and cut in the order the vision tower reads them.

The numbers are Hugging Face's Qwen2-VL image processor's, bit for bit, on Pillow's resize. Reads no files and makes no
tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError, VideoError
from framefusion.runtime.positions import Grid

MAX_ASPECT_RATIO = 200
BICUBIC = 3  # Pillow's number, also in Hugging Face's preprocessor_config.json


@dataclass(frozen=True)
class Preprocessing:
    """How a family turns pixels into patches. Pixel limits are per frame."""

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale: float = 1 / 255
    resample: int = BICUBIC
    # The pixels of all frames together, shared out evenly (qwen_vl_utils: 128000 * 28 * 28 * 0.9); None = no such cap.
    total_pixels: float | None = None

    def __post_init__(self) -> None:
        sizes = (self.patch_size, self.merge_size, self.temporal_patch_size, self.min_pixels)
        if min(sizes) < 1 or self.max_pixels < self.min_pixels:
            raise BundleError(
                f"preprocessing with sizes {sizes} and max_pixels {self.max_pixels} is impossible: "
                "all must be positive and min_pixels <= max_pixels"
            )
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            raise BundleError(
                f"image_mean {self.image_mean} and image_std {self.image_std} need three numbers, std not 0"
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


class Patches(NamedTuple):
    """One video or image as the vision tower takes it."""

    values: NDArray[np.float32]  # [T, h * w, 3 * temporal_patch_size * patch_size ** 2]
    grid: Grid  # T, h, w in patches


def smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """The nearest size whose sides divide by `factor` and whose area lies within the limits, shape kept."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise VideoError(
            f"a picture of {width}x{height} is too long and thin, the limit is {MAX_ASPECT_RATIO} to 1: crop it"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * scale / factor) * factor
        columns = math.ceil(width * scale / factor) * factor
    return rows, columns


def grid_of(num_frames: int, height: int, width: int, preprocessing: Preprocessing) -> Grid:
    """The grid that `patchify` will make of frames of this size, without touching a pixel."""
    max_pixels = preprocessing.frame_max_pixels(num_frames)
    rows, columns = smart_resize(height, width, preprocessing.factor, preprocessing.min_pixels, max_pixels)
    patch = preprocessing.patch_size
    return Grid(-(-num_frames // preprocessing.temporal_patch_size), rows // patch, columns // patch)


def patchify(frames: NDArray[np.uint8], preprocessing: Preprocessing) -> Patches:
    """Cut frames [N, H, W, 3] (an image is N = 1) into normalised patches.

    Frames stand `temporal_patch_size` to a patch, the last one repeated until they do. Patches stand in merge blocks:
    block row, block column, row in block, column in block; within a patch: channel, frame, row, column.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise VideoError(f"frames have shape {frames.shape}: give RGB frames as [frames, height, width, 3]")
    num_frames, height, width, _ = frames.shape
    grid = grid_of(num_frames, height, width, preprocessing)
    depth, patch, merge = preprocessing.temporal_patch_size, preprocessing.patch_size, preprocessing.merge_size
    blocks = (grid.height // merge, grid.width // merge)
    values = np.empty((grid.frames, *blocks, merge, merge, 3, depth, patch, patch), np.float32)
    levels = _normalised_levels(preprocessing)
    for i, frame in enumerate(frames):
        resized = _resize(frame, grid.height * patch, grid.width * patch, preprocessing.resample)
        for channel in range(3):
            plane = levels[channel].take(resized[:, :, channel])  # [h * patch, w * patch]
            plane = plane.reshape(blocks[0], merge, patch, blocks[1], merge, patch)
            values[i // depth, ..., channel, i % depth, :, :] = plane.transpose(0, 3, 1, 4, 2, 5)
    last = (num_frames - 1) % depth
    values[-1, ..., last + 1 :, :, :] = values[-1, ..., last : last + 1, :, :]
    return Patches(values.reshape(grid.frames, grid.height * grid.width, -1), grid)


def _normalised_levels(preprocessing: Preprocessing) -> NDArray[np.float32]:
    """[3, 256]: what each pixel value becomes. A table is both the fastest way and exact: float64 costs 256 values."""
    levels = (np.arange(256) * preprocessing.rescale).astype(np.float32)
    mean = np.array(preprocessing.image_mean, np.float32)[:, None]
    std = np.array(preprocessing.image_std, np.float32)[:, None]
    return (levels - mean) / std


def _resize(frame: NDArray[np.uint8], height: int, width: int, resample: int) -> NDArray[np.uint8]:
    if frame.shape[:2] == (height, width):
        return frame
    from PIL import Image

    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling(resample)))
