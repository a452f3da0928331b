"""What Python programs hold in memory is shown, or refused in one line; never a bare TypeError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from framefusion.errors import VideoError
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.sources import as_image, as_video, source_kind, video_of_frames
from tests.versions import needs_torch

SAMPLING = FrameSampling("qwen2_vl")
RGB = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
FILM = np.random.default_rng(1).integers(0, 256, (5, 12, 10, 3), np.uint8)


def clear() -> NDArray[np.uint8]:
    return np.concatenate([RGB, np.zeros((12, 10, 1), np.uint8)], axis=2)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (RGB, RGB),
        (RGB[None], RGB),
        (Image.fromarray(RGB), RGB),
        (RGB.astype(np.int64), RGB),
        (RGB.tolist(), RGB),
        (RGB.astype(np.float32) / 255, RGB),
        (RGB.astype(np.float64) / 255, RGB),
        (RGB.astype(np.float16) / np.float16(255), RGB),
        (RGB[:, :, 0], RGB[:, :, [0, 0, 0]]),
        (RGB[:, :, :1], RGB[:, :, [0, 0, 0]]),
        (RGB[:, :, 0] > 99, np.where(RGB[:, :, [0, 0, 0]] > 99, 255, 0)),
        (clear(), np.full_like(RGB, 255)),
        (Image.fromarray(clear()), np.full_like(RGB, 255)),
        (Image.fromarray(RGB[:, :, 0].astype(np.uint16) * 257), RGB[:, :, [0, 0, 0]]),
    ],
)
def test_pictures(source: Any, expected: NDArray[Any]) -> None:
    np.testing.assert_array_equal(as_image(source), expected)


@needs_torch
def test_tensors_of_torch_are_shown_as_arrays_are() -> None:
    import torch

    pictures: list[Any] = [torch.from_numpy(RGB.copy()), torch.from_numpy(RGB.copy()).float() / 255]
    for picture in pictures:
        np.testing.assert_array_equal(as_image(picture), RGB)
    mixed = [FILM[0], Image.fromarray(FILM[1]), torch.from_numpy(FILM[2].copy()), *FILM[3:]]
    films: list[Any] = [torch.from_numpy(FILM.copy()), mixed]
    for film in films:
        assert_is_the_film(film)


@needs_torch
def test_tensors_that_make_no_array_are_refused() -> None:
    import torch

    for source in (torch.from_numpy(RGB.copy()).bfloat16(), torch.zeros(2, 2, 3, requires_grad=True)):
        with pytest.raises(VideoError, match=r"makes no array|no array of pixels"):
            as_image(source)


def test_alpha_is_mixed_with_white_as_pillow_does() -> None:
    levels = np.random.default_rng(2).integers(0, 256, (64, 64, 4), np.uint8)
    shown = as_image(Image.fromarray(levels)).astype(int)
    assert np.abs(as_image(levels) - shown).max() <= 1  # Pillow's division by 255 is an approximation


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "is of type NoneType: give a path"),
        (b"\x89PNG", "the image cannot be read as an image"),
        ({"image": 1}, "is of type dict"),
        (object(), "is no array of pixels"),
        ([["a"]], "is no array of pixels"),
        ([RGB, FILM], "makes no array"),
        (RGB.astype(np.float32), r"floats from 0 to 255, they must lie in \[0, 1\]: divide"),
        (RGB / 255 - 0.5, "floats from -0.5 to 0.5"),
        (np.full((4, 4, 3), np.nan), "floats from nan"),
        (RGB.astype(np.uint16), "of type uint16, they must be uint8"),
        (RGB.astype(np.int64) - 9, "whole numbers from -9 to"),
        (FILM, r"has shape \(5, 12, 10, 3\): give \[height, width, channels\]"),
        (RGB.transpose(2, 0, 1), r"shape \(3, 12, 10\).*channels stand first, move them"),
        (RGB[:0], "has shape"),
        (3.5, "has shape"),
        (Image.new("RGB", (0, 0)), "is 0x0, it has no pixel"),
        (as_video(FILM, SAMPLING), "a film was given where an image is shown"),
    ],
)
def test_what_is_no_picture(source: Any, words: str) -> None:
    with pytest.raises(VideoError, match=words):
        as_image(source)


@pytest.mark.parametrize(
    "source",
    [
        FILM,
        list(FILM),
        tuple(FILM),
        [Image.fromarray(frame) for frame in FILM],
        [FILM[0], Image.fromarray(FILM[1]), *FILM[2:]],
        FILM.astype(np.float32) / 255,
        (FILM.astype(np.float32) / 255).tolist(),
    ],
)
def test_films(source: Any) -> None:
    assert_is_the_film(source)


def assert_is_the_film(source: Any) -> None:
    video = as_video(source, FrameSampling("qwen2_vl", fps=4.0))
    np.testing.assert_array_equal(video.frames, FILM)
    np.testing.assert_allclose(video.times, np.arange(5) / 4)
    assert video.duration == 1.25
    assert as_video(video, SAMPLING) is video


def test_frames_from_files(tmp_path: Path) -> None:
    for number, frame in enumerate(FILM):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    video = video_of_frames([tmp_path / f"{number}.png" for number in range(5)], 10.0)
    np.testing.assert_array_equal(video.frames, FILM)
    assert video.times.tolist() == [0.0, 0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "the video is of type NoneType"),
        ([], "a video of no frames"),
        (FILM[:0], "has shape"),
        (RGB[:, :, 0], "has shape"),
        (RGB, r"has shape \(12, 10, 3\).*one picture is a film as array\[None\]"),
        (FILM[:, :, :, 0], r"has shape \(5, 12, 10\).*frames of grey"),
        (Image.fromarray(RGB), "one picture was given where a video is shown"),
        ([RGB, RGB[:6]], "frame 1 of the video is 10x6, the first is 10x12"),
        ([RGB, None], "the image is of type NoneType"),
        (FILM.transpose(0, 3, 1, 2), r"channels stand first"),
        (FILM.astype(np.float32), "floats from 0 to 255"),
        (np.ma.masked_array(FILM, FILM > 9), "its mask would be passed over"),
        (np.array([Image.fromarray(frame) for frame in FILM], object), r"give list\(array\)"),
        (FILM[None], "a batch is several films"),
        ((frame for frame in FILM), r"can be read once only, give list\(frames\)"),
        (iter(FILM), r"can be read once only, give list\(frames\)"),
    ],
)
def test_what_is_no_film(source: Any, words: str) -> None:
    with pytest.raises(VideoError, match=words):
        as_video(source, SAMPLING)


class FromHost:
    """What gives itself by DLPack alone, as libraries that decode films do."""

    def __dlpack__(self, **settings: Any) -> Any:
        return FILM.__dlpack__(**settings)

    def __dlpack_device__(self) -> tuple[int, int]:
        return FILM.__dlpack_device__()


class FromDevice(FromHost):
    shape = FILM.shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)  # kDLCUDA


class WithItsName:
    def asnumpy(self) -> NDArray[Any]:
        return FILM


def test_what_gives_itself_by_dlpack_is_shown_from_the_host() -> None:
    source: Any = FromHost()
    assert source_kind(source) == "video"
    assert_is_the_film(source)


@pytest.mark.parametrize(
    ("source", "words"),
    [(FromDevice(), "lies in the memory of a device, copy it"), (WithItsName(), r"give its array, frames\.asnumpy")],
)
def test_frames_of_other_libraries_are_refused_with_what_they_have(source: Any, words: str) -> None:
    with pytest.raises(VideoError, match=words):
        as_video(source, SAMPLING)


@pytest.mark.parametrize("source", [(frame for frame in FILM), FILM[None], WithItsName(), 5, {1}])
def test_a_source_of_unknown_kind_is_refused_with_a_remedy(source: Any) -> None:
    with pytest.raises(VideoError, match=r"is neither a film nor a picture: .*give"):
        source_kind(source)


@needs_torch
def test_the_remedies_for_tensors_work() -> None:
    import torch

    first: Any = torch.from_numpy(FILM.copy()).permute(0, 3, 1, 2)
    with pytest.raises(VideoError, match=r"numpy\.moveaxis\(numpy\.asarray\(source\), -3, -1\)"):
        as_video(first, SAMPLING)
    assert_is_the_film(np.moveaxis(np.asarray(first), -3, -1))
    half: Any = (torch.from_numpy(FILM.copy()).float() / 255).bfloat16().requires_grad_()
    with pytest.raises(VideoError, match=r"tensor\.detach\(\)\.cpu\(\), bfloat16 as tensor\.float\(\)"):
        as_video(half, SAMPLING)
    assert len(as_video(half.detach().cpu().float(), SAMPLING).frames) == len(FILM)


def test_frames_at_their_own_times() -> None:
    """A phone's film: its last frames come late, and the families tell those times."""
    begin = [0.0, 0.04, 0.08, 1.5, 3.0]
    video = video_of_frames(FILM, times=begin)
    np.testing.assert_array_equal(video.frames, FILM)
    assert (video.times.tolist(), video.moments.tolist()) == (begin, begin)
    assert video.duration == pytest.approx(3.0 + 0.73)
    even = video_of_frames(list(FILM), times=np.arange(5) / 4)
    assert (even.fps, even.duration) == (4.0, 1.25)
    assert even.counted_indices.tolist() == [0, 1, 2, 3, 4]
    assert video_of_frames(FILM[:1], times=[0.0]).duration == 1.0


