"""Small pictures of what a prompt shows, with the place of each of its rows: what an answer keeps to be drawn later.

A film's frames are large and not kept; at most MOST thumbnails are, evenly spread, of SIDE pixels along the longer
side, as JPEG: a hundred kilobytes, so that a program may keep thousands of answers, and some milliseconds. Knows no
token and no page.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from framefusion.runtime.media.preprocess import Preprocessing
from framefusion.runtime.media.tiles.panels import WHOLE, Boxes
from framefusion.runtime.media.video.frames import Video

MOST = 24
SIDE = 144  # pixels
QUALITY = 85  # of JPEG
_NEAREST = 0
_BOX = 4  # Pillow's numbers: one pixel, and a mean over the pixels


class PanelRows(NamedTuple):
    """Rows that look at one picture."""

    boxes: Boxes  # [n, 4] shares of the picture
    first: int  # of these n rows, among all rows that the prompt shows


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """A frame, several that one row shows at once, or a picture."""

    content: bytes  # JPEG
    place: tuple[float, float, float, float]  # of the pixels in the picture, which may have been cut out of it
    size: tuple[int, int]  # width and height of the picture
    panels: tuple[PanelRows, ...]
    name: str  # "1.5 s" of a frame, "picture" of a picture

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """RGB [h, w, 3], decoded."""
        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(self.content)))


@dataclass(frozen=True, eq=False)
class Thumbnails:
    """Those of one request.

    Attributes:
        shown: in the order of the prompt.
        pictures: frames, or groups of frames of one row, and pictures that there are; more than `shown` has.
        rows: of all of them.
    """

    shown: tuple[Thumbnail, ...]
    pictures: int
    rows: int


class _Candidate(NamedTuple):
    """What one thumbnail would show, small."""

    group: int  # its number among all groups of frames and pictures
    pixels: NDArray[np.uint8]  # [h, w, 3]
    place: tuple[float, float, float, float]
    size: tuple[int, int]
    panels: tuple[PanelRows, ...]
    name: str


class ThumbnailCollector:
    """Takes films and pictures one after the other, so that none has to wait for the next with its pixels.

    How many there will be is known at the end only. So each gives as many small pictures as could be shown of it if it
    were the only one, and of all these the evenly spread ones are drawn at the end. What is evenly spread over several
    films is off by half the distance of two small pictures at most.

    Args:
        rule: of all films and pictures of the prompt.
    """

    def __init__(self, rule: Preprocessing) -> None:
        self.rule = rule
        self._candidates: list[_Candidate] = []
        self._groups = 0
        self._rows = 0

    def add(self, shown: Video | NDArray[np.uint8]) -> None:
        """The next film as it was sampled, whole or shrunk, or picture [H, W, 3]; its pixels are not kept."""
        # 1. Which rows look at the same frames: they are drawn over one picture.
        (height, width) = shown.frames.shape[1:3] if isinstance(shown, Video) else shown.shape[:2]
        panels = self.rule.panels(height, width, len(shown.frames) if isinstance(shown, Video) else None)
        by_frame: dict[int, list[PanelRows]] = {}
        for panel in panels:
            by_frame.setdefault(panel.frames[0], []).append(PanelRows(panel.boxes, self._rows))
            self._rows += len(panel.boxes)
        # 2. A few of them, the first and the last among these.
        groups = list(by_frame.items())
        for index in _evenly_spread(len(groups)):
            (frame, over) = groups[index]
            self._candidates.append(_small(self._groups + index, shown, frame, tuple(over), self.rule))
        self._groups += len(groups)

    def thumbnails(self) -> Thumbnails:
        """Those of all that was added, `MOST` at most."""
        numbers = np.array([candidate.group for candidate in self._candidates])
        nearest = [int(np.abs(numbers - group).argmin()) for group in _evenly_spread(self._groups)]
        shown = tuple(_drawn(self._candidates[index]) for index in dict.fromkeys(nearest))
        return Thumbnails(shown, self._groups, self._rows)


def thumbnails(media: Sequence[Video | NDArray[np.uint8]], rule: Preprocessing) -> Thumbnails:
    """Thumbnails of what a prompt shows.

    Args:
        media: films as they were sampled, whole or shrunk, and pictures [H, W, 3].
        rule: of all of them.
    """
    collector = ThumbnailCollector(rule)
    for shown in media:
        collector.add(shown)
    return collector.thumbnails()


def _evenly_spread(count: int) -> list[int]:
    """`MOST` of so many at most, ascending, the first and the last among them."""
    if not count:
        return []
    chosen: list[int] = np.unique(np.linspace(0, count - 1, min(MOST, count)).round().astype(int)).tolist()
    return chosen


def _small(
    group: int, shown: Video | NDArray[np.uint8], number: int, panels: tuple[PanelRows, ...], rule: Preprocessing
) -> _Candidate:
    """A frame, or a picture, in the size of a thumbnail."""
    from PIL import Image

    place = WHOLE
    if isinstance(shown, Video):
        (tall, wide) = shown.frames.shape[1:3]
        frame = shown.shrunk[0][number] if shown.shrunk else shown.frames[number]
        place = rule.shrunk_place(tall, wide) if shown.shrunk else WHOLE
        name = f"{shown.times[number]:.1f} s"
    else:
        frame = shown
        (tall, wide) = frame.shape[:2]
        name = "picture"
    # The picture as it was, not as a family squeezes it.
    width = (place[2] - place[0]) * wide
    height = (place[3] - place[1]) * tall
    scale = min(SIDE / max(wide, tall), 1.0)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    # A mean over every pixel would take ten times as long: some lines, some columns, then the mean of four.
    lines = np.ascontiguousarray(frame[:: max(frame.shape[0] // (2 * size[1]), 1)])
    twice = Image.fromarray(lines).resize((2 * size[0], 2 * size[1]), _NEAREST)
    return _Candidate(group, np.asarray(twice.resize(size, _BOX)), place, (wide, tall), panels, name)


def _drawn(candidate: _Candidate) -> Thumbnail:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(candidate.pixels).save(file, "JPEG", quality=QUALITY)
    return Thumbnail(file.getvalue(), candidate.place, candidate.size, candidate.panels, candidate.name)
