"""LLaVA's rule: every frame or image becomes square pictures of the one size that the vision tower takes.

    video   each frame squeezed to the square, or its middle cut out; its patches pooled by two in each direction
    image   a small view of all of it, then the tiles of a large one of about its shape; nothing pooled
    image   among others, where the family has it so: one picture, padded to a square

A learned row ends each line of patches, each frame, or the visual. Shared by LLaVA-Video, LLaVA-OneVision and
LLaVA-NeXT-Video; the numbers of this class tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError
from framefusion.reduction.tracks import TEXT
from framefusion.runtime.media.frame_sampling import FrameSampling, Indices, frame_rule
from framefusion.runtime.media.preprocess import PIXELS, SIDE, TILES, Preprocessing, check_frames, cut_bytes, resize
from framefusion.runtime.media.tiles.anyres import (
    best_tiling,
    cut_tiles,
    fitted,
    fitting,
    padded_square,
    rows_shown,
    unpadded,
)
from framefusion.runtime.media.tiles.panels import WHOLE, Boxes, Panel, Spans, cells, even, seen_through, tiled
from framefusion.runtime.media.tiles.scales import tile_places
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.visual_input import Grid, Piece, Rows, Tiles, Token, VisualInput
from framefusion.storage.records import Rule

NEWLINE = "image_newline"
"""The learned row, by its name in `EmbeddingRecord.extra`."""
SHRINK_FROM = 1.1
"""A tiled image with this many times the lines of `max_tiles` tiles, or more, is shrunk to them."""

ROUNDED_RATE = 0.002
"""Share of a film's rate that is rounded away: a little more than 30000/1001 lacks to 30."""

TIME_TOKENS = 9
SENTENCE_TOKENS = 64
"""Room for a time such as "1234.56s," and for the sentence around the times: Qwen2's tokenizer splits every digit."""

PoolMode = Literal["average", "bilinear"]
NewlinePosition = Literal["grid", "frame", "one_token", "no_token"]


