"""MiniCPM-V 2.6 beside its authors' repository: slices of pictures, and what their training masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from framefusion.runtime.families.minicpmv import MiniCpmVPreprocessing
from framefusion.runtime.media.preprocess import cut_patches
from tests.authors.repositories import MINICPM

MINICPM.required()
NAMES = ("slice_image", "ensure_divide", "find_best_resize", "get_refine_size", "split_to_patches")
SIZES = ((448, 448), (720, 1280), (1080, 1920), (333, 1000), (200, 201), (64, 48), (2000, 1999), (1280, 720))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slices", [1, 2, 9])
def test_the_same_slices(size: tuple[int, int], slices: int) -> None:
    """The fine-tuning code has the slicing of the released processor.

    A small picture is scaled up there as here only where it is not sliced.
    """
    code = MINICPM.functions("finetune/dataset.py", NAMES, {"math": math, "Image": Image})
    small = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    picture = Image.fromarray(small).resize(size[::-1])
    overview, patches, grid = code["slice_image"](picture, slices, 448, 14)
    rule = MiniCpmVPreprocessing(query_num=64, scale_resolution=448, image_slices=slices)
    tiles = rule.image(np.asarray(picture)).tiles
    expected = [np.asarray(overview)[None]]
    if patches:
        rows = [np.asarray(patch) for row in patches for patch in row]
        expected.append(np.stack(rows))
        assert len(rows) == grid[0] * grid[1]
    assert len(tiles) == len(expected)
    for ours, pictures in zip(tiles, expected, strict=True):
        np.testing.assert_array_equal(ours.values, cut_patches(pictures, rule))


def test_no_token_is_masked_in_their_training() -> None:
    """The hub's processor masks id 0, `!`, as if it were padding; here it is a token like any other, as in training."""
    source = MINICPM.file("finetune/dataset.py").read_text()
    assert 'attention_mask=torch.ones_like(ret["input_ids"], dtype=torch.bool)' in source
