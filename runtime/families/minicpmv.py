"""MiniCPM-V 2.6's rule: each frame as an overview and, where it is large, slices of it, all near 448 x 448 pixels.

    <image> Q rows </image> [<slice> Q rows </slice> <slice> Q rows </slice> ... "\\n" between rows of slices]

Frames, and what follows them in their turn, are joined by a line feed. In a video FrameFusion's patch_type counts the
tags and line feeds of a frame as places too (they repeat in every frame, so they merge), from the first row of the
first frame to the line feed behind the last; the first `<image>` alone is text. A single picture has no track to merge
along: its tags are text, and each row is a place of its own. Knows no tokenizer, and
of the tower which rows of its two position tables a picture takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError
from framefusion.runtime.media.frame_sampling import FrameSampling, Indices, frame_rule
from framefusion.runtime.media.preprocess import (
    MAX_ASPECT_RATIO,
    SIDE,
    TILES,
    Preprocessing,
    check_frames,
    check_shape,
    cut_bytes,
    resize,
)
from framefusion.runtime.media.tiles.panels import WHOLE, Panel, cells, even
from framefusion.runtime.media.tower_kinds import COUNT, TowerCall, TowerSettings
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.visual_input import Grid, Piece, RowMap, Rows, Tiles, Token, VisualInput
from framefusion.runtime.text.positions import sincos_table
from framefusion.storage.records import Rule

LINE_FEED = "\n"


class Layout(NamedTuple):
    """How a picture is cut; sides in patches."""

    overview: tuple[int, int]  # rows, columns
    grid: tuple[int, int]  # rows and columns of slices; (0, 0) where the overview is all
    slice: tuple[int, int]  # rows, columns of each

    @property
    def num_slices(self) -> int:
        """Slices beside the overview."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, kw_only=True)
