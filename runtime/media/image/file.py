"""A still picture from a file, as a browser shows it: RGB, upright, on white.

Only the formats that `FORMATS` names are tried: Pillow knows others that start programs or that nobody keeps. What is
read is the picture itself: odd metadata (EXIF, text, colour profiles) is passed over. One rule for the end of a
file: a PNG or JPEG may lack up to 5 % of its pixels, which are then blank as in a browser, with a warning; more is
refused with the share that is missing. The other formats are read whole or not at all.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import MediaWarning, VideoError
from framefusion.runtime.media.image.formats import (
    END_OF_IMAGE,
    JPEG_SIGNATURE,
    MAX_SCANS,
    PNG_SIGNATURE,
    JpegScans,
    check_missing,
    jpeg_pixels,
    png_chunks,
    png_pixels,
    pnm_levels,
)
from framefusion.runtime.media.image.pixels import rgb_pixels
from framefusion.runtime.media.media_file import MediaLimits, existing_file

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Pillow's names. PPM are PBM, PGM, PPM and PFM; a build of Pillow without AVIF passes over it."""

BYTES_A_PIXEL = 4
"""Most that a file may take for each pixel that the limit allows."""

MOVING = frozenset({"GIF", "WEBP", "AVIF"})
"""Formats whose further pictures are an animation; those of a TIFF are pages, those of a phone's JPEG its depth."""
OPENING = "{name} is an animation, of which the first picture is shown: give it as a video to show all"

NOISE = 64
BLOCK = 8
"""Bytes that decode to some blocks of pixels; the side of a block."""

OTHERS = {
    b"%!PS": "PostScript",
    b"%PDF": "a PDF",
    b"8BPS": "a Photoshop file",
    b"icns": "an icon",
    b"\0\0\1\0": "an icon",
    b"<svg": "an SVG drawing",
    b"<?xm": "an XML file",
    b"qoif": "a QOI file",
    b"\xff\x4f\xff\x51": "a JPEG 2000 file",
    b"\0\0\0\x0c": "a JPEG 2000 or JPEG XL file",
}

FILM = "it is a film, which --video shows, or a picture that this build of Pillow does not read"
UNKNOWN = "it is of no known kind"

# What Pillow raises on files that are damaged; a decoder's own mistakes are among them.
DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError, OverflowError, EOFError,
    struct.error, ZeroDivisionError, NotImplementedError, RuntimeError, MemoryError,
)  # fmt: skip


def read_image(path: str | Path, limits: MediaLimits | None = None) -> NDArray[np.uint8]:
    """Read a still picture as RGB [H, W, 3], upright; what is transparent becomes white.

    An animation shows the picture that it opens with.

    Raises:
        VideoError: the file is missing, of another format, larger than `limits`, damaged or truncated.
    """
    limits = limits or MediaLimits()
    source = existing_file(path)
    # The bytes; `decode_image` takes the metadata out of a PNG or JPEG.
    check_file_size(str(source), source.stat().st_size, limits)
    try:
        file = source.read_bytes()
    except OSError as error:
        raise VideoError(f"{source} cannot be opened ({error.strerror}): check the path") from error
    return decode_image(file, str(source), limits)


def check_file_size(name: str, size: int, limits: MediaLimits) -> None:
    """Refuse a file that is too large to hold a picture within the limits.

    Raises:
        VideoError: it is; the message calls it `name`.
    """
    most = BYTES_A_PIXEL * limits.image_pixels + (1 << 24)
    if size > most:
        raise VideoError(f"{name} has {size} bytes, a picture within the limits has {most} at most: scale it down")


