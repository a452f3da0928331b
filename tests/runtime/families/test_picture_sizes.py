"""How large a small picture may become: what a manifest is held to before any picture is read."""

from __future__ import annotations

import numpy as np
import pytest

from framefusion.errors import BundleError
from framefusion.runtime.families import FAMILIES
from framefusion.runtime.families.internvl import InternVLPreprocessing
from framefusion.runtime.families.llava import LlavaPreprocessing
from framefusion.runtime.families.minicpmv import MiniCpmVPreprocessing
from framefusion.runtime.families.nvila import NvilaPreprocessing
from framefusion.runtime.families.qwen2_5_vl import Qwen25VLPreprocessing
from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing
from framefusion.runtime.families.qwen3_vl import Qwen3VLPreprocessing
from framefusion.runtime.media.preprocess import Preprocessing

CASES: tuple[Preprocessing, ...] = (
    QwenVLPreprocessing(min_pixels=112 * 112, max_pixels=224 * 224),
    QwenVLPreprocessing(image_min_pixels=168 * 168, image_max_pixels=224 * 224),
    Qwen25VLPreprocessing(tokens_per_second=2.0),
    Qwen3VLPreprocessing(),
    LlavaPreprocessing(image_size=28, tilings=((28, 56), (56, 28), (56, 84))),
    LlavaPreprocessing(image_size=28, max_tiles=9),
    MiniCpmVPreprocessing(query_num=4, scale_resolution=56, image_slices=9),
    InternVLPreprocessing(tile_size=56, min_tiles=4, max_tiles=12),
    NvilaPreprocessing(image_size=56, image_aspect_ratio="dynamic", min_tiles=4, max_tiles=12),
    NvilaPreprocessing(image_size=56, image_aspect_ratio="dynamic_s2", scales=(1, 2, 3), max_tiles=12),
)


def test_every_family_has_a_case() -> None:
    assert {type(rule) for rule in CASES} == set(FAMILIES)


@pytest.mark.parametrize("rule", CASES, ids=lambda rule: rule.rule)
@pytest.mark.parametrize(("height", "width"), [(30, 40), (28, 140), (56, 56)])
def test_a_small_picture_becomes_no_larger_than_its_rule_says(rule: Preprocessing, height: int, width: int) -> None:
    """But for whole patches: a side is rounded up to a block."""
    shown = rule.image(np.zeros((height, width, 3), np.uint8))
    pixels = sum(tiles.values.shape[0] * tiles.values.shape[1] for tiles in shown.tiles) * rule.patch_size**2
    side = rule.patch_size * rule.block_side()
    assert pixels <= (max(rule.most_pixels(), height * width) ** 0.5 + 2 * side) ** 2


def test_tilings_are_pairs() -> None:
    with pytest.raises(BundleError, match=r"tilings \(\(28, 28, 28\),\) are no pairs of height and width"):
        LlavaPreprocessing(image_size=28, tilings=((28, 28, 28),))
