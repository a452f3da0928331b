"""Where the rows of a prompt lie in what is shown: boxes over frames and images, for drawing.

Coordinates are shares of the picture as it was read, from its left and top edge, so they hold at any size. Each family
says its own in `Preprocessing.panels`. Knows neither pixels nor tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float64]  # [n, 4] left, top, right, bottom
Spans = NDArray[np.float64]  # [n, 2] begin and end along one axis
WHOLE = (0.0, 0.0, 1.0, 1.0)


class Panel(NamedTuple):
    """A run of rows of the prompt that show one picture: all of it, or an image at one scale.

    Rows with equal boxes have no place of their own: together they tell what is in the box. A box without area shows
    nothing of the picture, but what was put around it.
    """

    frames: range  # that each row shows at once; range(1) for an image
    boxes: Boxes
    name: str = ""  # where the same frames have several panels


def even(count: int, begin: float = 0.0, end: float = 1.0) -> Spans:
    """Spans of equal length, one behind the other."""
    edges = np.linspace(begin, end, count + 1)
    return np.stack((edges[:-1], edges[1:]), axis=1)


def tiled(spans: Spans, tiles: int) -> Spans:
    """The spans of one tile repeated in each of several that lie side by side."""
    return ((np.arange(tiles)[:, None, None] + spans) / tiles).reshape(-1, 2)


def cells(rows: Spans, columns: Spans) -> Boxes:
    """[rows * columns, 4]: where lines and columns cross, line by line."""
    tall = np.repeat(rows, len(columns), axis=0)
    wide = np.tile(columns, (len(rows), 1))
    return np.stack((wide[:, 0], tall[:, 0], wide[:, 1], tall[:, 1]), axis=1)


def within(boxes: Boxes, place: Boxes) -> Boxes:
    """Boxes of a part, as boxes of the whole in which the part lies at each `place` [k, 4]; part by part."""
    corner = place[:, None, :2]
    size = place[:, None, 2:] - place[:, None, :2]
    return np.concatenate((corner + boxes[:, :2] * size, corner + boxes[:, 2:] * size), axis=-1).reshape(-1, 4)


def seen_through(boxes: Boxes, picture: tuple[float, float, float, float]) -> Boxes:
    """Boxes of a canvas as boxes of the picture that lies on it at `picture`; what is beside the picture is cut off."""
    left, top, right, bottom = picture
    scaled = (boxes - [left, top, left, top]) / [right - left, bottom - top, right - left, bottom - top]
    clipped: Boxes = np.clip(scaled, 0.0, 1.0)
    return clipped
