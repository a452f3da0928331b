"""Pictures on their way to the tower: what it would take for something else is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from framefusion import Bundle, Pipeline
from framefusion.errors import BundleError
from framefusion.runtime.media.visual_input import BytePatches


def test_a_tower_of_bytes_takes_no_floats_and_no_bytes_that_mean_something_else(bundle: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3)).astype(np.uint8)
    with Pipeline(Bundle(bundle, verify=False), threads=1) as pipeline:
        assert pipeline.manifest.vision.input == "uint8"
        visual = pipeline.manifest.preprocessing.image(pixels)
        (tiles,) = visual.tiles
        patches = tiles.patches
        assert isinstance(patches, BytePatches)
        others = (
            (tiles.values, "takes pictures in bytes, qwen_vl gives floats: rebuild"),
            (BytePatches(patches.levels, patches.table * 2), "qwen_vl has a table of its own: rebuild .* float"),
        )
        for given, problem in others:
            with pytest.raises(BundleError, match=problem):
                pipeline.encode_visual(replace(visual, tiles=(replace(tiles, patches=given),)))
        assert pipeline.encode_visual(visual).shape[1] == visual.num_rows
