"""Frames to patches, as far as families share it: resize, normalise, cut. Each rule is a subclass of `Preprocessing`.

The numbers are Hugging Face's image processors' on Pillow's resize. Reads no files and knows no tokenizer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BudgetError, BundleError, VideoError
from framefusion.runtime.media.tiles.panels import WHOLE, Panel
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.visual_input import BytePatches, VisualInput
from framefusion.storage.records import Rule

BICUBIC = 3  # Pillow's number, also in Hugging Face's preprocessor_config.json
HALF = (0.5, 0.5, 0.5)
MAX_ASPECT_RATIO = 200
LARGE_PICTURE = 1 << 24
"""Numbers of a picture whose rows are resized in bands."""
BAND = 256

SIDE = Rule(1, 1 << 14)
PIXELS = Rule(1, 1 << 31)
TILES = Rule(1, 4096)
BLOCK = Rule(1, 64)
"""What a manifest may hold for a side in pixels, an area in pixels, a number of tiles, and the side of a block."""

Self = TypeVar("Self", bound="Preprocessing")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a family turns a video or an image into patches and pieces of a prompt: the numbers that a manifest keeps.

    Subclasses are listed in `framefusion.runtime.families`, by `rule`.
    """

    record_tag: ClassVar[str] = "rule"
    rule: ClassVar[str]
    pixels: ClassVar[str] = "the size of its frames is fixed"  # why an option of pixels does not apply
    byte_patches: ClassVar[bool] = False  # whether all its tiles hold `BytePatches`, so that a tower may take them
    field_rules: ClassVar[Mapping[str, Rule]] = {
        "patch_size": SIDE,
        "image_mean": Rule(-1e3, 1e3, items=3),
        "image_std": Rule(0, 1e3, above=True, items=3),
        "rescale": Rule(0, 1e3, above=True),
        "resample": Rule(0, 5),  # Pillow's filters
    }  # what a manifest may hold in each field; a subclass says its own

    patch_size: int = 14
    image_mean: tuple[float, ...] = HALF
    image_std: tuple[float, ...] = HALF
    rescale: float = 1 / 255
    resample: int = BICUBIC

    def __post_init__(self) -> None:
        if self.patch_size < 1:
            raise BundleError(f"patch_size {self.patch_size} is impossible: it must be 1 or more")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            raise BundleError(
                f"image_mean {self.image_mean} and image_std {self.image_std} need three numbers, std not 0"
            )

    @abstractmethod
    def video(self, video: Video, index: int = 0) -> VisualInput:
        """A video, the `index`-th of its conversation.

        Raises:
            VideoError: its frames cannot be shown to this family.
        """

    @abstractmethod
    def shrink(self, frame: NDArray[np.uint8], count: int) -> tuple[NDArray[np.uint8], ...]:
        """The pictures [h, w, 3] that a frame [H, W, 3] of a video of `count` frames is shown as, before patches."""

    def shrunk_place(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Where the first picture of `shrink` lies in a frame, in shares of it; most families show all of it."""
        return WHOLE

    def pictures(self, video: Video) -> tuple[NDArray[np.uint8], ...]:
        """`shrink` of all frames, each [N, h, w, 3]; a video that was shrunk as it was read has them."""
        if video.shrunk:
            return video.shrunk
        check_frames(video.frames)
        frames = [self.shrink(frame, len(video.frames)) for frame in video.frames]
        return tuple(np.stack(alike) for alike in zip(*frames, strict=True))

    @abstractmethod
    def image(self, pixels: NDArray[np.uint8], index: int = 0) -> VisualInput:
        """An image, RGB [H, W, 3], the `index`-th image of its conversation."""

    def for_images(self: Self, count: int) -> Self:
        """The rule for each image of a conversation that shows `count` of them; most families have one rule for all."""
        return self

    @abstractmethod
    def panels(self, height: int, width: int, frames: int | None = None) -> list[Panel]:
        """Where the rows of a video of `frames` frames lie in them, in the prompt's order; None stands for an image."""

    @abstractmethod
    def longest_track(self, max_frames: int) -> int:
        """Tokens in the longest track of a video of `max_frames` frames."""

    def video_tokens(self, max_frames: int) -> int:
        """Most tokens of a prompt that a video of `max_frames` takes; 0 where the size of its frames decides."""
        return 0

    def frames_per_patch(self) -> int:
        """Frames that one patch holds."""
        return 1

    def block_side(self) -> int:
        """Patches along one side of the blocks by which they are ordered."""
        return 1

    @abstractmethod
    def most_pixels(self) -> int:
        """Pixels that a picture may become, however small it is: that much memory is taken before one is read."""

    def picture_patches(self) -> tuple[int, int]:
        """Bounds of the patches of one picture, for towers that take several sizes; not all within them occur."""
        raise NotImplementedError(f"pictures of {self.rule} have one size, which the graph says")

    def with_options(self: Self, **given: Any) -> Self:
        """The same with the fields that a user chose; None leaves a field as it is.

        Raises:
            BudgetError: this family has no such choice, or none of this value.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        known = {field.name for field in fields(self)}
        for name, value in chosen.items():
            if name not in known:
                why = f": {self.pixels}" if "pixels" in name else ""
                raise BudgetError(
                    f"--{name.replace('_', '-')} {value!r} does not apply to this family ({self.rule}){why}; "
                    "leave it out"
                )
        try:
            return replace(self, **chosen)
        except BundleError as error:  # the numbers of a flag, not those of a manifest
            raise BudgetError(str(error)) from None


def normalised_levels(preprocessing: Preprocessing) -> NDArray[np.float32]:
    """What each pixel value of each channel becomes. A table is fast, and as exact as 256 float64s.  [3, 256]"""
    levels = (np.arange(256) * preprocessing.rescale).astype(np.float32)
    mean = np.array(preprocessing.image_mean, np.float32)[:, None]
    std = np.array(preprocessing.image_std, np.float32)[:, None]
    return (levels - mean) / std


def resize(frame: NDArray[np.uint8], height: int, width: int, resample: int) -> NDArray[np.uint8]:
    """RGB [H, W, 3] to another size, shape not kept, bit for bit as Pillow resizes.

    Pillow resizes rows, rounds, then columns. A large picture's rows are resized in bands, which gives the same numbers
    without another copy of the picture.
    """
    if frame.shape[:2] == (height, width):
        return frame
    from PIL import Image

    filter_ = Image.Resampling(resample)
    if frame.size > LARGE_PICTURE and width < frame.shape[1]:
        bands = range(0, len(frame), BAND)
        pieces = (Image.fromarray(frame[top : top + BAND]) for top in bands)
        frame = np.concatenate([np.asarray(piece.resize((width, piece.height), filter_)) for piece in pieces])
    return np.asarray(Image.fromarray(frame).resize((width, height), filter_))


def resize_rounded_once(frame: NDArray[np.uint8], height: int, width: int, resample: int) -> NDArray[np.uint8]:
    """`resize` in floats, rounded once at the end, as torchvision resizes tensors of bytes (qwen-vl-utils).

    RGB [H, W, 3] -> [height, width, 3].
    Pillow rounds and clips twice: after the rows and after the columns. Levels differ by one here and there, by more
    beside hard edges.
    """
    if frame.shape[:2] == (height, width):
        return frame
    from PIL import Image

    resized = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        plane = Image.fromarray(frame[:, :, channel].astype(np.float32))
        levels = np.asarray(plane.resize((width, height), Image.Resampling(resample)))
        resized[:, :, channel] = np.rint(np.clip(levels, 0, 255))
    return resized


def check_frames(frames: NDArray[np.uint8]) -> None:
    """Refuse what are no RGB frames [N, H, W, 3].

    Raises:
        VideoError: another shape, or none of them.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise VideoError(f"frames have shape {frames.shape}: give RGB frames as [frames, height, width, 3]")


def check_shape(height: int, width: int) -> None:
    """Refuse a picture so thin that its short side would be less than a patch.

    Raises:
        VideoError: one side is more than MAX_ASPECT_RATIO times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise VideoError(
            f"a picture of {width}x{height} is too long and thin, the limit is {MAX_ASPECT_RATIO} to 1: crop it"
        )


def cut_bytes(pictures: NDArray[np.uint8], preprocessing: Preprocessing) -> BytePatches:
    """Patches [N, rows * columns, 3 * p * p] of pictures [N, H, W, 3], in raster order; levels stay as they are.

    What is left over at the right and bottom is not used, as in a convolution.
    """
    patch = preprocessing.patch_size
    count, height, width, _ = pictures.shape
    rows = height // patch
    columns = width // patch
    whole = pictures[:, : rows * patch, : columns * patch]
    lines = whole.reshape(count, rows, patch, columns, patch * 3).swapaxes(2, 3)  # [N, rows, columns, p, p * 3]
    return BytePatches(lines.reshape(count, rows * columns, -1), normalised_levels(preprocessing))


def cut_patches(pictures: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """`cut_bytes` in floats, normalised; within a patch: channel, row, column."""
    return cut_bytes(pictures, preprocessing).normalised()
