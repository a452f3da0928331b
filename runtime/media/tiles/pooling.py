"""Matrices that average the patches of a picture, so that one graph serves every way to pool. numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError
from framefusion.runtime.media.tiles.scales import bilinear_taps


def pool_matrix(height: int, width: int, pool: str) -> NDArray[np.float32]:
    """[Q, height * width]: what each pooled row takes of each patch.

    "" keeps all, "average" takes blocks of 2 x 2 and leaves an odd last row or column out, "bilinear" interpolates to
    half the size rounded up, as torch does without aligned corners and without antialiasing.

    Raises:
        BundleError: another way to pool.
    """
    if pool not in _POOLS:
        raise BundleError(f"pooling {pool!r} is unknown, known are average and bilinear: upgrade this package")
    return np.kron(_POOLS[pool](height), _POOLS[pool](width)).astype(np.float32)


def block_matrix(side: int, sizes: tuple[int, int]) -> NDArray[np.float32]:
    """[side^2 / (tall * wide), side^2]: means of blocks of tall x wide places of a square."""
    tall, wide = (np.kron(np.eye(side // size), np.full((1, size), 1 / size)) for size in sizes)
    return np.kron(tall, wide).astype(np.float32)


def bilinear_matrix(to: int, size: int) -> NDArray[np.float64]:
    """[to, size]: weights of linear interpolation along one axis, corners not aligned, edges repeated."""
    low, high, share = bilinear_taps(to, size)
    weights = np.zeros((to, size))
    weights[np.arange(to), low] += 1 - share
    weights[np.arange(to), high] += share
    return weights


def _every(size: int) -> NDArray[np.float64]:
    return np.eye(size)


def _averages(size: int) -> NDArray[np.float64]:
    pairs = np.repeat(np.eye(size // 2), 2, axis=1) / 2
    return np.pad(pairs, ((0, 0), (0, size % 2)))


def _bilinear(size: int) -> NDArray[np.float64]:
    return bilinear_matrix(-(-size // 2), size)


_POOLS: Mapping[str, Callable[[int], NDArray[np.float64]]] = {"": _every, "average": _averages, "bilinear": _bilinear}
