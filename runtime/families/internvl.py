"""InternVL's rule: a video's frames are one square tile each; an image is cut into tiles, a small view of it added.

    video   Frame1: <img> Q rows </img> \\n Frame2: <img> Q rows </img>
    image   <img> Q rows for each tile, line by line, then for the small view </img>

Q is a quarter of a tile's patches: the tower joins blocks of 2 x 2. FrameFusion's patch_type of a frame's rows is their
place in the frame; what is written between frames is text, so the reference's window of pruning, which covers it, is
not followed there. Knows neither tower nor tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError
from framefusion.runtime.media.frame_sampling import FrameSampling, Indices, frame_rule
from framefusion.runtime.media.preprocess import BLOCK, SIDE, TILES, Preprocessing, check_frames, cut_bytes, resize
from framefusion.runtime.media.tiles.anyres import cut_tiles, nearest_tiling
from framefusion.runtime.media.tiles.panels import Panel, cells, even, within
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.visual_input import Grid, Piece, Rows, Tiles, VisualInput
from framefusion.storage.records import Rule

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SEPARATOR_TOKENS = 8
"""Of the text between two frames beside its label: tags, a line feed, and a number of which each digit is a token."""
NUMBER = "{}"


@dataclass(frozen=True, kw_only=True)
class InternVLPreprocessing(Preprocessing):
    """Attributes:
    tile_size: side of a tile in pixels.
    merge_size: side of the blocks of patches that the tower joins.
    min_tiles, max_tiles: how many tiles an image may be cut into, the small view not counted; 1 and 1: never cut.
    thumbnail: show the small view of an image that is cut.
    start, pad, end: tokens before, at and after the rows.
    frame_label, image_label: template text before a frame of a video, and before an image among others; {} is its
        number, from 1 on. "" writes none.
    """

    rule: ClassVar[str] = "internvl"
    byte_patches: ClassVar[bool] = True
    field_rules: ClassVar[Mapping[str, Rule]] = {
        "tile_size": SIDE,
        "merge_size": BLOCK,
        "min_tiles": TILES,
        "max_tiles": TILES,
    }

    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    tile_size: int = 448
    merge_size: int = 2
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    start: str = "<img>"
    pad: str = "<IMG_CONTEXT>"
    end: str = "</img>"
    frame_label: str = "Frame{}: "
    image_label: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for label in (self.frame_label, self.image_label):
            if label and (label.count("{") != 1 or label.count("}") != 1 or NUMBER not in label):
                raise BundleError(f"a label {label!r} has no place for a number: write it once as {NUMBER}")
        block = self.patch_size * self.merge_size
        if self.merge_size < 1 or self.tile_size < block or self.tile_size % block:
            raise BundleError(
                f"tiles of {self.tile_size} pixels are no whole blocks of {self.merge_size} patches of "
                f"{self.patch_size} pixels: the checkpoint is of another kind"
            )
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise BundleError(
                f"min_tiles {self.min_tiles} and max_tiles {self.max_tiles} allow no image: give 1 <= min <= max"
            )

    @property
    def rows_per_tile(self) -> int:
        """Rows of the prompt for each tile."""
        return (self.tile_size // self.patch_size // self.merge_size) ** 2

    def for_images(self, count: int) -> InternVLPreprocessing:
        """An image that is the only one has no label."""
        return self if count > 1 else replace(self, image_label="")

    def video(self, video: Video, index: int = 0) -> VisualInput:
        """One tile a frame; a place of the tile is a track."""
        (tiles,) = self.pictures(video)
        pieces: list[Piece] = []
        for number in range(1, len(tiles) + 1):
            before = f"{self.end}\n" if number > 1 else ""
            pieces += [before + self.frame_label.replace(NUMBER, str(number)) + self.start, self._rows(1)]
        return VisualInput((self._tiles(tiles),), (*pieces, self.end))

    def shrink(self, frame: NDArray[np.uint8], count: int) -> tuple[NDArray[np.uint8], ...]:
        """The square, shape not kept."""
        return (self._squeezed(frame),)

    def image(self, pixels: NDArray[np.uint8], index: int = 0) -> VisualInput:
        """Nothing merges within an image: each of its rows is a track of its own."""
        check_frames(pixels[None])
        # 1. Pixels to tiles, and the small view where there are several.
        rows, columns = self.tiling(*pixels.shape[:2])
        size = self.tile_size
        tiles = cut_tiles(resize(pixels, rows * size, columns * size, self.resample), size)
        if self.thumbnail and len(tiles) > 1:
            tiles = np.concatenate((tiles, self._squeezed(pixels)[None]))
        # 2. One run of rows: nothing stands between tiles in the prompt.
        label = self.image_label.replace(NUMBER, str(index + 1))
        return VisualInput((self._tiles(tiles),), (label + self.start, self._rows(len(tiles)), self.end))

    def panels(self, height: int, width: int, frames: int | None = None) -> list[Panel]:
        """One for each frame; an image's tiles, and its small view."""
        side = self.tile_size // self.patch_size // self.merge_size
        whole = cells(even(side), even(side))
        if frames is not None:
            return [Panel(range(frame, frame + 1), whole) for frame in range(frames)]
        rows, columns = self.tiling(height, width)
        tiles = Panel(range(1), within(whole, cells(even(rows), even(columns))), "tiles")
        return [tiles, Panel(range(1), whole, "small view")] if self.thumbnail and rows * columns > 1 else [tiles]

    def longest_track(self, max_frames: int) -> int:
        """A token for each frame."""
        return max_frames

    def video_tokens(self, max_frames: int) -> int:
        """Rows of each frame, and the text between two."""
        return max_frames * (self.rows_per_tile + SEPARATOR_TOKENS + len(self.frame_label.replace(NUMBER, "")))

    def block_side(self) -> int:
        """That of the blocks which the tower joins."""
        return self.merge_size

    def most_pixels(self) -> int:
        """All tiles, and the small view."""
        return self.tile_size**2 * (self.max_tiles + 1)

    def tiling(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles for an image."""
        return nearest_tiling(height, width, self.tile_size, self.min_tiles, self.max_tiles)

    def _squeezed(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return resize(picture, self.tile_size, self.tile_size, self.resample)

    def _rows(self, tiles: int) -> Rows:
        return Rows(np.arange(tiles * self.rows_per_tile), pad=self.pad)

    def _tiles(self, tiles: NDArray[np.uint8]) -> Tiles:
        side = self.tile_size // self.patch_size
        return Tiles(cut_bytes(tiles, self), Grid(len(tiles), side, side))


@frame_rule("internvl_chat")
def internvl_chat_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> Indices:
    """Near the middle of each of n equal parts: see `_parts`; a film of fewer frames shows some of them again."""
    count = _parts(total_frames, video_fps, sampling)
    part = (total_frames - 1) / count
    return (part / 2 + np.round(part * np.arange(count))).astype(np.int64)


@frame_rule("internvl")
def internvl_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> Indices:
    """The middle of each of n equal parts: see `_parts`; no frame twice.

    In fp32, as transformers' `torch.arange` has it: middles that fall on a whole number are common.
    """
    count = min(_parts(total_frames, video_fps, sampling), total_frames)
    part = total_frames / count
    return (part / 2 + np.arange(count) * part).astype(np.float32).astype(np.int64)


def _parts(total_frames: int, video_fps: float, sampling: FrameSampling) -> int:
    """`max_frames` (`force`), or as many as `fps` asks for up to that."""
    wanted = sampling.max_frames if sampling.force else int(total_frames / video_fps * sampling.fps)
    return max(min(wanted, sampling.max_frames), 1)
