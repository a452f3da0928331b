"""One image at several scales, each in tiles: which patches meet in each place of the finest one.

Scales are brought to the size of the finest as torch's area interpolation does it: each place is the mean of the places
it covers. Knows tiles and places of patches, no pixel and no prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Taps(NamedTuple):
    """For K patches that meet in each of R places at S scales: which they are, and their shares."""

    patches: NDArray[np.int64]  # [K, S * R]
    shares: NDArray[np.float32]  # [K, S * R]


def tile_places(rows: int, columns: int, side: int) -> NDArray[np.int64]:
    """[rows * side, columns * side]: the row of each patch of the whole, in tiles of side x side patches one by one."""
    places = np.arange(rows * columns * side * side).reshape(rows, columns, side, side)
    return places.swapaxes(1, 2).reshape(rows * side, columns * side)


def scale_taps(tilings: Sequence[tuple[int, int]], side: int, most: int) -> Taps:
    """Taps of an image whose patches come tile by tile, scale by scale.

    Args:
        tilings: rows and columns of tiles, coarsest scale first; the places of the last come tile by tile, too.
        side: patches along one side of a tile.
        most: places along an axis that may meet in one; K is its square.
    """
    rows = tilings[-1][0] * side
    columns = tilings[-1][1] * side
    order = np.argsort(tile_places(*tilings[-1], side), axis=None)  # raster places of the finest, tile by tile
    patches = []
    shares = []
    before = 0
    for tiling in tilings:
        places = before + tile_places(*tiling, side)
        down, tall = _covered(rows, places.shape[0], most)
        along, wide = _covered(columns, places.shape[1], most)
        met = places[down[:, None, :, None], along[None, :, None, :]].reshape(-1, most**2)
        patches.append(met[order])
        shares.append((tall[:, None, :, None] * wide[None, :, None, :]).reshape(-1, most**2)[order])
        before += places.size
    index = np.concatenate(patches).T
    share = np.concatenate(shares).T
    return Taps(np.ascontiguousarray(index), np.ascontiguousarray(share, np.float32))


def single_taps(scales: int, patches: int, most: int) -> Taps:
    """Taps of one picture that stands for every scale."""
    index = np.tile(np.arange(patches), scales)
    share = np.zeros((most**2, index.size), np.float32)
    share[0] = 1
    return Taps(np.tile(index, (most**2, 1)), share)


def _covered(to: int, size: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Places [to, most] of an axis of `size` that each of `to` covers, and their shares; the rest have share 0."""
    start = np.arange(to) * size // to
    count = -(-np.arange(1, to + 1) * size // to) - start
    steps = np.arange(most)
    share = np.where(steps < count[:, None], 1 / count[:, None], 0)
    return np.minimum(start[:, None] + steps, size - 1), share


def bilinear_taps(to: int, size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """The two places [to] that each interpolated one lies between, and the share [to] of the second."""
    half = np.float32(0.5)  # fp32 throughout, as torch computes them
    places = np.clip((np.arange(to, dtype=np.float32) + half) * np.float32(size / to) - half, 0, None)
    low = np.minimum(places.astype(np.intp), size - 1)
    return low, np.minimum(low + 1, size - 1), places - low