@pytest.mark.parametrize(
    "begin", [[0, 1], [0, 1, 1, 2, 3], [0, 1, 2, 3, np.nan], [-1, 0, 1, 2, 3], "abcde", [[0]], 3.0, [4, 3, 2, 1, 0]]
)
def test_times_that_place_no_frames(begin: Any) -> None:
    with pytest.raises(VideoError, match=r"the times of a film"):
        video_of_frames(FILM, times=begin)


def test_frames_need_a_rate_or_times() -> None:
    both: dict[str, Any] = {"fps": 2.0, "times": [0, 1, 2, 3, 4]}
    for given in (dict[str, Any](), both):
        with pytest.raises(VideoError, match="give one of fps and times"):
            video_of_frames(FILM, **given)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e-320, 1e12, "fast"])
def test_rates_that_are_none(fps: Any) -> None:
    with pytest.raises(VideoError, match="a film's rate is"):
        video_of_frames(FILM, fps)


def test_pictures_in_memory_have_the_limits_of_files() -> None:
    with pytest.raises(VideoError, match="is 10x12, 120 pixels, the limit is 100"):
        as_image(Image.fromarray(RGB), MediaLimits(image_pixels=100))
    with pytest.raises(VideoError, match="admits no picture"):
        MediaLimits(image_pixels=0)


def test_a_lazily_opened_picture_that_is_broken(tmp_path: Path) -> None:
    Image.fromarray(RGB.repeat(20, 0)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    with Image.open(tmp_path / "b.png") as image, pytest.raises(VideoError, match=r"b\.png cannot be read"):
        as_image(image)
