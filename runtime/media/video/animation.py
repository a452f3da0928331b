"""Animated pictures that FFmpeg does not play, frame by frame with Pillow; and which files hold a still picture.

GIF, APNG and AVIF are films for FFmpeg (container/); WebP is one for Pillow alone.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import VideoError
from framefusion.runtime.media.media_file import MediaLimits

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

SHORTEST = 10
USUAL = 100
"""Milliseconds: a frame that claims to stay no longer than SHORTEST stays for USUAL, as in browsers."""
WEBP_ANIMATED = 2  # a flag of its VP8X chunk
SNIFFED = 64  # bytes

SIGNATURES = {b"\xff\xd8\xff": "jpeg", b"BM": "bmp", b"II*\0": "tiff", b"MM\0*": "tiff", b"8BPS": "psd"}
_PNM = (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF")  # and white space


def is_animated_webp(source: Path) -> bool:
    """Whether a file is a WebP picture whose header says that it moves."""
    start = _start(source)
    return start[:4] == b"RIFF" and start[8:16] == b"WEBPVP8X" and bool(start[20] & WEBP_ANIMATED)


def still_format(source: Path) -> str:
    """The name of the format of a still picture; empty for other files, and for pictures that move."""
    start = _start(source)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "" if is_animated_webp(source) else "webp"
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "" if _is_animated_png(source) else "png"
    if start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"heic", b"heix", b"mif1"):
        size = struct.unpack(">I", start[:4])[0]
        brands = start[16 : min(size, SNIFFED)]
        return "" if b"avis" in brands or b"msf1" in brands else start[8:12].decode()
    if start.startswith(_PNM) and start[2:3].isspace():
        return "pnm"
    return next((name for mark, name in SIGNATURES.items() if start.startswith(mark)), "")


def _start(source: Path) -> bytes:
    with source.open("rb") as file:
        return file.read(SNIFFED).ljust(SNIFFED, b"\0")


def _is_animated_png(source: Path) -> bool:
    """Whether its acTL chunk stands where it must: before the first pixels."""
    with source.open("rb") as file:
        at = 8
        for _ in range(100):
            file.seek(at)
            length, name = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
            if name in (b"acTL", b"IDAT"):
                return bool(name == b"acTL")
            at += 12 + length
    return False


class AnimatedPicture:
    """A WebP film: its frames are decoded in order, each once a pass, and one is held.

    Attributes:
        height, width: in pixels.
        tick: seconds of one unit of time.

    Raises:
        VideoError: it is damaged or larger than the limits.
    """

    tick = 1e-3

    def __init__(self, source: Path, limits: MediaLimits) -> None:
        self.source = source
        with self._opened() as image:
            self.width, self.height = image.size
            self.count = int(getattr(image, "n_frames", 1))
        pixels = self.width * self.height
        if pixels > limits.frame_pixels:
            raise VideoError(
                f"{source} is {self.width}x{self.height}, {pixels} pixels a frame, the limit is {limits.frame_pixels}: "
                "scale it down first, or raise --max-frame-pixels"
            )
        if self.count > limits.film_frames:
            raise VideoError(
                f"{source} has {self.count} frames, the limit is {limits.film_frames}: cut it, or raise "
                "--max-film-frames"
            )

    def frames(self) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
        """When each frame begins and how long it stays, in ticks, and its pixels [H, W, 4] RGBA.

        Raises:
            VideoError: a frame cannot be decoded.
        """
        begin = 0
        with self._opened() as image:
            for number in range(self.count):
                try:
                    image.seek(number)
                    image.load()
                    stays = int(image.info.get("duration", 0))
                    pixels = np.asarray(image.convert("RGBA"))
                except (OSError, ValueError, EOFError, MemoryError) as error:
                    raise VideoError(f"{self.source} is damaged at frame {number} ({error}): copy it again") from error
                stays = stays if stays > SHORTEST else USUAL
                yield begin, stays, pixels
                begin += stays

    def _opened(self) -> PilImage:
        from PIL import Image

        try:
            with warnings.catch_warnings():  # the limit is ours
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                return Image.open(self.source, formats=["WEBP"])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise VideoError(f"{self.source} is damaged or no video ({error}): copy or download it again") from error
