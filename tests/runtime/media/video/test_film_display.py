"""A film is seen as a player shows it: turned, mirrored, with square pixels, on white, the default track."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.video.frames import read_video
from tests.tiers import in_tiers
from tests.wheel import ROOT

MEDIA = ROOT / "tests" / "media"
FILMS = MEDIA / "films"
SAMPLING = FrameSampling("qwen2_vl", fps=1e6, max_frames=200, min_frames=1, frame_factor=1)
Matrix = tuple[int, int, int, int]


def shown(path: Path) -> NDArray[np.uint8]:
    return read_video(path, SAMPLING).frames


def with_matrix(target: Path, matrix: Matrix) -> Path:
    """x.mp4, its display matrix replaced: (x, y) is shown at (a x + c y, b x + d y)."""
    file = bytearray((FILMS / "x.mp4").read_bytes())
    at = file.index(b"tkhd") + 4 + 4 + 20 + 16  # behind version, times, layer and volume
    unit = 1 << 16
    assert struct.unpack_from(">9i", file, at) == (unit, 0, 0, 0, unit, 0, 0, 0, 1 << 30)
    a, b, c, d = (unit * number for number in matrix)
    struct.pack_into(">9i", file, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(file)
    return target


WAYS = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("matrix", in_tiers(WAYS, fast=3))
def test_all_eight_ways_to_lay_a_film(tmp_path: Path, matrix: Matrix) -> None:
    """By the definition of the matrix, pixel for pixel; ffmpeg -autorotate gave the same bytes for all eight."""
    plain, laid = shown(FILMS / "x.mp4")[7], shown(with_matrix(tmp_path / "m.mp4", matrix))[7]
    height, width, _ = plain.shape
    y, x = np.mgrid[:height, :width]
    a, b, c, d = matrix
    across, down = a * x + c * y, b * x + d * y
    expected = np.empty((width, height, 3) if b else plain.shape, np.uint8)
    expected[down - down.min(), across - across.min()] = plain
    np.testing.assert_array_equal(laid, expected)


def test_a_mirrored_film_is_not_upside_down() -> None:
    """F4: what moves down moves down."""
    red = [frame[:, :, 0].astype(int) - frame[:, :, 1] for frame in shown(FILMS / "mirror_down.mp4")]
    rows = [np.argwhere(frame > 100)[:, 0].mean() for frame in red if (frame > 100).any()]
    assert rows[-1] > rows[0] + 10


def test_pixels_that_are_not_square_are_stretched() -> None:
    """F9: 64x72 with pixels twice as wide as high; the square of 50x50 is square."""
    frames = shown(FILMS / "sar.mp4")
    assert frames.shape[1:] == (72, 128, 3)
    bright = frames[0].max(axis=2).astype(int)
    bright = np.abs(bright - np.median(bright)) > 60
    tall, wide = bright.any(axis=1).sum(), bright.any(axis=0).sum()
    assert abs(int(tall) - 50) <= 3
    assert abs(int(wide) - 50) <= 4  # chroma is stretched, too


@pytest.mark.parametrize("name", ["alpha_black.webm", "anim.apng"])
def test_what_is_transparent_is_white_as_in_pictures(name: str) -> None:
    frame = shown(FILMS / name)[0]
    corners = frame[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all()
    assert frame[56, 56].max() < 250 or name == "anim.apng"
    if name == "alpha_black.webm":
        assert frame[56, 56].max() < 10  # the disc


def test_a_transparent_film_equals_its_pictures(tmp_path: Path) -> None:
    """Half transparent colours over white, against Pillow's compositing, in a codec without loss."""
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (3, 16, 24, 4), np.uint8)
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream: Any = container.add_stream("png", rate=Fraction(5))
        stream.width, stream.height, stream.pix_fmt = 24, 16, "rgba"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        container.mux(stream.encode(None))
    white = Image.new("RGBA", (24, 16), "white")
    expected = [np.asarray(Image.alpha_composite(white, Image.fromarray(frame)).convert("RGB")) for frame in frames]
    np.testing.assert_array_equal(shown(tmp_path / "a.mov"), expected)


@pytest.mark.parametrize("matrix", [1, 5])
@pytest.mark.parametrize("full", [False, True])
def test_colours_are_those_of_the_matrix_and_range_that_the_film_names(tmp_path: Path, matrix: int, full: bool) -> None:
    """BT.709 and BT.601, by their equations; rounding costs two levels."""
    luma, blue, red = 120, 90, 150
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv444p"
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = 2 if full else 1
        planes = np.array([luma, blue, red], np.uint8)[:, None, None] * np.ones((1, 16, 16), np.uint8)
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
            frame.colorspace, frame.color_range = matrix, 2 if full else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    of_red, of_blue = {1: (0.2126, 0.0722), 5: (0.299, 0.114)}[matrix]
    y, u, v = (luma, blue - 128, red - 128) if full else ((luma - 16) * 255 / 219, *(np.array([-38, 22]) * 255 / 224))
    r, b = y + 2 * (1 - of_red) * v, y + 2 * (1 - of_blue) * u
    want = np.array([r, (y - of_red * r - of_blue * b) / (1 - of_red - of_blue), b])
    assert np.abs(read_video(path, SAMPLING).frames[0, 8, 8] - want).max() <= 2


def test_the_default_track_is_shown_not_the_first() -> None:
    """F8: a red second before a film of 100 frames."""
    video = read_video(FILMS / "two_tracks.mkv", SAMPLING)
    assert video.total_frames == 100
    red = video.frames[0].astype(int).mean(axis=(0, 1))
    assert not (red[0] > 200 and red[1] < 60)


@pytest.mark.parametrize("kind", ["webp", "gif", "png", "avif"])
def test_animated_pictures_are_films(tmp_path: Path, kind: str) -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 250)]
    first, *rest = [Image.new("RGB", (32, 32), colour) for colour in colours]
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    try:
        first.save(tmp_path / f"a.{kind}", save_all=True, append_images=rest, duration=[100, 200, 300, 400], **options)
    except (KeyError, OSError, ValueError) as error:  # of Pillow 11, which knows no AVIF
        pytest.skip(f"this build of Pillow does not write {kind}: {error}")
    video = read_video(tmp_path / f"a.{kind}", SAMPLING)
    assert video.total_frames == 4
    assert np.unique(video.times.round(3)).tolist() == [0.0, 0.1, 0.3, 0.6]
    assert video.duration == pytest.approx(1.0)
    for index, colour in enumerate(colours):
        pixel = video.frames[video.indices.tolist().index(index), 16, 16]
        assert np.abs(pixel.astype(int) - colour).max() <= (0 if kind in ("webp", "png") else 8)


@pytest.mark.parametrize(
    "name", in_tiers(["http:x.mp4", "concat:a|b.mp4", "a:b.mp4", "file:x.mp4", "%d.mp4", "-i.mp4"], fast=2)
)
def test_names_that_look_like_addresses_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """F7: the file of that name is read, not another one."""
    (tmp_path / name).write_bytes((FILMS / "x.mp4").read_bytes())
    (tmp_path / "x.mp4").write_bytes((FILMS / "n.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert read_video(name, SAMPLING).total_frames == 20
    assert read_video(tmp_path / name, SAMPLING).total_frames == 20