def decode_image(file: bytes, name: str, limits: MediaLimits) -> NDArray[np.uint8]:
    """The picture in the bytes of a file, RGB [H, W, 3], upright, on white; `name` is for messages.

    Raises:
        VideoError: it is of another format, larger than `limits`, damaged or truncated.
    """
    # 1. The pixels alone: broken metadata must not cost the picture.
    scans = None
    if file.startswith(PNG_SIGNATURE):
        if any(chunk.name == b"acTL" for chunk in png_chunks(memoryview(file))):
            warnings.warn(OPENING.format(name=name), MediaWarning, stacklevel=2)
        file = png_pixels(memoryview(file), name)
    file = pnm_levels(file, name)
    if file.startswith(JPEG_SIGNATURE):
        file = jpeg_pixels(file)
        scans = JpegScans.from_bytes(file)
        if scans.scans > MAX_SCANS:
            raise VideoError(f"{name} has more than {MAX_SCANS} scans, the limit: save it again as PNG")
    # 2. All rows, or those of a JPEG that the file holds.
    if scans is None or scans.closed:
        return _decoded(file, name, limits)
    return _without_end(file, name, scans, limits)


def open_picture(file: bytes, name: str, limits: MediaLimits) -> PilImage:
    """The picture as Pillow opens it, undecoded, within the limits.

    Raises:
        VideoError: it is of another format, damaged at its start, or larger than the limits.
    """
    from PIL import Image, UnidentifiedImageError

    Image.init()
    known = [kind for kind in FORMATS if kind in Image.OPEN]
    try:
        with warnings.catch_warnings():  # the limit is ours
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(file), formats=known)
    except Image.DecompressionBombError as error:
        raise VideoError(f"{name} cannot be read as an image ({error}): scale it down first") from error
    except UnidentifiedImageError as error:
        raise VideoError(
            f"{name} cannot be read as an image ({kind_of(file)}): give a PNG, JPEG or WebP file"
        ) from error
    except DECODER_ERRORS as error:
        raise VideoError(_unreadable(name, error)) from error
    limits.check_image(name, image.height, image.width)
    return image


def _decoded(file: bytes, name: str, limits: MediaLimits) -> NDArray[np.uint8]:
    with open_picture(file, name, limits) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image.load()
        except DECODER_ERRORS as error:
            raise VideoError(_unreadable(name, error)) from error
        pixels = rgb_pixels(image, name)
        if _is_animated(image):
            warnings.warn(OPENING.format(name=name), MediaWarning, stacklevel=2)
        return pixels


def _is_animated(image: PilImage) -> bool:
    """Whether more pictures follow; where the next one is damaged, the first is all there is."""
    try:
        return image.format in MOVING and bool(getattr(image, "is_animated", False))
    except DECODER_ERRORS:
        return False


def _without_end(file: bytes, name: str, scans: JpegScans, limits: MediaLimits) -> NDArray[np.uint8]:
    """A JPEG whose end-of-image marker is missing.

    A decoder fills what it misses with grey and does not say where it began. So the file is decoded twice, once with
    noise behind its last byte: from the first pixel that differs on, all are missing.
    """
    if not scans.all_coefficients:
        raise VideoError(f"{name} is truncated: it ends before the last of its scans; copy or download it again")
    file = file.rstrip(b"\xff")  # the half of a marker
    noise = np.random.default_rng(0).integers(0, 255, NOISE, np.uint8).tobytes()  # 255 would start a marker
    shown = _decoded(file + END_OF_IMAGE, name, limits)
    other = _decoded(file + noise + END_OF_IMAGE, name, limits)
    height, width, _ = shown.shape
    row = next((row for row in range(height) if (shown[row] != other[row]).any()), height)
    columns = np.flatnonzero((shown[row : row + BLOCK] != other[row : row + BLOCK]).any((0, 2)))
    present = height * width
    if columns.size:
        present = row * width + int(columns[0]) * min(BLOCK, height - row)
    check_missing(name, 1 - present / (height * width))
    return shown


def kind_of(file: bytes) -> str:
    """A clause that says what a file of no known format is, as far as its first bytes show."""
    if file[4:8] == b"ftyp" and file[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "it is a HEIC picture"
    if file[4:8] == b"ftyp":
        return FILM
    return next((f"it is {kind}" for start, kind in OTHERS.items() if file.startswith(start)), UNKNOWN)


def _unreadable(name: str, error: Exception) -> str:
    """The message for an error of a decoder, which may be the decoder's own mistake."""
    reason = str(error) or type(error).__name__
    return f"{name} cannot be read as an image ({reason}): save it again as PNG, or copy or download it again"
