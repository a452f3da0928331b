"""Still pictures are read as a browser shows them, odd files included; what cannot be known is refused."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from framefusion.errors import MediaWarning, VideoError
from framefusion.runtime.media.image.file import FORMATS, decode_image, read_image
from framefusion.runtime.media.media_file import MediaLimits
from tests.wheel import ROOT
from tools.attack.pictures import attack

MEDIA = ROOT / "tests" / "media"
LIMITS = MediaLimits()


def picture(height: int = 96, width: int = 64, seed: int = 0) -> NDArray[np.uint8]:
    """A gradient with some noise, which every format keeps about."""
    random = np.random.default_rng(seed)
    levels = np.linspace(0, 235, height)[:, None, None] + random.integers(0, 20, (height, width, 3))
    return levels.astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refused(file: bytes, message: str, limits: MediaLimits = LIMITS) -> None:
    with pytest.raises(VideoError, match=message):
        decode_image(file, "a.png", limits)


# ---- kinds of pixels


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_named_is_read(kind: str) -> None:
    if kind == "AVIF" and kind not in Image.registered_extensions().values():
        pytest.skip("this build of Pillow has no AVIF")
    options = {"lossless": True} if kind == "WEBP" else {}
    read = decode_image(saved(Image.fromarray(picture()), kind, **options), "a", LIMITS)
    if kind in ("JPEG", "AVIF", "GIF"):  # these lose something
        assert np.abs(read.astype(int) - picture()).mean() < 6
    else:
        np.testing.assert_array_equal(read, picture())


def test_16_bit_grey_is_scaled() -> None:
    np.testing.assert_array_equal(read_image(MEDIA / "g16.png"), read_image(MEDIA / "g8.png"))
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    want = np.rint(ramp / 65535 * 255).astype(np.uint8)
    for kind in ("PNG", "TIFF", "PPM"):
        read = decode_image(saved(Image.fromarray(ramp), kind), "a", LIMITS)
        for channel in range(3):
            np.testing.assert_array_equal(read[:, :, channel], want)


@pytest.mark.parametrize("white", [1, 15, 100, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", ["P5", "P6"])
def test_grey_and_colours_of_other_depths_are_scaled_to_their_white(kind: str, white: int) -> None:
    shape = (48, 64, 3) if kind == "P6" else (48, 64)
    levels = np.linspace(0, white, int(np.prod(shape))).reshape(shape).astype(">u2" if white > 255 else np.uint8)
    file = f"{kind} # of a camera\n64 48\n{white}\n".encode() + levels.tobytes()
    read = decode_image(file, "a", LIMITS).astype(float)
    wanted = levels.astype(float) / white * 255
    assert np.abs(read - (wanted if kind == "P6" else wanted[:, :, None])).max() <= 0.51
    if white != 65535:
        refused(file[: len(file) // 2], "is truncated: 5[0-9].[0-9]% of its pixels are missing")


def test_levels_above_their_white_are_damage() -> None:
    refused(b"P5 2 1 100\n\x05\xc8", "a level is 200, white is 100")


def test_a_large_picture_in_text_is_refused() -> None:
    refused(b"P2 3000 3000 255\n7 7 7", "in levels that are written as text, the limit of such is 4194304")
    assert decode_image(b"P2 2 1 15\n15 0\n", "a", LIMITS).tolist() == [[[255] * 3, [0] * 3]]
    assert decode_image(b"P1 2 1\n1 0\n", "a", LIMITS).tolist() == [[[0] * 3, [255] * 3]]


def test_floats_are_shares_of_white() -> None:
    ramp = np.linspace(0, 1, 64 * 48, dtype=np.float32).reshape(48, 64)
    read = decode_image(saved(Image.fromarray(ramp), "TIFF"), "a", LIMITS)
    np.testing.assert_array_equal(read[:, :, 1], np.rint(ramp * 255))
    refused(saved(Image.fromarray(ramp * 255), "TIFF"), r"floats from 0 to 255, they must lie in \[0, 1\]")
    refused(saved(Image.fromarray(ramp * np.nan), "TIFF"), "floats from nan")


def test_whole_numbers_without_a_known_white_are_refused() -> None:
    refused(saved(Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)), "TIFF"), "whose white is not known")


def test_colours_of_any_kind_become_rgb() -> None:
    source = Image.fromarray(picture())
    for mode, kind in (("1", "PNG"), ("L", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF")):
        file = saved(source.convert(mode), kind)
        try:
            with Image.open(io.BytesIO(file)) as image:
                want = np.asarray(image.convert("RGB"))
        except OSError:
            assert mode == "YCbCr"  # Pillow 11.0 does not read what it wrote
            continue
        np.testing.assert_array_equal(decode_image(file, "a", LIMITS), want)


def test_what_is_transparent_becomes_white() -> None:
    disc = read_image(MEDIA / "ablack.png")
    assert (disc[0, 0].tolist(), disc[56, 56].tolist()) == ([255] * 3, [0] * 3)
    clear = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    assert (decode_image(saved(clear, "PNG"), "a", LIMITS) == 255).all()
    assert (decode_image(saved(clear.convert("LA"), "PNG"), "a", LIMITS) == 255).all()
    paletted = Image.fromarray(np.tile(np.arange(4, dtype=np.uint8), (4, 1))).convert("P")
    read = decode_image(saved(paletted, "PNG", transparency=2), "a", LIMITS)
    assert read[0].tolist() == [[0] * 3, [1] * 3, [255] * 3, [3] * 3]
    grey = Image.fromarray(np.tile(np.arange(4, dtype=np.uint16) * 20000, (4, 1)))
    half = Image.new("RGBA", (8, 6), (0, 0, 0, 128))
    assert (decode_image(saved(half, "PNG"), "a", LIMITS) == 127).all()
    assert decode_image(saved(grey, "PNG"), "a", LIMITS)[0, 2, 0] == round(40000 / 65535 * 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_as_pillow_turns_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        file = saved(Image.fromarray(picture(300, 20)), kind, exif=exif)
        with Image.open(io.BytesIO(file)) as image:
            want = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        np.testing.assert_array_equal(decode_image(file, "a", LIMITS), want)


# ---- odd files


def test_odd_metadata_do_not_cost_the_picture() -> None:
    for name, size in (("bad_exif.png", (128, 72)), ("bigztxt.png", (72, 128))):
        read = read_image(MEDIA / name)
        assert read.shape == (*size, 3)
        assert read.std() > 1
    for odd in (b"garbage!", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b""):
        segment = b"Exif\0\0" + odd
        file = saved(Image.fromarray(picture()), "JPEG")
        file = file[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + file[2:]
        assert decode_image(file, "a", LIMITS).shape == (96, 64, 3)


@pytest.mark.parametrize(
    "segments",
    [
        b"\xff\xe0\0\x08JFIF\0\0",  # too short: Pillow ends in struct.error
        b"\xff\xee\0\x08Adobe\0",
        b"\xff\xe2\0\x12ICC_PROFILE\0\x05\x02xx",
        b"\xff\xe2\0\x0aMPF\0\xff\xff\xff\xff",
        b"\xff\xed\0\x14Photoshop 3.0\x008BIM",
        b"\xff\xff\xff\xfe\0\x02",
    ],
)
def test_broken_words_in_a_jpeg_are_passed_over(segments: bytes) -> None:
    for mode in ("RGB", "CMYK", "L"):
        file = saved(Image.fromarray(picture()).convert(mode), "JPEG")
        odd = decode_image(file[:2] + segments + file[2:], "a", LIMITS)
        np.testing.assert_array_equal(odd, decode_image(file, "a", LIMITS))


def test_a_png_says_behind_its_pixels_which_side_is_up() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    file = saved(Image.fromarray(picture()), "PNG", exif=exif)
    start = file.index(b"eXIf") - 4
    chunk = file[start : start + 12 + int.from_bytes(file[start : start + 4], "big")]
    moved = file.replace(chunk, b"")
    moved = moved[:-12] + chunk + moved[-12:]
    np.testing.assert_array_equal(decode_image(moved, "a", LIMITS), np.rot90(picture(), -1))


def test_a_chunk_of_words_with_a_wrong_checksum_is_passed_over_one_of_pixels_is_not() -> None:
    file = saved(Image.fromarray(picture()), "PNG")
    chunk = (5).to_bytes(4, "big") + b"tEXtabcde" + b"\0\0\0\0"
    np.testing.assert_array_equal(decode_image(file[:33] + chunk + file[33:], "a", LIMITS), picture())
    damaged = bytearray(file)
    damaged[len(file) // 2] ^= 1
    refused(bytes(damaged), "its chunk IDAT at byte .* does not match its checksum")


def test_a_jpeg_without_its_end_marker_is_whole() -> None:
    read = read_image(MEDIA / "noeoi.jpg")
    with Image.open(io.BytesIO((MEDIA / "noeoi.jpg").read_bytes() + b"\xff\xd9")) as image:
        np.testing.assert_array_equal(read, np.asarray(image))


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {})])
def test_a_small_part_of_the_end_may_be_missing_with_a_warning(kind: str, options: dict[str, Any]) -> None:
    file = saved(Image.fromarray(picture(320, 200)), kind, **options)
    whole = decode_image(file, "a", LIMITS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cut in (1, 2):
            np.testing.assert_array_equal(decode_image(file[:-cut], "a", LIMITS), whole)
    with pytest.warns(MediaWarning, match=r"lacks its last bytes: \d\.\d% of its pixels are blank"):
        read = decode_image(file[:-60], "a", LIMITS)
    assert 0 < (read != whole).any(-1).mean() < 0.05
    for share in (0.4, 0.7, 0.9):
        refused(file[: int(len(file) * share)], "is truncated|is damaged")


def test_the_share_that_is_missing_is_told() -> None:
    file = saved(Image.fromarray(picture(400, 200)), "JPEG")
    with pytest.raises(VideoError, match="of its pixels are missing") as raised:
        decode_image(file[: len(file) // 2], "a", LIMITS)
    assert 40 < float(str(raised.value).split("truncated: ")[1].split("%")[0]) < 60


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "WEBP", "GIF"])
def test_half_a_file_of_another_format_is_refused(kind: str) -> None:
    file = saved(Image.fromarray(picture()), kind)
    refused(file[: len(file) // 2], "cannot be read as an image")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_picture_is_shown_with_a_warning(kind: str) -> None:
    frames = [Image.fromarray(np.full((20, 20, 3), level, np.uint8)) for level in (10, 90, 200)]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=40, **options)
    with pytest.warns(MediaWarning, match="is an animation, of which the first picture is shown: give it as a video"):
        np.testing.assert_array_equal(decode_image(file, "a", LIMITS), np.asarray(frames[0]))


def test_damage_behind_the_first_picture_of_an_animation_costs_nothing() -> None:
    frames = [Image.fromarray(np.full((20, 20), level, np.uint8)) for level in (10, 90, 200)]
    file = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    second = file.index(b",", file.index(b",") + 10)
    for end in range(second, len(file), 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MediaWarning)
            assert (decode_image(file[:end], "a", LIMITS) == 10).all()


# ---- what is refused


def test_formats_that_are_not_named_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 moveto showpage\n%%EOF\n"
    refused(drawing, "it is PostScript")
    refused(b"8BPS\0\x01" + bytes(60), "it is a Photoshop file")
    refused(saved(Image.fromarray(picture(64, 64)), "ICNS"), "it is an icon")
    refused(saved(Image.fromarray(picture(64, 64)), "JPEG2000"), "a JPEG 2000 file|JPEG XL")
    refused(b"\0\0\0\x18ftypheic" + bytes(60), "it is a HEIC picture")
    refused(b"no picture", "cannot be read as an image .it is of no known kind")


def test_names_that_are_no_file_are_refused_in_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    names: dict[str | Path, str] = {
        "http://example.org/a.png": "http://example.org/a.png is an address, only files",
        Path("https://example.org/a.png"): "https://example.org/a.png is an address",
        "data:image/png;base64,AAAA": "is a data: URI",
        "data:image/png;base64," + "A" * 100_000: r"is a data: URI|100022 characters",
        "file:///tmp/no.png": "is a file: URL, paths are read: give /tmp/no.png",
        "file:no.png": "is a file: URL, paths are read: give no.png",
        tmp_path / "pipe.png": "is a pipe",
        "/dev/zero": "is a device",
        tmp_path: "is a folder",
        "no:thing.png": "no:thing.png cannot be opened .No such file",
        "a\0b": "cannot be opened",
    }
    for name, chunk in names.items():
        with pytest.raises(VideoError, match=chunk) as raised:
            read_image(name)
        assert len(str(raised.value)) < 400
        assert "\n" not in str(raised.value)


def test_a_name_with_colons_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("12:30:05.png", "file:x.png", "http:x.png", "concat:x.png"):
        Image.fromarray(picture()).save(tmp_path / name, "PNG")
        np.testing.assert_array_equal(read_image(name), picture())


def test_a_picture_above_the_limit_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    chunk = "is 64x96, 6144 pixels, the limit is 6143: .* raise --max-image-pixels"
    refused(saved_without_loading(), chunk, MediaLimits(image_pixels=6143))
    bomb = bytearray((MEDIA / "g8.png").read_bytes())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    refused(bytes(bomb), "60000x60000|exceeds limit")


def saved_without_loading() -> bytes:
    raw = b"".join(b"\0" + row.tobytes() for row in picture())

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    header = (64).to_bytes(4, "big") + (96).to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    file = saved(Image.fromarray(picture()), "JPEG", progressive=True)
    last = file.rindex(b"\xff\xda")
    refused(file[:-2] + file[last:-2] * 200 + b"\xff\xd9", "has more than 100 scans")


def test_a_bomb_in_the_words_of_a_png_costs_nothing() -> None:
    compressed = zlib.compress(bytes(50_000_000), 9)
    content = b"Comment\0\0" + compressed
    chunk = len(content).to_bytes(4, "big") + b"zTXt" + content + zlib.crc32(b"zTXt" + content).to_bytes(4, "big")
    file = saved(Image.fromarray(picture()), "PNG")
    np.testing.assert_array_equal(decode_image(file[:33] + chunk + file[33:], "a", LIMITS), picture())


@pytest.mark.slow
def test_a_photo_of_48_megapixels_is_in_memory_once_decoded_and_once_as_rgb() -> None:
    code = (
        "import resource, sys; from framefusion.runtime.media.image.file import read_image;"
        "from framefusion.runtime.media.preprocess import resize;"
        "import PIL.Image; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        f"pixels = read_image({str(MEDIA / 'p48mp.png')!r}); small = resize(pixels, 756, 1008, 3);"
        "print(pixels.shape, small.shape, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "(6048, 8064, 3) (756, 1008, 3)" in shown
    assert int(shown.split()[-1]) < 300  # MB: 48.8 as stored in this file, 146 as RGB, 55 with its rows resized


def test_mutated_pictures_end_in_pixels_or_in_an_error() -> None:
    facts = attack(trials=400, seed=1)
    assert facts["failed"] == []
    assert min(facts["read"], facts["refused"]) > 20
