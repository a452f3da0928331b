"""What is Qwen2.5-VL's alone: windows, temporal positions that tell seconds, and checkpoints that cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framefusion.errors import BundleError, CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.families.qwen2_5_vl.row import preprocessing
from framefusion.export.families.qwen2_5_vl.weights import tower
from framefusion.runtime.families.qwen2_5_vl import Qwen25VLPreprocessing, windows_of
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.visual_input import Rows, VisualInput
from framefusion.runtime.text.positions import mrope_positions
from tests.families.case import clip, picture
from tests.families.qwen2_5_vl import Qwen25VLCase

RULE = Qwen25VLPreprocessing(tokens_per_second=2, min_pixels=56 * 84, max_pixels=112 * 84)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_windows_equal_transformers(rows: int, columns: int, side: int) -> None:
    from transformers.vision_utils import get_vision_window_index

    grid = torch.tensor([[1, 2 * rows, 2 * columns]])
    index, ends = get_vision_window_index(grid, spatial_merge_size=2, window_size=28 * side, patch_size=14)
    units, slots = windows_of(rows, columns, side)
    assert units[units >= 0].tolist() == index.tolist()
    assert (4 * (units >= 0).sum(1)).tolist() == torch.diff(ends).tolist()
    np.testing.assert_array_equal(units.flatten()[slots], np.arange(rows * columns))


def film(frames: int, total: int, fps: float, height: int = 60, width: int = 84) -> Video:
    indices = np.linspace(0, total - 1, frames).round().astype(np.int64)
    return Video(clip(frames, height, width), indices, fps, total, total / fps, 0.0)


def rows_of(visual: VisualInput) -> Rows:
    (rows,) = (piece for piece in visual.pieces if isinstance(piece, Rows))
    return rows


@pytest.mark.parametrize("pace", [1, 2, 4, 25])
@pytest.mark.parametrize(("frames", "total", "fps"), [(8, 8, 2.0), (10, 149, 29.97), (12, 300, 25.0), (7, 40, 24.0)])
def test_temporal_positions_equal_transformers(frames: int, total: int, fps: float, pace: int) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
    from transformers.video_utils import VideoMetadata

    video, rule = film(frames, total, fps), replace(RULE, tokens_per_second=pace)
    metadata = VideoMetadata(total_num_frames=total, fps=fps, frames_indices=video.indices.tolist())
    second_per_grid = torch.tensor([2 / metadata.sampled_fps])[0]  # the processor's, as a batch holds it
    visual = rule.video(video)
    nobody: Any = None  # the method reads nothing of its model
    expected = Qwen2_5_VLModel.get_vision_position_ids(
        nobody, 0, torch.tensor(visual.tiles[0].grid), 1, 2, pace * second_per_grid
    )
    if expected.is_floating_point():
        pytest.skip("this transformers keeps fractions of a temporal step, later ones do not")
    np.testing.assert_array_equal(rows_of(visual).places, expected.numpy())


def test_positions_of_a_prompt_equal_transformers() -> None:
    """A video shorter than it is wide: the old rule for the text behind it and transformers' agree."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    with torch.device("meta"):
        model: Any = Qwen2_5_VLModel(Qwen2_5_VLConfig(**small_config()))
    shown = [RULE.video(film(4, 40, 20.0)), RULE.image(picture())]
    video, image = (rows_of(visual).places for visual in shown)
    assert video is not None
    assert image is not None
    found, delta = mrope_positions([5, video, 3, image, 4])
    kinds = torch.tensor([[0] * 5 + [2] * video.shape[1] + [0] * 3 + [1] * image.shape[1] + [0] * 4])
    grids = [torch.tensor([list(visual.tiles[0].grid)]) for visual in shown]
    expected, expected_delta = model.get_rope_index(
        torch.zeros_like(kinds), kinds, image_grid_thw=grids[1], video_grid_thw=grids[0], second_per_grid_ts=[1.0]
    )
    np.testing.assert_array_equal(found, expected[:, 0].numpy())
    assert delta == int(expected_delta)


def small_config() -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
    }
    text |= {"num_hidden_layers": 1, "vocab_size": 8, "bos_token_id": None, "eos_token_id": None}
    vision = {"hidden_size": 16, "num_heads": 2, "depth": 1, "intermediate_size": 16, "tokens_per_second": 2}
    return {"text_config": text | {"rope_parameters": rope}, "vision_config": vision | {"out_hidden_size": 16}}


def test_text_resumes_behind_a_long_video() -> None:
    """The rule that the checkpoints were trained with: behind the largest position on any axis."""
    visual = RULE.video(film(12, 300, 25.0))  # a second a frame: grids stand 4 positions apart
    places = rows_of(visual).places
    assert places is not None
    assert sorted(set(places[0].tolist())) == [0, 4, 8, 12, 16, 20]
    assert mrope_positions([3, places, 2]).positions[:, -2:].tolist() == [[24, 25]] * 3


def test_images_have_limits_of_their_own(tmp_path: Path) -> None:
    Qwen25VLCase().write(tmp_path, "untied")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 28 * 28, "max_pixels": 57 * 57}))
    rule = preprocessing(Checkpoint(tmp_path))
    assert rule.image(picture(300, 300)).tiles[0].grid == (1, 4, 4)
    assert rule.video(film(4, 8, 2.0, 300, 300)).tiles[0].grid == (2, 6, 6)
    smaller = rule.with_options(max_pixels=28 * 56)
    assert smaller.image(picture(300, 300)).tiles[0].grid == (1, 2, 2)
    assert smaller.video(film(4, 8, 2.0, 300, 300)).tiles[0].grid == (2, 2, 2)


@pytest.mark.parametrize(
    ("name", "value", "read", "message"),
    [
        ("window_size", 20, tower, "window_size 20 .* it must be 28 or more"),
        ("fullatt_block_indexes", [1, 4], tower, r"fullatt_block_indexes \[1, 4\] are not layers 0 .. 3"),
        ("fullatt_block_indexes", None, tower, "has no fullatt_block_indexes"),
        ("hidden_act", "gelu", tower, "hidden_act 'gelu' of vision_config is not supported, 'silu' is"),
        ("tokens_per_second", None, preprocessing, "has no tokens_per_second"),
    ],
)
def test_what_a_checkpoint_cannot_say(
    name: str, value: Any, read: Callable[[Checkpoint], Any], message: str, tmp_path: Path
) -> None:
    Qwen25VLCase().write(tmp_path, "untied")
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        read(Checkpoint(tmp_path))


def test_time_must_pass() -> None:
    with pytest.raises(BundleError, match="tokens_per_second 0 is impossible"):
        Qwen25VLPreprocessing(tokens_per_second=0)
