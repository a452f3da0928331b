"""LLaVA-Video and LLaVA-OneVision beside their authors' repository: tiles, frames, times, defaults."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from PIL import Image

from framefusion.export.families.llava import row as llava
from framefusion.runtime.families.llava import LlavaPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling, sample_indices
from framefusion.runtime.media.preprocess import BICUBIC
from framefusion.runtime.media.tiles.anyres import best_tiling, cut_tiles, fitted
from framefusion.runtime.media.video.frames import Video
from tests.authors.repositories import LLAVA

LLAVA.required()
PINPOINTS = "(1x1),...,(6x6)"


@pytest.mark.parametrize("size", [(384, 384), (300, 900), (720, 1280), (1000, 333), (2000, 1999), (31, 40), (500, 700)])
def test_the_same_tiles(size: tuple[int, int]) -> None:
    names = ("select_best_resolution", "resize_and_pad_image", "divide_to_patches")
    code = LLAVA.functions("llava/mm_utils.py", names, {"math": math, "Image": Image})
    small = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    picture = Image.fromarray(small).resize(size[::-1])
    known = llava.tilings(PINPOINTS, 384)
    best = code["select_best_resolution"](picture.size, [(wide, tall) for tall, wide in known])
    tiling = best_tiling(*size, known)
    assert tiling == tuple(best)[::-1]
    expected = code["divide_to_patches"](code["resize_and_pad_image"](picture, best), 384)
    tiles = cut_tiles(fitted(np.asarray(picture), tiling, BICUBIC), 384)
    np.testing.assert_array_equal(tiles, np.stack([np.asarray(tile) for tile in expected]))


class Film:
    """A film by its number of frames and rate, as decord's reader shows it."""

    def __init__(self, total: int, rate: float) -> None:
        self.total = total
        self.rate = rate
        self.taken: list[int] = []

    def __len__(self) -> int:
        return self.total

    def get_avg_fps(self) -> float:
        return self.rate

    def get_batch(self, indices: list[int]) -> Film:
        self.taken = list(indices)
        return self

    def asnumpy(self) -> None:
        return None

    def seek(self, _: int) -> None:
        return None


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("rate", [8.0, 25.0, 29.97])
@pytest.mark.parametrize("total", [70, 300, 1999, 90_000])
def test_the_same_frames_and_words_about_them(total: int, rate: float, force: bool) -> None:
    film = Film(total, rate)
    needed = {"VideoReader": lambda *_, **__: film, "cpu": lambda _: None, "np": np}
    code = LLAVA.functions("llava/utils.py", ("process_video_with_decord",), needed)

    class DataArguments:
        video_fps = 1
        frames_upbound = 64
        force_sample = force

    _, video_time, frame_time, count = code["process_video_with_decord"]("film.mp4", DataArguments)
    sampling = FrameSampling("llava", fps=1.0, min_frames=1, max_frames=64, frame_factor=1, force=force)
    indices = sample_indices(total, rate, sampling)
    assert indices.tolist() == film.taken

    values = {"video_time": video_time, "frame_time": frame_time, "num_frames_to_sample": count}
    sentence = LLAVA.sentence("llava/train/train.py", "time_instruciton", values)
    rule = LlavaPreprocessing(image_size=28, time_instruction=True, round_fps=not force)
    frames = np.zeros((count, 28, 28, 3), np.uint8)
    pieces = rule.video(Video(frames, indices, rate, total, total / rate, 0.0)).pieces
    training = LLAVA.file("llava/train/train.py").read_text()
    assert r"f'{DEFAULT_IMAGE_TOKEN}\n{time_instruciton}\n" in training
    assert pieces[-1] == f"\n{sentence}"


def test_the_same_numbers_of_frames() -> None:
    scripts = {
        "scripts/video/train/SO400M_Qwen2_7B_ov_to_video_am9.sh": llava.MAX_FRAMES,
        "scripts/video/train/SO400M_Qwen2_72B_ov_to_video_am9.sh": llava.MAX_FRAMES_72B,
        "scripts/train/finetune_ov.sh": llava.ONEVISION_FRAMES,
    }
    for script, frames in scripts.items():
        assert re.findall(r"--frames_upbound (\d+)", LLAVA.file(script).read_text()) == [str(frames)]


def test_their_class_sets_rope_scaling_to_null() -> None:
    assert "config.rope_scaling = None" in LLAVA.file("llava/model/language_model/llava_qwen.py").read_text()
