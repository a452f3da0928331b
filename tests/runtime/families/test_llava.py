"""LLaVA's rule: tiles of images of many sizes, labels and times of videos, sampled frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.errors import VideoError
from framefusion.reduction.tracks import TEXT
from framefusion.runtime.families.llava import NEWLINE, LlavaPreprocessing, time_instruction
from framefusion.runtime.media.frame_sampling import FrameSampling, sample_indices
from framefusion.runtime.media.tiles.anyres import best_tiling, rows_shown, unpadded
from framefusion.runtime.media.tiles.scales import tile_places
from framefusion.runtime.media.video.frames import Video, read_video
from framefusion.runtime.media.visual_input import Rows, Token
from tests.films import write_film
from tests.llava_pictures import PATCH, SIGLIP_SIDE, SIZES, TILE, TILINGS
from tests.versions import needs_transformers

PIXELS = LlavaPreprocessing(image_size=SIGLIP_SIDE, patch_size=PATCH)


@needs_transformers
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tilings_and_patches_shown_equal_transformers(height: int, width: int) -> None:
    """Counts and interpolated rows of every size equal `pack_image_features`, up to one rounding of fp32."""
    import torch
    from transformers import LlavaOnevisionModel
    from transformers.image_processing_utils import select_best_resolution

    tiling = best_tiling(height, width, TILINGS)
    assert tiling == tuple(select_best_resolution((height, width), [list(one) for one in TILINGS]))
    side, grid = 27, (tiling[0] // TILE, tiling[1] // TILE)
    features = np.random.default_rng(0).normal(size=(1 + grid[0] * grid[1], side**2, 3)).astype(np.float32)
    config: Any = type("Config", (), {"image_grid_pinpoints": [list(one) for one in TILINGS]})
    config.vision_config = type("Vision", (), {"image_size": TILE, "patch_size": 14})
    pack: Any = LlavaOnevisionModel.pack_image_features
    model = type("Model", (), {"config": config})
    packed, _ = pack(model, [torch.from_numpy(features)], [(height, width)], None, vision_aspect_ratio="anyres_max_9")
    (expected,) = packed

    rule = LlavaPreprocessing(image_size=TILE, tilings=TILINGS, max_tiles=9, unpad_digits=7)
    visual = rule.image(np.zeros((height, width, 3), np.uint8))
    assert visual.rows is not None
    np.testing.assert_allclose(visual.rows.apply(features.reshape(-1, 3)), expected, rtol=0, atol=1e-5)
    lines = [piece for piece in visual.pieces[1:] if isinstance(piece, Rows)]
    assert visual.pieces[2::2] == (Token(NEWLINE, TEXT),) * len(lines)
    assert len({line.labels.size for line in lines}) == 1
    labels = np.concatenate([piece.labels for piece in visual.pieces if isinstance(piece, Rows)])
    np.testing.assert_array_equal(labels, np.arange(len(expected)))


def test_padding_is_counted_in_the_checkpoints_own_arithmetic() -> None:
    """LLaVA truncates the quotient, transformers rounds it to seven digits first: 369x1640 in 1x5 tiles shows it."""
    places = tile_places(1, 5, 27)
    columns = 1640 * (27 / 369)
    assert (int(columns), round(columns, 7)) == (119, 120)
    assert unpadded(places, 369, 1640, None).shape == (27, 119)  # 8 of 135 at either side
    assert unpadded(places, 369, 1640, 7).shape == (27, 121)  # 7 of 135


def test_rows_are_taken_as_they_are_where_nothing_shrinks() -> None:
    places = 4 + tile_places(1, 2, 2)
    rows = rows_shown(4, places, places.shape)
    assert rows.weight is None
    assert rows.index[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]


def test_an_image_no_tiling_can_show_is_refused() -> None:
    rule = replace(PIXELS, tilings=((72, 72), (72, 144)))
    with pytest.raises(VideoError, match="1x20000 is too long and thin"):
        rule.image(np.zeros((20000, 1, 3), np.uint8))


def test_several_images_are_shown_whole() -> None:
    rule = replace(PIXELS, tilings=((72, 144),), tile_each=False)
    assert rule.for_images(1).tilings
    assert not rule.for_images(2).tilings
    assert replace(rule, tile_each=True).for_images(2).tilings
    visual = rule.for_images(2).image(np.full((10, 40, 3), 255, np.uint8))
    assert visual.tiles[0].grid == (1, 5, 5)
    rows = visual.tiles[0].values.reshape(5, 5, 3, 14, 14)
    assert rows[2].min() == 1  # the image in the middle
    assert rows[0].max() == pytest.approx(127 / 255 * 2 - 1, abs=1e-6)  # the mean's grey above it
    assert visual.pieces[1:] == (Token(NEWLINE, TEXT),)


def video(frames: int = 3, fps: float = 25.0, indices: list[int] | None = None, total: int = 75) -> Video:
    chosen = np.array(indices if indices is not None else np.arange(frames))
    return Video(np.zeros((len(chosen), 60, 90, 3), np.uint8), chosen, fps, total, total / fps, 0.0)


@pytest.mark.parametrize(
    ("position", "mode", "learned", "per_frame"),
    [
        ("grid", "bilinear", [3, 7, 11], 12),
        ("grid", "average", [2, 5], 6),
        ("frame", "bilinear", [9], 10),
        ("one_token", "bilinear", [], 9),
        ("no_token", "average", [], 4),
    ],
)
def test_labels_of_a_video(position: Any, mode: Any, learned: list[int], per_frame: int) -> None:
    visual = replace(PIXELS, mm_newline_position=position, mm_spatial_pool_mode=mode).video(video())
    labels: list[int] = []
    for piece in visual.pieces:
        assert not isinstance(piece, str)
        labels += piece.labels.tolist() if isinstance(piece, Rows) else [piece.label]
    assert labels == [*range(per_frame)] * 3 + [TEXT] * (position == "one_token")
    newlines = [piece.label for piece in visual.pieces if isinstance(piece, Token)]
    assert newlines == learned * 3 + [TEXT] * (position == "one_token")
    assert visual.tiles[0].pool == mode
    assert visual.num_rows == 3 * (per_frame - len(learned))


@pytest.mark.parametrize(("frames", "fps"), [(9, 25), (40, 10), (90, 30), (31, 24)])
def test_frames_of_real_films(frames: int, fps: int, tmp_path: Path) -> None:
    """One a second, or `most` spread evenly; forced ones may repeat, and each index has its frame."""
    film = write_film(tmp_path / "film.mp4", frames=frames, fps=fps)
    sampling = FrameSampling("llava", fps=1.0, min_frames=1, max_frames=3, frame_factor=1)
    every = list(range(0, frames, fps))
    expected = every if len(every) <= 3 else np.linspace(0, frames - 1, 3, dtype=int).tolist()
    assert read_video(film, sampling).indices.tolist() == expected
    forced = read_video(film, replace(sampling, force=True, max_frames=12))
    assert forced.indices.tolist() == np.linspace(0, frames - 1, 12, dtype=int).tolist()
    assert len(forced.frames) == 12
    seen = read_video(film, FrameSampling("uniform", fps=4.0, min_frames=1, max_frames=5, frame_factor=1))
    wanted = min(5, max(1, int(frames / fps * 4)))
    assert seen.indices.tolist() == [int(i * frames / wanted) for i in range(wanted)]


def test_half_a_frame_a_second_is_a_frame_each_step() -> None:
    sampling = FrameSampling("llava", fps=1.0, min_frames=1, max_frames=8, frame_factor=1)
    assert sample_indices(4, 0.3, sampling).tolist() == [0, 1, 2, 3]


def test_the_times_that_a_prompt_tells() -> None:
    told = time_instruction(video(indices=[0, 37, 74], fps=29.97), round_fps=False)
    assert told == (
        "The video lasts for 2.50 seconds, and 3 frames are uniformly sampled from it. These frames are located at "
        "0.00s,1.23s,2.47s.Please answer the following questions related to this video."
    )
    once_a_second = time_instruction(video(indices=[0, 30, 60], fps=29.97), round_fps=True)
    assert "0.00s,1.00s,2.00s" in once_a_second
    assert "0.00s,1.23s,2.47s" in time_instruction(video(indices=[0, 37, 74], fps=29.97), round_fps=True)


def test_frames_keep_their_shape_or_not() -> None:
    """CLIP's pictures are the middle of a frame, SigLIP's all of it."""
    frame = np.zeros((80, 200, 3), np.uint8)
    frame[:, :50] = frame[:, 150:] = 255
    squeezed, cropped = (
        replace(PIXELS, crop=crop).video(Video(frame[None], np.zeros(1, np.int64), 1, 1, 1, 0)).tiles[0].values
        for crop in (False, True)
    )
    assert squeezed.max() == 1
    assert cropped.max() == -1
