"""How many pixels the frames of a film share, as a checkpoint's files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.families.qwen2_vl.reading import film_pixels
from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing, grid_of


@pytest.mark.parametrize(
    ("settings", "total"),
    [
        ({}, 0.9 * 128_000 * 28**2),  # qwen-vl-utils; what transformers announces as its default
        ({"cap_pixels_per_frame": True}, 0.9 * 128_000 * 28**2),
        ({"cap_pixels_per_frame": True, "max_video_tokens": 1000}, 0.9 * 1000 * 28**2),
        ({"cap_pixels_per_frame": False}, None),
    ],
)
def test_the_frames_of_a_film_share_its_pixels(tmp_path: Path, settings: dict[str, Any], total: float | None) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(settings))
    assert film_pixels(Checkpoint(tmp_path), QwenVLPreprocessing()) == pytest.approx(total)
    rule = QwenVLPreprocessing(total_pixels=total)
    tokens = grid_of(768, 720, 1280, rule).merged(2)
    assert (tokens.frames * tokens.height * tokens.width <= 0.9 * 128_000) == (total is not None)
