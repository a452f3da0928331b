"""What a vision graph wants beside patches, and how many rows it gives: a function for each kind of tower.

What is computed here depends on the size of the pictures alone, so all pictures of one size share it. numpy only; knows
no file and no prompt.

    kind             inputs beside patches [N, P, W]                    rows of a picture
    plain            none                                               settings.rows, or P
    rope_2d          cos, sin [1, P, hd/2]                              P / settings.merge_size^2
    rope_2d_windows  those, and units [V, U], slots, mask               as rope_2d
    rope_2d_table    those, and corners, shares [4, P]                  as rope_2d
    pooled           pool [Q, P], a matrix that averages patches        Q
    block_pooled     pool [Q, settings.blocks^2], an average            Q
    scales           taps, shares [K, S * places of the finest scale]   tiles of the finest scale * settings.rows
    resampler        places [P], sincos [1, P, settings.width]          settings.rows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError
from framefusion.runtime.media.tiles.scales import bilinear_taps, scale_taps, single_taps
from framefusion.runtime.media.visual_input import Tiles
from framefusion.runtime.text.positions import sincos_table, vision_rope_tables

if TYPE_CHECKING:
    from framefusion.runtime.format.manifest import VisionRecord


LOWEST = np.float32(-65504)
"""What masks a key: the lowest number of fp16, so that graphs of every type take it."""


class TowerCall(NamedTuple):
    """How to call the tower for pictures of one size."""

    inputs: Mapping[str, NDArray[Any]]
    rows: int  # of each picture


def tower_call(vision: VisionRecord, tiles: Tiles) -> TowerCall:
    """The inputs that all these pictures share, and the rows of each.

    Raises:
        BundleError: the kind is of a newer package.
    """
    if vision.kind not in KINDS:
        raise BundleError(f"vision kind {vision.kind!r} is unknown, known are {', '.join(KINDS)}: upgrade this package")
    return KINDS[vision.kind](vision, tiles)


def plain(vision: VisionRecord, tiles: Tiles) -> TowerCall:
    """A tower for pictures of one fixed size."""
    return TowerCall({}, int(vision.settings.get("rows", tiles.values.shape[1])))


def rope_2d(vision: VisionRecord, tiles: Tiles) -> TowerCall:
    """Qwen2-VL: rotary tables of the patches of one grid."""
    merge = int(vision.settings["merge_size"])
    half = vision.head_dim // 2
    tables = vision_rope_tables(tiles.grid.height, tiles.grid.width, merge, vision.head_dim)
    cos, sin = (np.ascontiguousarray(table[None, :, :half]) for table in tables)
    return TowerCall({"cos": cos, "sin": sin}, tiles.grid.height * tiles.grid.width // merge**2)


def rope_2d_windows(vision: VisionRecord, tiles: Tiles) -> TowerCall:
    """Qwen2.5-VL: how a grid is cut into windows, besides."""
    merge = int(vision.settings["merge_size"])
    side = int(vision.settings["window"])
    call = rope_2d(vision, tiles)
    grid = tiles.grid.merged(merge)
    units, slots = windows_of(grid.height, grid.width, side)
    mask = np.where(np.repeat(units >= 0, merge**2, axis=1), np.float32(0), LOWEST)[:, None, None]  # [V, 1, 1, S]
    mask = np.repeat(mask, mask.shape[-1], axis=2)
    return TowerCall({**call.inputs, "units": np.maximum(units, 0), "slots": slots, "mask": mask}, call.rows)


def windows_of(rows: int, columns: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Square windows over a grid of cells: the cell in each slot [V, side^2], -1 for none; the slot of each cell."""
    over = ((0, -rows % side), (0, -columns % side))
    cells = np.pad(np.arange(rows * columns).reshape(rows, columns), over, constant_values=-1)
    blocks = cells.reshape(cells.shape[0] // side, side, -1, side).transpose(0, 2, 1, 3)
    units = blocks.reshape(-1, side * side)
    slots = np.empty(rows * columns, np.int64)
    slots[units[units >= 0]] = np.flatnonzero(units >= 0)
    return units, slots


def rope_2d_table(vision: VisionRecord, tiles: Tiles) -> TowerCall:
    """Qwen3-VL: which rows of the square position table lie around each patch, besides."""
    call = rope_2d(vision, tiles)
    (_, height, width) = tiles.grid
    side = int(vision.settings["table_side"])
    merge = int(vision.settings["merge_size"])
    rows, columns = (_neighbours(size, side) for size in (height, width))  # each [2, size]: rows of the table, shares
    corners = np.stack([r[:, None] * side + c for r in rows[0] for c in columns[0]])  # [4, h, w]
    shares = np.stack([r[:, None] * c for r in rows[1] for c in columns[1]])
    blocks = (4, height // merge, merge, width // merge, merge)
    ordered = {
        name: np.ascontiguousarray(table.reshape(blocks).transpose(0, 1, 3, 2, 4).reshape(4, -1))
        for name, table in (("corners", corners), ("shares", shares))
    }
    return TowerCall({**call.inputs, **ordered}, call.rows)


def _neighbours(size: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of `size` places spread corner to corner over a table of `side`: the entries around each, and their shares."""
    places = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    low = np.floor(places)
    share = places - low
    return np.minimum(np.stack([low, low + 1]).astype(np.int64), side - 1), np.stack([1 - share, share])


def pooled(vision: VisionRecord, tiles: Tiles) -> TowerCall:
    """LLaVA: patches are averaged by a matrix, so that one graph serves videos, images and every way to pool."""
    matrix = pool_matrix(tiles.grid.height, tiles.grid.width, tiles.pool)
    return TowerCall({"pool": matrix}, len(matrix))


def pool_matrix(height: int, width: int, pool: str) -> NDArray[np.float32]:
    """[Q, height * width]: what each pooled row takes of each patch.

    "" keeps all, "average" takes blocks of 2 x 2 and leaves an odd last row or column out, "bilinear" interpolates to
    half the size rounded up, as torch does without aligned corners and without antialiasing.
    """
    if pool not in _POOLS:
        raise BundleError(f"pooling {pool!r} is unknown, known are average and bilinear: upgrade this package")
    return np.kron(_POOLS[pool](height), _POOLS[pool](width)).astype(np.float32)


def _every(size: int) -> NDArray[np.float64]:
    return np.eye(size)


def _averages(size: int) -> NDArray[np.float64]:
    pairs = np.repeat(np.eye(size // 2), 2, axis=1) / 2
    return np.pad(pairs, ((0, 0), (0, size % 2)))


def _bilinear(size: int) -> NDArray[np.float64]:
    return bilinear_matrix(-(-size // 2), size)


def bilinear_matrix(to: int, size: int) -> NDArray[np.float64]:
    """[to, size]: weights of linear interpolation along one axis, corners not aligned, edges repeated."""
    low, high, share = bilinear_taps(to, size)
    weights = np.zeros((to, size))
    weights[np.arange(to), low] += 1 - share
    weights[np.arange(to), high] += share
    return weights


def block_pooled(vision: VisionRecord, tiles: Tiles) -> TowerCall:
    """NVILA: blocks of patches are averaged in videos, and kept in images."""
    side = int(vision.settings["blocks"])
    sizes = vision.settings["pool_sizes"] if tiles.pool else (1, 1)
    tall, wide = (np.kron(np.eye(side // size), np.full((1, size), 1 / size)) for size in sizes)
    matrix = np.kron(tall, wide).astype(np.float32)
    return TowerCall({"pool": matrix}, len(matrix))


def scales(vision: VisionRecord, tiles: Tiles) -> TowerCall:
    """NVILA: an image at several scales, each in tiles; a frame of a video is one tile for all of them."""
    settings = vision.settings
    side = int(vision.settings["side"])
    tilings = [(int(count), int(count)) for count in settings["scales"]]
    most = int(settings["most"])
    if not tiles.pool:
        taps = single_taps(len(tilings), side**2, most)
        finest = 1
    else:
        tilings[-1] = (tiles.grid.height // side, tiles.grid.width // side)
        taps = scale_taps(tilings, side, most)
        finest = tilings[-1][0] * tilings[-1][1]
    return TowerCall({"taps": taps.patches, "shares": taps.shares}, finest * int(settings["rows"]))


def resampler(vision: VisionRecord, tiles: Tiles) -> TowerCall:
    """MiniCPM-V: rows of the encoder's position table, and the resampler's own table."""
    settings = vision.settings
    (_, rows, columns) = tiles.grid
    side = int(settings["side"])
    down, along = (_buckets(count, side, settings["off_floor"]) for count in (rows, columns))
    places = (down[:, None] * side + along).reshape(-1)
    sincos = sincos_table(rows, columns, int(settings["width"]))
    return TowerCall({"places": places, "sincos": sincos[None]}, int(settings["rows"]))


def _buckets(count: int, side: int, off_floor: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Which of `side` places each of `count` patches along an axis takes; `off_floor` lists what rounding moves."""
    places = np.arange(count) * side // count
    for patch, place in ((patch, place) for patches, patch, place in off_floor if patches == count):
        places[patch] = place
    return places


_POOLS: Mapping[str, Callable[[int], NDArray[np.float64]]] = {"": _every, "average": _averages, "bilinear": _bilinear}
KINDS: Mapping[str, Callable[[VisionRecord, Tiles], TowerCall]] = {
    "plain": plain,
    "rope_2d": rope_2d,
    "rope_2d_windows": rope_2d_windows,
    "rope_2d_table": rope_2d_table,
    "pooled": pooled,
    "block_pooled": block_pooled,
    "scales": scales,
    "resampler": resampler,
}
