"""Pictures in bytes are normalised in the tower's graph as a processor does it, for every level of every channel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from framefusion.export.graphs.graph_plan import FREE, Signature
from framefusion.export.graphs.tower import Levels, Tower
from framefusion.export.plan.build_plan import levels_of
from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing
from framefusion.runtime.media.preprocess import Preprocessing, normalised_levels
from framefusion.runtime.media.visual_input import BytePatches

CLIP = QwenVLPreprocessing()
PLAIN = QwenVLPreprocessing(image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
ODD = QwenVLPreprocessing(image_mean=(-3.0, 0.0, 2.0), image_std=(1e-2, 1.0, 9.0), rescale=1 / 128)


class Passing(Tower):
    """Gives its patches back, normalised."""

    def __init__(self, levels: Levels | None) -> None:
        super().__init__()
        self.levels = levels
        self.factor = nn.Parameter(torch.ones(1))

    def signature(self) -> Signature:
        """Any number of pictures of five patches."""
        return Signature((self.patches(3, 5, 768),), ({0: FREE},), ("patches",))

    def forward(self, patches: Tensor) -> Tensor:
        """[N, P, W] -> the same shape."""
        return self.normalised(patches)


def every_level(rule: Preprocessing) -> BytePatches:
    """All levels of all channels in each of two patches, in an order that no two channels share.  [1, 2, 768]"""
    random = np.random.default_rng(0)
    planes = [[random.permutation(256) for _ in range(3)] for _ in range(2)]
    return BytePatches(np.stack(planes).swapaxes(1, 2).reshape(1, 2, -1).astype(np.uint8), normalised_levels(rule))


@pytest.mark.parametrize("rule", [CLIP, PLAIN, ODD], ids=["clip", "plain", "odd"])
def test_every_level_is_that_of_the_processor(rule: Preprocessing) -> None:
    patches = every_level(rule)
    with torch.no_grad():
        ours = Passing(levels_of(rule))(torch.from_numpy(patches.levels)).numpy()
    expected = patches.normalised()
    scale = np.abs(expected).max()
    assert np.abs(ours - expected).max() <= 4e-7 * max(1, scale)
    step = np.diff(normalised_levels(rule)).min()
    assert np.abs(ours - expected).max() < step / 1000  # half a step is what may differ


def test_half_precision_rounds_once() -> None:
    patches = every_level(CLIP)
    with torch.no_grad():
        ours = Passing(levels_of(CLIP)).half()(torch.from_numpy(patches.levels))
    assert ours.dtype is torch.float16
    np.testing.assert_allclose(ours.numpy(), patches.normalised().astype(np.float16), rtol=1e-3, atol=1e-3)


def test_a_tower_without_levels_takes_floats() -> None:
    tower = Passing(None)
    given = torch.rand(1, 2, 768)
    assert not tower.takes_bytes
    assert tower(given) is given
    assert Passing(levels_of(CLIP)).takes_bytes