class MiniCpmVPreprocessing(Preprocessing):
    """What config.json and preprocessor_config.json say, and how finely frames of a video are cut."""

    rule: ClassVar[str] = "minicpmv"
    byte_patches: ClassVar[bool] = True
    field_rules: ClassVar[Mapping[str, Rule]] = {
        "query_num": TILES,
        "scale_resolution": SIDE,
        "image_slices": TILES,
        "max_slice_nums": TILES,
    }
    pixels: ClassVar[str] = "pictures are cut by --max-slice-nums"

    query_num: int  # rows of the tower a picture
    scale_resolution: int  # side of the square whose area each picture gets
    image_slices: int  # most slices of an image
    max_slice_nums: int = 2  # most slices of a frame of a video
    use_image_id: bool = True  # images are numbered; frames never are
    image_start: str = "<image>"
    image_end: str = "</image>"
    slice_start: str = "<slice>"
    slice_end: str = "</slice>"
    id_start: str = "<image_id>"
    id_end: str = "</image_id>"
    pad: str = "<unk>"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("query_num", "scale_resolution", "image_slices", "max_slice_nums"):
            if getattr(self, name) < 1:
                raise BundleError(f"{name} {getattr(self, name)} is impossible: it must be 1 or more")

    def video(self, video: Video, index: int = 0) -> VisualInput:
        """Overviews of all frames, then slices of all frames; the prompt shows them frame by frame."""
        # 1. Frames to tiles: all frames have one size, so they are cut alike.
        pictures = self.pictures(video)
        count, height, width, _ = video.frames.shape
        layout = layout_of(height, width, self.max_slice_nums, self)
        tiles = cut(pictures, layout, self)
        # 2. The tower's rows, overviews first, to the prompt's, frame by frame.
        rows = self._row_map(layout, count)
        # 3. Pieces: a place of the frame is a track, tags and line feeds among them.
        if count == 1:
            return VisualInput(tiles, self._picture(layout), rows)
        frame = self._frame(layout)
        places = sum(piece.labels.size if isinstance(piece, Rows) else 1 for piece in frame)
        between = (Token(LINE_FEED, places), Token(self.image_start, places + 1))
        pieces = (self.image_start, *frame, *(between + frame) * (count - 1))
        return VisualInput(tiles, pieces, rows, joint=places)

    def shrink(self, frame: NDArray[np.uint8], count: int) -> tuple[NDArray[np.uint8], ...]:
        """The overview and, where there are slices, all of them side by side as they are cut."""
        height, width, _ = frame.shape
        return uncut(frame, layout_of(height, width, self.max_slice_nums, self), self)

    def image(self, pixels: NDArray[np.uint8], index: int = 0) -> VisualInput:
        """A picture cut as finely as the checkpoint asks, with its number in front."""
        check_frames(pixels[None])
        height, width, _ = pixels.shape
        layout = layout_of(height, width, self.image_slices, self)
        number = f"{self.id_start}{index}{self.id_end}" if self.use_image_id else ""
        pieces = (number, *self._picture(layout))
        pictures = tuple(picture[None] for picture in uncut(pixels, layout, self))
        return VisualInput(cut(pictures, layout, self), pieces, self._row_map(layout, 1))

    def panels(self, height: int, width: int, frames: int | None = None) -> list[Panel]:
        """For each frame its overview and its slices: rows are learned queries, which look at all of either."""
        layout = layout_of(height, width, self.image_slices if frames is None else self.max_slice_nums, self)
        overview = np.tile(np.array(WHOLE), (self.query_num, 1))
        slices = np.repeat(cells(*map(even, layout.grid)), self.query_num, axis=0)
        shown = [(overview, "overview"), (slices, "slices")][: 2 if layout.num_slices else 1]
        return [Panel(range(f, f + 1), boxes, name) for f in range(frames or 1) for boxes, name in shown]

    def longest_track(self, max_frames: int) -> int:
        """A token for each frame."""
        return max_frames

    def video_tokens(self, max_frames: int) -> int:
        """Rows and tags of each frame at its finest cut, and the line feed behind it."""
        pictures = 1 if self.max_slice_nums == 1 else 1 + self.max_slice_nums
        return max_frames * pictures * (self.query_num + 3)

    def most_pixels(self) -> int:
        """All slices of an image or a frame, and the overview."""
        return self.scale_resolution**2 * (max(self.image_slices, self.max_slice_nums) + 1)

    def picture_patches(self) -> tuple[int, int]:
        """About those of the square: its area is kept, and each side rounded to a patch."""
        side = self.scale_resolution / self.patch_size
        longest = longest_side(self)
        return max(1, math.floor(side**2 - longest)), math.ceil(side**2 + longest)

    def _tags(self, layout: Layout) -> Iterator[str | None]:
        """One picture: its tags, with None where the rows of a tile stand."""
        yield from (self.image_start, None, self.image_end)
        rows, columns = layout.grid
        for row in range(rows):
            yield from (LINE_FEED,) if row else ()
            yield from (self.slice_start, None, self.slice_end) * columns

    def _frame(self, layout: Layout) -> tuple[Rows | Token, ...]:
        """A frame of a video behind its first tag: rows, tags and line feeds are all places of the frame."""
        pieces: list[Rows | Token] = []
        place = 0
        for tag in list(self._tags(layout))[1:]:
            rows = self.query_num if tag is None else 1
            pieces.append(Token(tag, place) if tag else Rows(np.arange(place, place + rows), pad=self.pad))
            place += rows
        return tuple(pieces)

    def _picture(self, layout: Layout) -> tuple[Piece, ...]:
        """A single picture: tags are text, every row is a place of its own."""
        pieces: list[Piece] = []
        first = 0
        for tag in self._tags(layout):
            pieces.append(tag or Rows(np.arange(first, first + self.query_num), pad=self.pad))
            first += 0 if tag else self.query_num
        return tuple(pieces)

    def _row_map(self, layout: Layout, count: int) -> RowMap | None:
        """The prompt's rows: those of a frame's overview, then those of its slices."""
        if not layout.num_slices:
            return None
        rows = np.arange(count * (1 + layout.num_slices) * self.query_num)
        overviews, slices = np.split(rows, [count * self.query_num])
        by_frame = np.concatenate((overviews.reshape(count, -1), slices.reshape(count, -1)), axis=1)
        return RowMap(by_frame.reshape(-1, 1))


def layout_of(height: int, width: int, most_slices: int, preprocessing: MiniCpmVPreprocessing) -> Layout:
    """How a picture of this size is cut into at most `most_slices` slices.

    Raises:
        VideoError: it is too long and thin.
    """
    check_shape(height, width)
    area = preprocessing.scale_resolution**2
    overview = _scaled(height, width, preprocessing)
    wanted = min(math.ceil(width * height / area), most_slices)
    if wanted <= 1:
        return Layout(overview, (0, 0), (0, 0))
    rows, columns = _best_grid(height, width, wanted, most_slices)
    return Layout(overview, (rows, columns), _scaled(round(height / rows), round(width / columns), preprocessing))


