"""Patches in bytes: what they become in floats, and that a tower of floats sees what a processor makes of a picture."""

from __future__ import annotations

import numpy as np

from framefusion.runtime.families.internvl import InternVLPreprocessing
from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing, patchify
from framefusion.runtime.media.preprocess import cut_bytes, cut_patches
from framefusion.runtime.media.visual_input import BytePatches, Grid, Tiles

TABLE = np.stack([np.arange(256), np.arange(256) + 1000, np.arange(256) + 2000]).astype(np.float32)


def test_bytes_become_floats_channel_by_channel() -> None:
    levels = np.arange(2 * 3 * 12, dtype=np.uint8).reshape(2, 3, 12)
    patches = BytePatches(levels, TABLE)
    channels = np.array([0, 1000, 2000], np.float32)
    expected = (levels.reshape(2, 3, 4, 3) + channels).swapaxes(2, 3).reshape(2, 3, 12)
    np.testing.assert_array_equal(patches.normalised(), expected)
    np.testing.assert_array_equal(patches.normalised(1, 2), expected[1:])
    np.testing.assert_array_equal(patches.reshaped(1).normalised(), expected.reshape(1, 6, 12))
    tiles = Tiles(patches, Grid(2, 1, 3))
    assert tiles.shape == (2, 3, 12)
    np.testing.assert_array_equal(tiles.values, expected)


def test_floats_stay_as_they_are() -> None:
    values = np.ones((2, 3, 12), np.float32)
    tiles = Tiles(values, Grid(2, 1, 3), "average")
    assert tiles.values is values
    assert (tiles.shape, tiles.pool) == ((2, 3, 12), "average")


def test_a_patch_in_bytes_is_a_piece_of_the_picture() -> None:
    rule = InternVLPreprocessing(patch_size=4, tile_size=8)
    picture = np.random.default_rng(0).integers(0, 256, (1, 9, 8, 3), np.uint8)  # the last line fills no patch
    patches = cut_bytes(picture, rule)
    np.testing.assert_array_equal(patches.levels[0, 1], picture[0, :4, 4:].reshape(-1))
    np.testing.assert_array_equal(patches.levels[0, 2], picture[0, 4:8, :4].reshape(-1))
    planes = cut_patches(picture, rule)[0, 3].reshape(3, 4, 4)
    expected = (picture[0, 4:8, 4:] / 255 - rule.image_mean) / rule.image_std
    np.testing.assert_allclose(planes, expected.transpose(2, 0, 1), rtol=0, atol=1e-6)


def test_a_film_moves_a_fourth_of_the_bytes() -> None:
    rule = QwenVLPreprocessing(min_pixels=784, max_pixels=784 * 4)
    tiles = patchify(np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), np.uint8), rule)
    assert isinstance(tiles.patches, BytePatches)
    assert tiles.patches.levels.nbytes * 4 == tiles.values.nbytes
    np.testing.assert_array_equal(
        tiles.values[1].reshape(16, 3, 2, 196)[:, :, 0], tiles.values[1].reshape(16, 3, 2, 196)[:, :, 1]
    )
