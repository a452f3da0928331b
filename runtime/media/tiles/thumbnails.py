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


class _Group(NamedTuple):
    """What one thumbnail would show."""

    media: Video | NDArray[np.uint8]
    frame: int
    panels: tuple[PanelRows, ...]
    rule: Preprocessing


def thumbnails(media: Sequence[Video | NDArray[np.uint8]], rule: Preprocessing) -> Thumbnails:
    """Thumbnails of what a prompt shows.

    Args:
        media: films as they were sampled, whole or shrunk, and pictures [H, W, 3].
        rule: of all of them.
    """
    # 1. Which rows look at the same frames: they are drawn over one picture.
    groups: list[_Group] = []
    rows = 0
    for shown in media:
        (height, width) = shown.frames.shape[1:3] if isinstance(shown, Video) else shown.shape[:2]
        panels = rule.panels(height, width, len(shown.frames) if isinstance(shown, Video) else None)
        by_frame: dict[int, list[PanelRows]] = {}
        for panel in panels:
            by_frame.setdefault(panel.frames[0], []).append(PanelRows(panel.boxes, rows))
            rows += len(panel.boxes)
        groups += [_Group(shown, frame, tuple(over), rule) for frame, over in by_frame.items()]
    # 2. A few of them, the first and the last among these.
    chosen = np.unique(np.linspace(0, len(groups) - 1, min(MOST, len(groups))).round().astype(int)) if groups else ()
    return Thumbnails(tuple(_thumbnail(groups[index]) for index in chosen), len(groups), rows)


def _thumbnail(group: _Group) -> Thumbnail:
    from PIL import Image

    place = WHOLE
    if isinstance(group.media, Video):
        film = group.media
        (tall, wide) = film.frames.shape[1:3]
        frame = film.shrunk[0][group.frame] if film.shrunk else film.frames[group.frame]
        place = group.rule.shrunk_place(tall, wide) if film.shrunk else WHOLE
        name = f"{film.times[group.frame]:.1f} s"
    else:
        frame = group.media
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
    file = io.BytesIO()
    twice.resize(size, _BOX).save(file, "JPEG", quality=QUALITY)
    return Thumbnail(file.getvalue(), place, (wide, tall), group.panels, name)
