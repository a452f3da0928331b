"""Patches equal Hugging Face's processor, sizes equal the published rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from framefusion.errors import BundleError, VideoError
from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing, grid_of, patchify, smart_resize
from framefusion.runtime.media.preprocess import BICUBIC, LARGE_PICTURE, Preprocessing, resize, resize_rounded_once
from framefusion.runtime.media.visual_input import Grid
from framefusion.storage.records import RecordError, from_json, to_json
from tests.versions import needs_torch, needs_transformers

ANY_RULE: Any = Preprocessing  # abstract: the value says which subclass it is


def frames(count: int, height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def reference(preprocessing: QwenVLPreprocessing, images: NDArray[np.uint8]) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(min_pixels=preprocessing.min_pixels, max_pixels=preprocessing.max_pixels)
    return processor(images=list(images), return_tensors="np")


@needs_transformers
@pytest.mark.parametrize(("height", "width"), [(56, 84), (100, 150), (300, 200), (20, 500)])
def test_images_equal_hugging_face(height: int, width: int) -> None:
    preprocessing = QwenVLPreprocessing(min_pixels=56 * 56, max_pixels=168 * 168)
    image = frames(1, height, width)
    expected = reference(preprocessing, image)
    patches = patchify(image, preprocessing)
    assert [list(patches.grid)] == expected["image_grid_thw"].tolist()
    np.testing.assert_array_equal(patches.values[0], expected["pixel_values"])


@needs_transformers
@pytest.mark.parametrize("count", [2, 5])
def test_videos_equal_hugging_face(count: int) -> None:
    preprocessing = QwenVLPreprocessing(min_pixels=56 * 56, max_pixels=112 * 112)
    film = frames(count, 90, 130)
    # The reference makes one patch of each frame, repeated: take each frame's own half of it.
    stills = reference(preprocessing, film)["pixel_values"].reshape(count, -1, 3, 2, 14, 14)[:, :, :, 0]
    stills = np.concatenate([stills, stills[-1:]])[: count + count % 2]
    expected = stills.reshape(-1, 2, *stills.shape[1:]).transpose(0, 2, 3, 1, 4, 5)  # [T, h * w, 3, 2, 14, 14]
    patches = patchify(film, preprocessing)
    assert patches.grid.frames == (count + 1) // 2
    assert patches.values.dtype == np.float32
    np.testing.assert_array_equal(patches.values, expected.reshape(patches.values.shape))


@needs_transformers
@given(st.integers(8, 3000), st.integers(8, 3000), st.sampled_from([56 * 56, 128 * 784]), st.sampled_from([14, 28]))
def test_sizes_equal_hugging_face(height: int, width: int, min_pixels: int, factor: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as expected

    try:
        want = expected(height, width, factor, min_pixels, 768 * 784)
    except ValueError:
        with pytest.raises(VideoError, match="the limit is 200 to 1"):
            smart_resize(height, width, factor, min_pixels, 768 * 784)
    else:
        assert smart_resize(height, width, factor, min_pixels, 768 * 784) == want


@pytest.mark.parametrize(
    ("num_frames", "max_pixels", "grid"),
    [
        (32, 360 * 420, Grid(16, 20, 36)),  # the setting of the paper: 180 tokens a grid
        (32, 768 * 784, Grid(16, 40, 72)),
        (768, 768 * 784, Grid(384, 24, 46)),  # the cap over all frames bites: 235200 pixels each
    ],
)
def test_pixels_per_frame(num_frames: int, max_pixels: int, grid: Grid) -> None:
    preprocessing = QwenVLPreprocessing(max_pixels=max_pixels, total_pixels=128000 * 784 * 0.9)
    assert grid_of(num_frames, 720, 1280, preprocessing) == grid


def test_the_cap_never_falls_under_the_minimum() -> None:
    preprocessing = QwenVLPreprocessing(total_pixels=1.0)
    assert preprocessing.frame_max_pixels(10) == int(preprocessing.min_pixels * 1.05)


@needs_torch
@pytest.mark.parametrize(
    ("height", "width", "size"), [(180, 320, (112, 196)), (90, 70, (140, 112)), (333, 50, (56, 28))]
)
def test_rounded_once_as_torch_resizes(height: int, width: int, size: tuple[int, int]) -> None:
    import torch

    frame = np.asarray(Image.fromarray(frames(1, 40, 40)[0]).resize((width, height)))
    planes = torch.from_numpy(frame.transpose(2, 0, 1).astype(np.float32))[None]
    wanted = torch.nn.functional.interpolate(planes, size=size, mode="bicubic", antialias=True)
    levels = wanted[0].clamp(0, 255).round().numpy().transpose(1, 2, 0)
    once, twice = (by(frame, *size, BICUBIC).astype(int) for by in (resize_rounded_once, resize))
    differing = np.abs(once - levels)
    assert differing.max() <= 1  # ties of a level
    assert (differing > 0).mean() < 1e-3 < (np.abs(twice - levels) > 0).mean()


def test_the_rounding_is_chosen() -> None:
    film = frames(2, 90, 130)
    twice = QwenVLPreprocessing(min_pixels=56 * 56, max_pixels=112 * 112)
    once = twice.with_options(resize_rounding="once")
    step = 1 / 255 / min(twice.image_std)
    difference = np.abs(patchify(film, once).values - patchify(film, twice).values)
    assert 0 < difference.mean() < step  # more where noise overshoots and is clipped after each direction


def test_survives_a_manifest() -> None:
    preprocessing = QwenVLPreprocessing(total_pixels=9e7, image_mean=(0.5, 0.5, 0.5))
    assert from_json(ANY_RULE, to_json(preprocessing)) == preprocessing


@pytest.mark.parametrize(("height", "width", "to"), [(3001, 2003, (448, 448)), (2500, 2400, (448, 3000))])
def test_a_large_picture_is_resized_in_bands_to_the_same_numbers(height: int, width: int, to: tuple[int, int]) -> None:
    picture = np.asarray(Image.fromarray(frames(1, 50, 40)[0]).resize((width, height), Image.Resampling.NEAREST))
    assert picture.size > LARGE_PICTURE
    whole = Image.fromarray(picture).resize(to[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize(picture, *to, BICUBIC), np.asarray(whole))


def test_bad_settings_and_frames_are_refused() -> None:
    with pytest.raises(BundleError, match="min_pixels <= max_pixels"):
        QwenVLPreprocessing(min_pixels=100, max_pixels=99)
    with pytest.raises(BundleError, match="three numbers"):
        QwenVLPreprocessing(image_std=(1.0, 1.0))
    with pytest.raises(RecordError, match="image_mean: expected a list, found 3"):
        from_json(ANY_RULE, {"rule": "qwen_vl", "image_mean": 3})
    with pytest.raises(VideoError, match=r"shape \(48, 64, 3\)"):
        patchify(frames(1, 48, 64)[0], QwenVLPreprocessing())
    with pytest.raises(VideoError, match="2x900 is too long"):
        patchify(frames(1, 900, 2), QwenVLPreprocessing())
