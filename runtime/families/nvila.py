"""NVILA's rule: square frames, some averaged to one, a line feed behind each; a single image may be cut into tiles.

    video    (Q rows, "\\n") for each group of frames
    image    Q rows, "\\n"
    tiles    (Q rows, "\\n", the text "\\n") for each tile, line by line, then for the small view
    scales   Q rows for each tile of the finest scale, line by line across all tiles, "\\n"

Q is what is left of a picture after the tower has joined blocks of patches, and of a video's after pooling too.
FrameFusion's patch_type of a video's rows is their place in the frame, and the line feed is the place after them.
Knows no tokenizer, and of the tower how its rows are pooled and its scales brought together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError, VideoError
from framefusion.runtime.media.frame_sampling import FrameSampling, Indices, frame_rule
from framefusion.runtime.media.preprocess import (
    BICUBIC,
    BLOCK,
    SIDE,
    TILES,
    Preprocessing,
    check_frames,
    cut_bytes,
    resize,
)
from framefusion.runtime.media.tiles.anyres import cut_tiles, nearest_tiling
from framefusion.runtime.media.tiles.panels import Panel, Spans, cells, even, tiled, within
from framefusion.runtime.media.tiles.pooling import block_matrix
from framefusion.runtime.media.tiles.scales import scale_taps, single_taps, tile_places
from framefusion.runtime.media.tower_kinds import COUNT, Range, TowerCall, TowerSettings
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.visual_input import Grid, Piece, RowMap, Rows, Tiles, Token, VisualInput
from framefusion.storage.records import Rule

ASPECTS = ("resize", "dynamic", "dynamic_s2")
AVERAGE = "average"
SCALES = "scales"
"""What the tower does to tiles: average rows within a frame, bring all scales of an image together."""


@dataclass(frozen=True, kw_only=True)
class NvilaPreprocessing(Preprocessing):
    """What config.json says of pictures.

    Attributes:
        image_size: side of a frame, an image and a tile in pixels.
        merge_size: side of the blocks of patches that the tower joins.
        pool_sizes: frames, lines and columns of blocks that are averaged to one, in a video.
        image_aspect_ratio: what becomes of an image that is the only one of its conversation: "resize" makes it one
            picture, "dynamic" tiles, "dynamic_s2" tiles at several scales. Of several images each is one picture.
        min_tiles, max_tiles: how many tiles, the small view not counted.
        scales: tiles along one side at each scale, coarsest first; the finest one takes the image's shape.
        video_end, image_end: what stands behind each picture, a token; "" for nothing.
    """

    rule: ClassVar[str] = "nvila"
    byte_patches: ClassVar[bool] = True
    field_rules: ClassVar[Mapping[str, Rule]] = {
        "image_size": SIDE,
        "merge_size": BLOCK,
        "pool_sizes": Rule(SIDE.least, SIDE.most, items=3),
        "min_tiles": TILES,
        "max_tiles": TILES,
        "scales": Rule(1, 64, items=16),
    }

    image_size: int = 448
    merge_size: int = 2
    pool_sizes: tuple[int, ...] = (1, 1, 1)
    image_aspect_ratio: str = "resize"
    min_tiles: int = 1
    max_tiles: int = 12
    scales: tuple[int, ...] = ()
    video_end: str = "\n"
    image_end: str = "\n"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_size < 1 or self.image_size < self.patch_size * self.merge_size:
            raise BundleError(
                f"pictures of {self.image_size} pixels hold no block of {self.merge_size} patches of {self.patch_size}"
            )
        if len(self.pool_sizes) != 3 or min(self.pool_sizes) < 1 or any(self.blocks % p for p in self.pool_sizes[1:]):
            raise BundleError(
                f"pool_sizes {self.pool_sizes} do not divide {self.blocks} x {self.blocks} blocks: "
                "give frames, lines and columns of whole parts"
            )
        if self.image_aspect_ratio not in ASPECTS:
            raise BundleError(f"image_aspect_ratio {self.image_aspect_ratio!r} is unknown: use {', '.join(ASPECTS)}")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise BundleError(f"min_tiles {self.min_tiles} and max_tiles {self.max_tiles}: give 1 <= min <= max")
        if self.image_aspect_ratio == "dynamic_s2" and (not self.scales or min(self.scales) < 1):
            raise BundleError(f"scales {self.scales} show no image: give the tiles along one side at each scale")

    @property
    def side(self) -> int:
        """Patches along one side of a picture."""
        return self.image_size // self.patch_size

    @property
    def blocks(self) -> int:
        """Blocks along one side of a picture; those at the edge may be padded."""
        return -(-self.side // self.merge_size)

    def for_images(self, count: int) -> NvilaPreprocessing:
        """What shows each image of a conversation with `count` of them: tiles are for a single one."""
        return self if count == 1 else replace(self, image_aspect_ratio="resize")

    def video(self, video: Video, index: int = 0) -> VisualInput:
        """A place of the pooled frame is a track, and the line feed behind each is one, too.

        Raises:
            VideoError: the number of frames does not fill groups of those that are averaged.
        """
        (pooled, tall, wide) = self.pool_sizes
        frames = len(video.indices)
        if frames % pooled:
            raise VideoError(
                f"{frames} frame(s) were sampled and this model averages {pooled} to one: sample a multiple of "
                f"{pooled}, such as {_whole_groups(video, pooled)}"
            )
        (pictures,) = self.pictures(video)
        rows = self.blocks**2 // (tall * wide)
        pieces = list(self._ended(rows, 0, self.video_end)) * (frames // pooled)
        return VisualInput((self._tiles(pictures, pooled, AVERAGE if tall * wide > 1 else ""),), tuple(pieces))

    def shrink(self, frame: NDArray[np.uint8], count: int) -> tuple[NDArray[np.uint8], ...]:
        """The square, shape not kept."""
        return (self._squeezed(frame),)

    def image(self, pixels: NDArray[np.uint8], index: int = 0) -> VisualInput:
        """Nothing merges within an image: each of its rows is a track of its own."""
        check_frames(pixels[None])
        if self.image_aspect_ratio == "dynamic_s2":
            return self._scaled(pixels)
        tiled = self.image_aspect_ratio == "dynamic"
        pictures = self._cut(pixels) if tiled else self._squeezed(pixels)[None]
        rows = self.blocks**2
        pieces = list[Piece]()
        for number in range(len(pictures)):
            pieces += self._ended(rows, number * (rows + 1), self.image_end)
            pieces += ["\n"] * tiled
        return VisualInput((self._tiles(pictures, 1),), tuple(pieces))

    def panels(self, height: int, width: int, frames: int | None = None) -> list[Panel]:
        """One for each group of frames; an image's tiles, and its small view."""
        if frames is not None:
            pooled, tall, wide = self.pool_sizes
            boxes = cells(self._spans(tall), self._spans(wide))
            return [Panel(range(first, first + pooled), boxes) for first in range(0, frames, pooled)]
        blocks = cells(self._spans(), self._spans())
        if self.image_aspect_ratio == "resize":
            return [Panel(range(1), blocks)]
        scaled = self.image_aspect_ratio == "dynamic_s2"
        least = self.scales[-1] ** 2 if scaled else self.min_tiles
        most = self.max_tiles
        rows, columns = nearest_tiling(height, width, self.image_size, least, most)
        if scaled:
            return [Panel(range(1), cells(tiled(self._spans(), rows), tiled(self._spans(), columns)))]
        tiles = Panel(range(1), within(blocks, cells(even(rows), even(columns))), "tiles")
        return [tiles, Panel(range(1), blocks, "small view")] if rows * columns > 1 else [tiles]

    def longest_track(self, max_frames: int) -> int:
        """A token for each group of frames."""
        return -(-max_frames // self.pool_sizes[0])

    def video_tokens(self, max_frames: int) -> int:
        """Rows of each group of frames and the line feed behind them."""
        rows = self.blocks**2 // (self.pool_sizes[1] * self.pool_sizes[2])
        return self.longest_track(max_frames) * (rows + 1)

    def block_side(self) -> int:
        """That of the blocks which the tower joins."""
        return self.merge_size

    def most_pixels(self) -> int:
        """All tiles that an image may be cut into, of the finest scale too, and the small view."""
        tiles = max(self.min_tiles, self.max_tiles, *(scale**2 for scale in self.scales))
        return self.image_size**2 * (tiles + 1)

    def picture_patches(self) -> tuple[int, int]:
        """One tile, up to a group of frames or all tiles of all scales."""
        coarse = sum(count**2 for count in self.scales[:-1])
        most = coarse + max(self.max_tiles, self.scales[-1] ** 2) if self.image_aspect_ratio == "dynamic_s2" else 1
        return self.side**2, max(self.pool_sizes[0], most) * self.side**2

    def _cut(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Tiles of the tiling nearest to the image's shape and, where they are several, the whole image small."""
        size = self.image_size
        height, width, _ = pixels.shape
        rows, columns = nearest_tiling(height, width, size, self.min_tiles, self.max_tiles)
        tiles = cut_tiles(resize(pixels, rows * size, columns * size, BICUBIC), size)
        return tiles if len(tiles) == 1 else np.concatenate((tiles, resize(pixels, size, size, BICUBIC)[None]))

    def _scaled(self, pixels: NDArray[np.uint8]) -> VisualInput:
        """All scales one after the other; only the finest has the image's shape, and only its places are rows."""
        size = self.image_size
        (height, width, _) = pixels.shape
        # 1. Pixels to tiles of every scale, coarsest first; they are one picture of the tower.
        (*coarse, finest) = self.scales
        rows, columns = nearest_tiling(height, width, size, finest**2, self.max_tiles)
        tilings = [(count, count) for count in coarse] + [(rows, columns)]
        tiles = [cut_tiles(resize(pixels, tall * size, wide * size, BICUBIC), size) for tall, wide in tilings]
        patches = cut_bytes(np.concatenate(tiles), self).reshaped(1)
        grid = Grid(1, rows * self.side, columns * self.side)
        # 2. The tower's rows, tile by tile of the finest scale, to lines across all tiles.
        order = tile_places(rows, columns, self.blocks).reshape(-1, 1)
        pieces = tuple(self._ended(order.size, 0, self.image_end))
        return VisualInput((Tiles(patches, grid, SCALES),), pieces, RowMap(order))

    def _spans(self, pooled: int = 1) -> Spans:
        """Where so many blocks at a time lie along a picture; the last block may be padded."""
        edges = np.minimum(np.arange(0, self.blocks + 1, pooled) * self.merge_size, self.side)
        edges = edges * self.patch_size / self.image_size
        return np.stack((edges[:-1], edges[1:]), axis=1)

    def _squeezed(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return resize(picture, self.image_size, self.image_size, self.resample)

    def _ended(self, rows: int, first: int, end: str) -> Iterator[Piece]:
        """A picture's rows and the token behind them, at the places from `first` on."""
        yield Rows(np.arange(first, first + rows))
        if end:
            yield Token(end, first + rows)

    def _tiles(self, pictures: NDArray[np.uint8], pooled: int, pool: str = "") -> Tiles:
        """Groups of `pooled` pictures, whose patches stand one picture after the other."""
        grid = Grid(len(pictures) // pooled, pooled * self.side, self.side)
        return Tiles(cut_bytes(pictures, self).reshaped(grid.frames), grid, pool)


def _whole_groups(video: Video, pooled: int) -> str:
    """Flags that sample a multiple of `pooled` frames from a film of which another number was sampled."""
    frames = len(video.indices)
    if frames > pooled:
        return f"--max-frames {frames // pooled * pooled}"
    fps = math.ceil(100 * pooled / video.duration) / 100  # frames at times below the film's length: never fewer
    return f"--fps {fps:g} --max-frames {pooled}"


@dataclass(frozen=True, kw_only=True)
class BlockPooledSettings(TowerSettings):
    """Blocks of patches are averaged in videos, and kept in images.

    Attributes:
        blocks: along one side of a picture.
        pool_sizes: lines and columns of blocks that are averaged to one.
        patches: of a picture; None: within those that are encoded at once.
    """

    kind: ClassVar[str] = "block_pooled"
    inputs: ClassVar[tuple[str, ...]] = ("pool",)
    field_rules: ClassVar[Mapping[str, Rule]] = {"blocks": COUNT, "pool_sizes": COUNT, "patches": COUNT}

    blocks: int
    pool_sizes: tuple[int, ...]
    patches: int | None = None

    def __post_init__(self) -> None:
        if len(self.pool_sizes) != 2:
            raise BundleError(f"pool_sizes {self.pool_sizes} are not two: give lines and columns")

    def call(self, tiles: Tiles, head_dim: int) -> TowerCall:
        """pool [Q, blocks^2]: what each row takes of each block."""
        (tall, wide) = self.pool_sizes
        matrix = block_matrix(self.blocks, (tall, wide) if tiles.pool else (1, 1))
        return TowerCall({"pool": matrix}, len(matrix))

    def whole_picture(self) -> int:
        """`patches`, or 0."""
        return self.patches or 0

    def ranges(self, low: int, high: int) -> Mapping[str, Range]:
        """rows: an image keeps all blocks."""
        return {"rows": (1, self.blocks**2, self.blocks**2)}


@dataclass(frozen=True, kw_only=True)
class ScalesSettings(TowerSettings):
    """An image at several scales, each in tiles; a frame of a video is one tile for all of them.

    Attributes:
        rows: of a tile.
        side: patches along one side of a tile.
        scales: tiles along one side at each scale, coarsest first; the finest takes the image's shape.
        most: patches along an axis that may meet in one place.
    """

    kind: ClassVar[str] = "scales"
    inputs: ClassVar[tuple[str, ...]] = ("taps", "shares")
    field_rules: ClassVar[Mapping[str, Rule]] = {
        "rows": COUNT, "side": COUNT, "scales": Rule(1, 64, items=16), "most": COUNT
    }  # fmt: skip

    rows: int
    side: int
    scales: tuple[int, ...]
    most: int

    def __post_init__(self) -> None:
        if not self.scales:
            raise BundleError("scales are empty: give the tiles along one side at each scale")

    def call(self, tiles: Tiles, head_dim: int) -> TowerCall:
        """taps, shares [K, S * places of the finest scale]: which patches meet in each place, and their shares."""
        if not tiles.pool:  # a frame
            taps = single_taps(len(self.scales), self.side**2, self.most)
            return TowerCall({"taps": taps.patches, "shares": taps.shares}, self.rows)
        tall = tiles.grid.height // self.side
        wide = tiles.grid.width // self.side
        taps = scale_taps([*((count, count) for count in self.scales[:-1]), (tall, wide)], self.side, self.most)
        return TowerCall({"taps": taps.patches, "shares": taps.shares}, tall * wide * self.rows)

    def patch_step(self) -> int:
        """Patches of a tile."""
        return self.side**2

    def rowless_patches(self) -> int:
        """Those of the coarser scales."""
        return self.side**2 * sum(count**2 for count in self.scales[:-1])

    def ranges(self, low: int, high: int) -> Mapping[str, Range]:
        """places: those of the finest scale, at every scale."""
        count = len(self.scales)
        return {"places": (count * self.side**2, count * high, count * high)}


@frame_rule("nvila")
def nvila_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> Indices:
    """Evenly spread frames, first and last included, however short the video (`force`); else `fps` frames a second.

    A short video gives some frames several times, as many as the model was trained with.
    """
    if sampling.force:
        return np.linspace(0, total_frames - 1, sampling.max_frames).round().astype(np.int64)
    step = 1 / sampling.fps
    times = np.arange(min(math.ceil(total_frames / video_fps / step), sampling.max_frames)) * step
    indices = (times * video_fps).astype(np.int64)
    return indices[indices < total_frames]  # the last time may round up to the end
