"""Qwen2-VL and Qwen2.5-VL beside qwen-vl-utils, the authors' package: which frames, what sizes, what pixels."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("qwen_vl_utils", reason="qwen-vl-utils is not installed: run `make test-authors`")
torch: Any = importlib.import_module("torch")
vision_process: Any = importlib.import_module("qwen_vl_utils.vision_process")

from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing, grid_of  # noqa: E402
from framefusion.runtime.media.frame_sampling import FrameSampling, sample_indices  # noqa: E402
from framefusion.runtime.media.preprocess import BICUBIC, resize, resize_rounded_once  # noqa: E402
from framefusion.runtime.media.video.frames import read_video  # noqa: E402
from tests.films import write_film  # noqa: E402

RULE = QwenVLPreprocessing(total_pixels=0.9 * 128_000 * 28**2, resize_rounding="once")
SIZES = ((720, 1280), (1080, 1920), (360, 640), (123, 457), (2160, 3840), (64, 64), (1280, 720), (30, 900))


def smooth(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """Frames without hard edges, as films have them."""
    small = np.random.default_rng(0).integers(0, 256, (count, height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height))) for frame in small])


def theirs(frames: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> NDArray[np.uint8]:
    """`fetch_video` with these frames for a film: decoded frames enter where its readers hand them over."""
    read = torch.from_numpy(frames.transpose(0, 3, 1, 2).copy())
    readers: dict[str, Any] = {vision_process.get_video_reader_backend(): lambda ele: (read, {}, 2.0)}
    monkeypatch.setattr(vision_process, "VIDEO_READER_BACKENDS", readers)
    shown = vision_process.fetch_video({"video": "film.mp4"}).numpy()
    return np.asarray(shown.transpose(0, 2, 3, 1), np.uint8)


@pytest.mark.parametrize("total", [4, 7, 25, 132, 301, 999, 16763, 108_000])
@pytest.mark.parametrize("rate", [10.0, 24000 / 1001, 25.0, 59.94])
def test_the_same_frames(total: int, rate: float) -> None:
    count = vision_process.smart_nframes({}, total, rate)
    expected = torch.linspace(0, total - 1, count).round().long().tolist()  # as its readers do
    assert sample_indices(total, rate, FrameSampling("qwen2_vl")).tolist() == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [2, 4, 64, 300, 302, 500, 768])
def test_the_same_sizes_of_frames(size: tuple[int, int], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.broadcast_to(np.zeros((1, 1, 1, 1), np.uint8), (count, *size, 3))
    sizes: list[Any] = []

    def note(video: Any, size: Any, **_: Any) -> Any:
        sizes.append(tuple(size))
        return video[:1]

    monkeypatch.setattr(vision_process.transforms.functional, "resize", note)
    readers: dict[str, Any] = {vision_process.get_video_reader_backend(): lambda ele: (_Shape(frames), {}, 2.0)}
    monkeypatch.setattr(vision_process, "VIDEO_READER_BACKENDS", readers)
    vision_process.fetch_video({"video": "film.mp4"})
    grid = grid_of(count, *size, RULE)
    assert sizes == [(grid.height * 14, grid.width * 14)]


class _Shape:
    """Frames that are never touched: [N, 3, H, W] by shape alone."""

    def __init__(self, frames: NDArray[np.uint8]) -> None:
        count, height, width, channels = frames.shape
        self.shape = (count, channels, height, width)

    def __getitem__(self, _: Any) -> Any:
        return torch.zeros(1)


@pytest.mark.parametrize("size", SIZES[:4])
def test_the_same_pixels_of_frames_where_rounding_once_is_chosen(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floats of another order of sums round some ties of a level the other way: one level in 1e-4 of them."""
    frames = smooth(2, *size)
    expected = theirs(frames, monkeypatch).astype(int)
    _, height, width, _ = expected.shape
    once = np.stack([resize_rounded_once(frame, height, width, BICUBIC) for frame in frames]).astype(int)
    twice = np.stack([resize(frame, height, width, BICUBIC) for frame in frames]).astype(int)
    assert np.abs(once - expected).max() <= 1
    assert (once != expected).mean() < 1e-3
    assert (once != expected).mean() <= (twice != expected).mean()


@pytest.mark.parametrize("size", SIZES)
def test_the_same_images(size: tuple[int, int]) -> None:
    """Images it resizes with Pillow, in bytes: rounded twice."""
    pixels = smooth(1, *size)[0]
    expected = np.asarray(vision_process.fetch_image({"image": Image.fromarray(pixels)}))
    limits = {"image_min_pixels": 4 * 28**2, "image_max_pixels": 16384 * 28**2}
    height, width = QwenVLPreprocessing(**limits).image_size(*size)  # type: ignore[arg-type]
    np.testing.assert_array_equal(resize(pixels, height, width, BICUBIC), expected)


def test_a_whole_film(tmp_path: Path) -> None:
    """Its reader and ours: the same frames of a file, to what two decoders of colour differ by."""
    pytest.importorskip("decord", reason="decord, which reads films for qwen-vl-utils, is not installed")
    os.environ.setdefault("FORCE_QWENVL_VIDEO_READER", "decord")
    film = write_film(tmp_path / "film.mp4", frames=40, fps=8, size=128)
    pixels, facts, rate = vision_process._read_video_decord({"video": str(film)})
    video = read_video(film, FrameSampling("qwen2_vl"))
    assert video.indices.tolist() == np.asarray(facts["frames_indices"]).tolist()
    assert rate == pytest.approx(len(video.indices) / video.duration)
    assert np.abs(pixels.numpy().transpose(0, 2, 3, 1).astype(int) - video.frames).mean() < 2