@dataclass(frozen=True, kw_only=True)
class LlavaPreprocessing(Preprocessing):
    """Field names that start with mm_ are those of the checkpoints' config.json.

    Attributes:
        image_size: side of a picture as the tower takes it, in pixels.
        mm_spatial_pool_mode: how the patches of a frame are pooled.
        mm_newline_position: where the learned row stands in a video.
        crop: cut the middle out of a frame, its shape kept, instead of squeezing all of it.
        tilings: sizes [height, width] in pixels that an image's tiles may make up, in the order tried; none: no tiles.
        max_tiles: an image of more patches than this many tiles have is shrunk to them; 0: never.
        tile_each: tile every image; False tiles one that is the only image of its conversation.
        pad_square: pad an image that is not tiled to a square instead of squeezing it.
        unpad_digits: decimals kept before the padding of a tiled image is counted in patches; None keeps all.
        time_instruction: tell the length of a video and the times of its frames.
        round_fps: the times of frames taken once a second count whole seconds.
        video_pad, image_pad: tokens shown at the rows' places, where the family has such.
    """

    rule: ClassVar[str] = "llava"
    byte_patches: ClassVar[bool] = True
    field_rules: ClassVar[Mapping[str, Rule]] = {
        "image_size": SIDE,
        "tilings": Rule(PIXELS.least, PIXELS.most, items=1 << 12),
        "max_tiles": Rule(0, TILES.most),
        "unpad_digits": Rule(0, 64),
    }

    image_size: int
    mm_spatial_pool_mode: PoolMode = "bilinear"
    mm_newline_position: NewlinePosition = "grid"
    crop: bool = False
    tilings: tuple[tuple[int, ...], ...] = ()
    max_tiles: int = 0
    tile_each: bool = True
    pad_square: bool = True
    unpad_digits: int | None = None
    time_instruction: bool = False
    round_fps: bool = False
    video_pad: str = ""
    image_pad: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(len(tiling) != 2 for tiling in self.tilings):
            raise BundleError(f"tilings {self.tilings} are no pairs of height and width")
        if self.image_size < self.patch_size or any(
            side % self.image_size or side < 1 for side in sum(self.tilings, ())
        ):
            raise BundleError(
                f"pictures of {self.image_size} pixels, patches of {self.patch_size} and tilings {self.tilings} do "
                "not fit: a picture needs a patch, a tiling whole pictures"
            )

    @property
    def side(self) -> int:
        """Patches along one side of a picture."""
        return self.image_size // self.patch_size

    @property
    def pooled_side(self) -> int:
        """Rows of the prompt along one side of a frame."""
        return self.side // 2 if self.mm_spatial_pool_mode == "average" else -(-self.side // 2)

    def for_images(self, count: int) -> LlavaPreprocessing:
        """An image among others may be shown as one picture."""
        return self if count == 1 or self.tile_each else replace(self, tilings=())

    def video(self, video: Video, index: int = 0) -> VisualInput:
        """A place of the pooled grid is a track; rows that end a line or a frame are one too, as in the reference."""
        (pictures,) = self.pictures(video)
        pieces = self._video_pieces(len(pictures))
        sentence = (f"\n{time_instruction(video, self.round_fps)}",) if self.time_instruction else ()
        return VisualInput((self._tiles(pictures, self.mm_spatial_pool_mode),), (*pieces, *sentence))

    def shrink(self, frame: NDArray[np.uint8], count: int) -> tuple[NDArray[np.uint8], ...]:
        """The square, squeezed or cut out."""
        return (self._frame(frame),)

    def shrunk_place(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part that is cut out, where one is."""
        (left, top, right, bottom) = self._uncropped(np.array([WHOLE]), height, width)[0].tolist()
        return left, top, right, bottom

    def image(self, pixels: NDArray[np.uint8], index: int = 0) -> VisualInput:
        """Nothing merges within an image: each of its rows is a track of its own; rows that end a line are text."""
        check_frames(pixels[None])
        if self.tilings:
            return self._tiled(pixels)
        squared = (
            padded_square(pixels, tuple(int(255 * mean) for mean in self.image_mean)) if self.pad_square else pixels
        )
        picture = resize(squared, self.image_size, self.image_size, self.resample)
        pieces = (Rows(np.arange(self.side**2), pad=self.image_pad), Token(NEWLINE, TEXT))
        return VisualInput((self._tiles(picture[None]),), pieces)

    def panels(self, height: int, width: int, frames: int | None = None) -> list[Panel]:
        """One for each frame; an image's small view and its large one, or its one picture."""
        patches = even(self.side, 0, self.side * self.patch_size / self.image_size)  # the tower sees no part of a patch
        whole = cells(patches, patches)
        if frames is not None:
            side = self.pooled_side
            average = self.mm_spatial_pool_mode == "average"
            lines = even(side, 0, patches[2 * side - 1 if average else -1, 1])
            boxes = self._uncropped(cells(lines, lines), height, width)
            return [Panel(range(frame, frame + 1), boxes) for frame in range(frames)]
        if self.tilings:
            large = Panel(range(1), self._large_boxes(height, width, patches), "tiles")
            return [Panel(range(1), whole, "small view"), large]
        if self.pad_square:
            side = max(height, width)
            left = (side - width) // 2 / side
            top = (side - height) // 2 / side
            whole = seen_through(whole, (left, top, left + width / side, top + height / side))
        return [Panel(range(1), whole)]

    def longest_track(self, max_frames: int) -> int:
        """A token for each frame."""
        return max_frames

    def video_tokens(self, max_frames: int) -> int:
        """The pieces' own, and the sentence that tells the times of the frames."""
        shown = sum(piece.labels.size if isinstance(piece, Rows) else 1 for piece in self._video_pieces(max_frames))
        return shown + (TIME_TOKENS * max_frames + SENTENCE_TOKENS) * self.time_instruction

    def most_pixels(self) -> int:
        """The largest tiling, or all tiles and the small view."""
        tiles = self.image_size**2 * (max(1, self.max_tiles) + 1)
        return max(tiles, *(tall * wide for tall, wide in self.tilings), 0)

    def _tiles(self, pictures: NDArray[np.uint8], pool: str = "") -> Tiles:
        grid = Grid(len(pictures), self.side, self.side)
        return Tiles(cut_bytes(pictures, self), grid, pool)

    def _frame(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size = self.image_size
        if not self.crop:
            return resize(frame, size, size, self.resample)
        height, width, _ = frame.shape
        short = min(height, width)
        frame = resize(frame, int(size * height / short), int(size * width / short), self.resample)
        top = (frame.shape[0] - size) // 2
        left = (frame.shape[1] - size) // 2
        return frame[top : top + size, left : left + size]

    def _uncropped(self, boxes: Boxes, height: int, width: int) -> Boxes:
        """Boxes of the square that `_frame` makes of a frame, as boxes of the frame."""
        if not self.crop:
            return boxes
        size = self.image_size
        short = min(height, width)
        tall = int(size * height / short)
        wide = int(size * width / short)
        left = (wide - size) // 2
        top = (tall - size) // 2
        return (boxes * size + [left, top, left, top]) / [wide, tall, wide, tall]

    def _large_boxes(self, height: int, width: int, patches: Spans) -> Boxes:
        """Boxes of the rows that show an image's tiles, from the spans of a tile's patches."""
        size = self.image_size
        tiling = best_tiling(height, width, self.tilings)
        (tall, wide) = tiling
        (top, left, inner_tall, inner_wide) = fitting(height, width, tiling)
        rows = tiled(patches, tall // size)
        columns = tiled(patches, wide // size)
        kept = unpadded(np.arange(len(rows) * len(columns)).reshape(len(rows), -1), height, width, self.unpad_digits)
        rows = rows[kept[:, 0] // len(columns)]
        columns = columns[kept[0] % len(columns)]
        lines, across = self._shrunk(kept.shape)
        if (lines, across) != kept.shape:  # interpolated
            rows = even(lines, rows[0, 0], rows[-1, 1])
            columns = even(across, columns[0, 0], columns[-1, 1])
        picture = (left / wide, top / tall, (left + inner_wide) / wide, (top + inner_tall) / tall)
        return seen_through(cells(rows, columns), picture)

    def _video_pieces(self, num_frames: int) -> tuple[Piece, ...]:
        side = self.pooled_side
        position = self.mm_newline_position
        pad = self.video_pad
        if position == "grid":
            lines = np.arange(side * (side + 1)).reshape(side, side + 1)
            frame = [
                piece for *line, end in lines for piece in (Rows(np.array(line), pad=pad), Token(NEWLINE, int(end)))
            ]
            return (*frame,) * num_frames
        if position == "frame":
            return (Rows(np.arange(side**2), pad=pad), Token(NEWLINE, side**2)) * num_frames
        rows = Rows(np.tile(np.arange(side**2), num_frames), pad=pad)
        return (rows, Token(NEWLINE, TEXT)) if position == "one_token" else (rows,)

    def _tiled(self, pixels: NDArray[np.uint8]) -> VisualInput:
        """The small view first, then the lines of the large one without its padding."""
        size = self.image_size
        side = self.side
        (height, width, _) = pixels.shape
        # 1. Pixels to pictures of the tower's size: the small view, then the tiles of the large one.
        tiling = best_tiling(height, width, self.tilings)
        small = self.side**2
        tiles = cut_tiles(fitted(pixels, tiling, self.resample), size)
        pictures = np.concatenate((resize(pixels, size, size, self.resample)[None], tiles))
        # 2. The tower's rows, tile by tile, to lines across all tiles, without those of the padding.
        places = small + tile_places(tiling[0] // size, tiling[1] // size, side)
        places = unpadded(places, height, width, self.unpad_digits)
        lines, columns = self._shrunk(places.shape)
        # 3. Lines to pieces of the prompt, a learned row behind each.
        pieces: list[Piece] = [Rows(np.arange(small), pad=self.image_pad)]
        for line in small + np.arange(lines * columns).reshape(lines, columns):
            pieces += [Rows(line, pad=self.image_pad), Token(NEWLINE, TEXT)]
        return VisualInput((self._tiles(pictures),), tuple(pieces), rows_shown(small, places, (lines, columns)))

    def _shrunk(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Lines and columns of patches that are left of a tiled image."""
        times = math.sqrt(math.prod(shape) / (self.max_tiles * self.side**2)) if self.max_tiles else 0.0
        return tuple(int(length // times) for length in shape) if times > SHRINK_FROM else shape


def time_instruction(video: Video, round_fps: bool) -> str:
    """The sentence that LLaVA-Video was trained to read on the line after a video.

    The authors count the frames of a film in whole seconds, as if 29.97 frames a second were 30. They are followed
    where that is a matter of a thousandth, and frames stand evenly; of other films the true times are said.
    """
    step = max(round(video.fps), 1)
    rounded = round_fps and video.sampled is None and abs(video.fps - step) < ROUNDED_RATE * step
    once_a_second = rounded and np.array_equal(video.indices, np.arange(0, video.total_frames, step))
    times = video.indices / step if once_a_second else video.moments
    return (
        f"The video lasts for {video.duration:.2f} seconds, and {len(times)} frames are uniformly "
        f"sampled from it. These frames are located at {','.join(f'{time:.2f}s' for time in times)}."
        "Please answer the following questions related to this video."
    )


@frame_rule("llava")
def llava_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> Indices:
    """A frame every 1 / fps seconds; where these are more than `max_frames`, or by `force`, that many evenly spread.

    Spread ones include first and last, rounded down; a shorter film shows some frames again.
    """
    every = np.arange(0, total_frames, max(round(video_fps / sampling.fps), 1))
    if sampling.force or every.size > sampling.max_frames:
        return np.linspace(0, total_frames - 1, sampling.max_frames, dtype=np.int64)
    return every


@frame_rule("uniform")
def uniform_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> Indices:
    """The first frames of equal parts: `max_frames` of them with `force`, else `fps` a second up to that."""
    wanted = total_frames if sampling.force else max(1, int(total_frames / video_fps * sampling.fps))
    count = min(wanted, sampling.max_frames, total_frames)
    return np.arange(count) * total_frames // count