def _best_grid(height: int, width: int, wanted: int, most: int) -> tuple[int, int]:
    """Rows and columns of about `wanted` slices whose outline is nearest to the picture's, fewer columns at a tie."""
    grids = [
        (count // columns, columns)
        for count in (wanted - 1, wanted, wanted + 1)
        if 1 < count <= most
        for columns in range(1, count + 1)
        if count % columns == 0
    ]
    aspect = math.log(width / height)
    return min(grids, key=lambda grid: abs(aspect - math.log(grid[1] / grid[0])))


def _scaled(height: int, width: int, preprocessing: MiniCpmVPreprocessing) -> tuple[int, int]:
    """Rows and columns of patches of a picture scaled to the area of the square, its shape kept."""
    aspect = width / height
    scaled_height = int(preprocessing.scale_resolution / math.sqrt(aspect))
    scaled_width = int(scaled_height * aspect)
    rows = max(round(scaled_height / preprocessing.patch_size), 1)
    columns = max(round(scaled_width / preprocessing.patch_size), 1)
    return rows, columns


def longest_side(preprocessing: MiniCpmVPreprocessing) -> int:
    """Most patches along one axis of any picture."""
    longest = preprocessing.scale_resolution * math.sqrt(MAX_ASPECT_RATIO)
    return math.ceil(longest / preprocessing.patch_size) + 1


def uncut(
    frame: NDArray[np.uint8], layout: Layout, preprocessing: MiniCpmVPreprocessing
) -> tuple[NDArray[np.uint8], ...]:
    """A picture [H, W, 3] as its overview and, where the layout has slices, as large as all of them."""
    sizes = [(layout.overview, (1, 1)), (layout.slice, layout.grid)][: 2 if layout.num_slices else 1]
    patch = preprocessing.patch_size
    return tuple(
        resize(frame, rows * size[0] * patch, columns * size[1] * patch, preprocessing.resample)
        for size, (rows, columns) in sizes
    )


def cut(
    pictures: tuple[NDArray[np.uint8], ...], layout: Layout, preprocessing: MiniCpmVPreprocessing
) -> tuple[Tiles, ...]:
    """Overviews, and slices where the layout has any, of `uncut` pictures [N, h, w, 3]: frame by frame, row by row."""
    tiles = [_tiles(pictures[0], layout.overview, (1, 1), preprocessing)]
    if layout.num_slices:
        tiles.append(_tiles(pictures[1], layout.slice, layout.grid, preprocessing))
    return tuple(tiles)


def _tiles(
    whole: NDArray[np.uint8], size: tuple[int, int], grid: tuple[int, int], preprocessing: MiniCpmVPreprocessing
) -> Tiles:
    """Pictures cut along a grid into tiles of this many patches."""
    height = size[0] * preprocessing.patch_size
    width = size[1] * preprocessing.patch_size
    rows, columns = grid
    count = len(whole) * grid[0] * grid[1]
    pictures = whole.reshape(len(whole), rows, height, columns, width, 3).swapaxes(2, 3)
    patches = cut_bytes(pictures.reshape(count, height, width, 3), preprocessing)
    return Tiles(patches, Grid(count, *size))


@dataclass(frozen=True, kw_only=True)
class ResamplerSettings(TowerSettings):
    """Rows of the encoder's position table, and the resampler's own table.

    Attributes:
        rows: of a picture.
        width: channels of the resampler's table.
        side: entries of the encoder's table along one side.
        off_floor: [patches, patch, place]: of so many patches along an axis one takes another place than the whole
            number of `patch * side / patches`, by the rounding of the released code.
    """

    kind: ClassVar[str] = "resampler"
    inputs: ClassVar[tuple[str, ...]] = ("places", "sincos")
    field_rules: ClassVar[Mapping[str, Rule]] = {
        "rows": COUNT, "width": COUNT, "side": COUNT, "off_floor": Rule(0, 1 << 20, items=1 << 15)
    }  # fmt: skip

    rows: int
    width: int
    side: int
    off_floor: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for entry in self.off_floor:
            if len(entry) != 3 or not entry[1] < entry[0]:
                raise BundleError(f"off_floor has {entry}, expected a number of patches, one of them and its place")

    def call(self, tiles: Tiles, head_dim: int) -> TowerCall:
        """places [P] in the encoder's table, and sincos [1, P, width]."""
        (_, rows, columns) = tiles.grid
        places = (self._buckets(rows)[:, None] * self.side + self._buckets(columns)).reshape(-1)
        return TowerCall({"places": places, "sincos": sincos_table(rows, columns, self.width)[None]}, self.rows)

    def _buckets(self, count: int) -> NDArray[np.int64]:
        """Which of the places of a side each of `count` patches along an axis takes."""
        places = np.arange(count) * self.side // count
        for patches, patch, place in self.off_floor:
            if patches == count:
                places[patch] = place
        return places


@frame_rule("minicpmv")
def minicpmv_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> Indices:
    """Every n-th frame from the first on, n next to the wanted rate (`force`: 1); of too many, the middles of parts."""
    step = 1 if sampling.force else max(round(video_fps / sampling.fps), 1)
    every = np.arange(0, total_frames, step)
    if every.size <= sampling.max_frames:
        return every
    part = every.size / sampling.max_frames
    return every[[int(i * part + part / 2) for i in range(sampling.max_frames)]]
