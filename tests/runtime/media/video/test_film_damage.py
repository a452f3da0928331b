"""Whole films are read whatever their headers say; what is cut is refused, what is damaged is counted and told."""

from __future__ import annotations

import struct
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from framefusion.errors import MediaWarning, VideoError
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.video.container.ending import Ending
from framefusion.runtime.media.video.frames import Video, read_video
from tests.runtime.media.video.test_video import write_video
from tests.wheel import ROOT

FILMS = ROOT / "tests" / "media" / "films"
SAMPLING = FrameSampling("qwen2_vl", fps=1e6, max_frames=2000, min_frames=1, frame_factor=1)


def quietly(path: Path, **limits: Any) -> Video:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MediaWarning)
        return read_video(path, SAMPLING, limits=MediaLimits(**limits))


def held(path: Path, times: list[float], codec: str = "libx264") -> Path:
    """A film whose frames stand at these seconds; the last one stays as long as the one before."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * number % 256, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# ---- whole, though it does not look so


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "mov", "ts", "flv", "nut"])
def test_slides_are_whole_in_every_container(tmp_path: Path, suffix: str) -> None:
    times = [0.0, 5.0, 9.0, 20.0, 31.0]
    video = read_video(held(tmp_path / f"a.{suffix}", times), SAMPLING)
    assert video.total_frames == 5
    np.testing.assert_allclose(np.unique(video.times.round(2)), times, atol=0.02)
    assert video.lost_frames == 0


def test_a_stale_duration_is_no_promise() -> None:
    """F15: cut by ffmpeg -ss, with the duration of what it was cut from."""
    video = read_video(FILMS / "st.ogv", SAMPLING)
    assert (video.total_frames, video.lost_frames) == (62, 0)


def with_empty_chunks(path: Path, dropped: int) -> Path:
    """An AVI, every frame but each `dropped`-th an empty chunk: nothing changed."""
    file = bytearray(write_video(path, 60, "ffvhuff").read_bytes())
    start = file.index(b"movi")
    body, at, count, offsets = bytearray(), start + 4, 0, []
    while file[at : at + 4] == b"00dc":
        size = struct.unpack_from("<I", file, at + 4)[0]
        offsets.append((len(body) + 4, 0 if count % dropped else size))
        padded = size + size % 2
        chunk = bytes(file[at : at + 8 + padded]) if count % dropped == 0 else b"00dc\0\0\0\0"
        body += chunk
        at += 8 + padded
        count += 1
    index = b"".join(b"00dc" + struct.pack("<III", 16, place, size) for place, size in offsets)
    head = file[: start + 4]
    struct.pack_into("<I", head, start - 4, 4 + len(body))
    whole = head + body + b"idx1" + struct.pack("<I", len(index)) + index
    struct.pack_into("<I", whole, 4, len(whole) - 8)
    path.write_bytes(whole)
    assert count == 60
    return path


@pytest.mark.parametrize("dropped", [3, 20])
def test_empty_chunks_of_an_avi_repeat_the_frame_before(tmp_path: Path, dropped: int) -> None:
    video = read_video(with_empty_chunks(tmp_path / "a.avi", dropped), FrameSampling("qwen2_vl", fps=5.0, min_frames=1))
    assert video.total_frames == 60 // dropped
    assert video.duration == pytest.approx(6.0, abs=0.11 + 0.1 * dropped)
    assert video.lost_frames == 0
    assert np.abs(np.diff(video.moments)).max() < 0.5 + 0.1 * dropped


def with_sound(path: Path, seconds: int) -> Path:
    """A film of 3 seconds whose sound lasts longer."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10)
        sound: Any = container.add_stream("aac", rate=44100)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(seconds * 10):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 4410), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 44100, number * 4410
            container.mux(sound.encode(silence))
            if number < 30:
                pixels = np.full((48, 64, 3), 8 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
        container.mux(sound.encode(None))
    return path


@pytest.mark.parametrize("suffix", ["flv", "mkv", "mp4"])
def test_a_film_may_end_before_its_sound(tmp_path: Path, suffix: str) -> None:
    """The header of an FLV gives one length, that of the longest track."""
    video = read_video(with_sound(tmp_path / f"a.{suffix}", 6), SAMPLING)
    assert (video.total_frames, video.lost_frames) == (30, 0)
    assert video.duration == pytest.approx(3.0, abs=0.02)


@pytest.mark.parametrize("count", [1, 2, 20])
def test_a_wmv_of_few_frames_is_whole(tmp_path: Path, count: int) -> None:
    path = write_video(tmp_path / "a.wmv", count, "wmv2")
    assert Ending.of_file(path).whole
    assert read_video(path, SAMPLING).total_frames == count


# ---- cut


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.avi", "a.mp4", "a.flv", "a.wmv"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_more_than_a_twentieth_missing_is_refused(tmp_path: Path, name: str, share: float) -> None:
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4", "a.wmv": "wmv2"}.get(name, "libx264")
    file = write_video(tmp_path / name, 90, codec).read_bytes()
    (tmp_path / name).write_bytes(file[: int(len(file) * share)])
    with pytest.raises(VideoError, match="is truncated"):
        read_video(tmp_path / name, SAMPLING)


@pytest.mark.parametrize(("name", "codec"), [("a.gif", "gif"), ("a.nut", "libx264")])
def test_a_film_without_the_mark_of_its_end_is_told(tmp_path: Path, name: str, codec: str) -> None:
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 32, 32, "rgb8" if codec == "gif" else "yuv420p"
        for number in range(20):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=stream.pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    whole = path.read_bytes()
    assert Ending.of_file(path).whole
    path.write_bytes(whole[: len(whole) * 8 // 10])
    with pytest.warns(MediaWarning, match="breaks off: the mark of its end missing"):
        read_video(path, SAMPLING)


def test_boxes_are_walked_in_bounded_time(tmp_path: Path) -> None:
    """Of 50,000 empty boxes, 20,000 are looked at."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\0\x08free" * 50_000)
    assert Ending.of_file(path) == Ending(measure="frames")
    with pytest.raises(VideoError, match=r"damaged or no video|has no"):
        read_video(path, SAMPLING)


# ---- damaged


@pytest.mark.parametrize(("name", "lost", "found"), [("bad_n.mp4", 10, 90), ("bad_n.mkv", 40, 60)])
def test_damage_in_the_middle_is_counted_by_one_rule(name: str, lost: int, found: int) -> None:
    """F14: ffmpeg shows as many; 100 were written."""
    with pytest.warns(MediaWarning, match=f"is damaged: {lost} of 100 frames are lost"):
        video = read_video(FILMS / name, SAMPLING)
    assert (video.lost_frames, video.total_frames) == (lost, found)
    assert video.facts.lost_frames == lost
    assert video.duration == pytest.approx(4.0)  # the frame before the hole stays


@pytest.mark.parametrize(("name", "lost"), [("bad_n.mp4", 0.10), ("bad_n.mkv", 0.40)])
def test_more_lost_than_allowed_is_refused(name: str, lost: float) -> None:
    assert quietly(FILMS / name, lost_share=lost).lost_frames
    with pytest.raises(VideoError, match=r"of 100 frames are lost \(\d+%\), the limit is .*raise --max-lost-share"):
        quietly(FILMS / name, lost_share=lost - 0.01)


@pytest.mark.parametrize("name", ["a.mkv", "a.flv", "a.nut", "a.mp4", "a.mov"])
def test_bad_bytes_in_any_container_are_counted_or_harmless(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, 90)
    file = bytearray(path.read_bytes())
    middle = len(file) * (1 if name == "a.mov" else 2) // 3  # not in the index, which stands behind in MOV
    file[middle : middle + 400] = np.random.default_rng(0).integers(0, 256, 400, np.uint8).tobytes()
    path.write_bytes(file)
    video = quietly(path, lost_share=1.0)
    assert abs(video.lost_frames + video.total_frames - 90) <= 3  # those beside the hole may be either
