"""LLaVA's images of any resolution: which tiles an image is cut into, and which of their patches are shown.

Sizes are [height, width]. Knows pixels and places of patches, no prompt and no token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import VideoError
from framefusion.runtime.media.preprocess import resize
from framefusion.runtime.media.tiles.scales import bilinear_taps
from framefusion.runtime.media.visual_input import RowMap

Pixels = NDArray[np.uint8]  # [H, W, 3]
Places = NDArray[np.int64]


def best_tiling(height: int, width: int, tilings: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The size that shows most of an image's pixels and, among equals, is the smallest; the first of equals.

    Raises:
        VideoError: the image would have no line left in any of them.
    """
    best = tilings[0]
    best_rank = (0, 0)
    for tall, wide in tilings:
        scale = min(wide / width, tall / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        if shown and (best_rank[0] == 0 or (shown, -tall * wide) > best_rank):
            best = (tall, wide)
            best_rank = (shown, -tall * wide)
    if best_rank[0] == 0:
        raise VideoError(f"an image of {width}x{height} is too long and thin for this model: crop it")
    return best


def nearest_tiling(height: int, width: int, size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Rows and columns of tiles of `size` pixels whose shape is nearest to an image's (InternVL, NVILA).

    Of equally near ones, the fewest tiles; more only where the image has more pixels than half of theirs.
    """
    sides = range(1, max_tiles + 1)
    allowed = range(min_tiles, max_tiles + 1)
    tilings = [(rows, columns) for columns in sides for rows in sides if rows * columns in allowed]
    shape = width / height
    best = (1, 1)
    nearest = math.inf
    for rows, columns in sorted(tilings, key=math.prod):  # fewest tiles first, then fewest columns
        distance = abs(shape - columns / rows)
        large = height * width > 0.5 * size**2 * rows * columns
        if distance < nearest or (distance == nearest and large):
            best = (rows, columns)
            nearest = distance
    return best


def fitted(pixels: Pixels, size: tuple[int, ...], resample: int) -> Pixels:
    """The image as large as it fits, in the middle of a black picture of `size`."""
    height, width, _ = pixels.shape
    top, left, lines, columns = fitting(height, width, size)
    canvas = np.zeros((*size, 3), np.uint8)
    canvas[top : top + lines, left : left + columns] = resize(pixels, lines, columns, resample)
    return canvas


def fitting(height: int, width: int, size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Top, left, height and width of an image as `fitted` puts it on a picture of `size`."""
    tall, wide = size
    if wide / width < tall / height:
        lines = min(math.ceil(height * (wide / width)), tall)
        columns = wide
    else:
        lines = tall
        columns = min(math.ceil(width * (tall / height)), wide)
    return (tall - lines) // 2, (wide - columns) // 2, lines, columns


def cut_tiles(canvas: Pixels, size: int) -> Pixels:
    """[n, size, size, 3], line by line."""
    rows = canvas.shape[0] // size
    columns = canvas.shape[1] // size
    return canvas.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)


def padded_square(pixels: Pixels, colour: Sequence[int]) -> Pixels:
    """The image in the middle of a square of one colour."""
    height, width, _ = pixels.shape
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = colour
    top = (side - height) // 2
    left = (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def unpadded(places: Places, height: int, width: int, digits: int | None) -> Places:
    """Places without those of the padding that `fitted` put around an image of this size.

    `digits` decimals decide what counts as a whole patch; None takes the quotient as it is.
    """
    rows, columns = places.shape
    whole = int if digits is None else lambda length: int(round(length, digits))
    if width / height > columns / rows:
        padding = (rows - whole(height * (columns / width))) // 2
        return places[padding : rows - padding]
    padding = (columns - whole(width * (rows / height))) // 2
    return places[:, padding : columns - padding]


def rows_shown(small: int, places: Places, size: tuple[int, ...]) -> RowMap:
    """The first `small` rows of the tower as they are, then those at `places`, interpolated to lines and columns."""
    first = np.arange(small)[:, None]
    if places.shape == size:
        return RowMap(np.concatenate((first, places.reshape(-1, 1))))
    up, down, y = bilinear_taps(size[0], places.shape[0])
    left, right, x = bilinear_taps(size[1], places.shape[1])
    corners = [places[row][:, column] for row in (up, down) for column in (left, right)]
    shares = [np.outer(row, column) for row in (1 - y, y) for column in (1 - x, x)]
    index = np.stack(corners, -1).reshape(-1, 4)
    weight = np.stack(shares, -1).reshape(-1, 4)
    as_it_is = np.broadcast_to(np.array([1.0, 0, 0, 0]), (small, 4))
    weights = np.concatenate((as_it_is, weight)).astype(np.float32)
    return RowMap(np.concatenate((np.broadcast_to(first, (small, 4)), index)), weights)
