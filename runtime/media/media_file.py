"""Files of the user that are shown to a model: which names are read, and how much of one file.

Knows no format. A name that is no regular file is refused here in one line, before a decoder sees it: decoders take
some names for addresses.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from framefusion.errors import VideoError

MAX_IMAGE_PIXELS = 1 << 27
"""Of a still picture: 134 megapixels, 402 MB as RGB."""

MAX_FRAME_PIXELS = 8192 * 4320
MAX_FILM_FRAMES = 1_000_000
"""Nine hours at 30 frames a second."""
MAX_FILM_BYTES = 8 << 30
MAX_LOST_SHARE = 0.5

SECONDS_A_FILM = 300.0
BYTES_A_SECOND = 100_000
DECODED_BYTES = 12 << 30
DECODED_A_BYTE = 4096
"""What a file may cost grows with it: a few kilobytes can claim hours of large frames, which are all alike."""

SHOWN_OF_A_NAME = 120
"""Characters of a name in a message: a data: URI may have millions."""

FILM_SUFFIXES = frozenset(
    [
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".mpg",
        ".mpeg",
        ".ts",
        ".m2ts",
        ".wmv",
        ".flv",
        ".ogv",
        ".3gp",
        ".gif",
    ]
)
PICTURE_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic"])
"""Of the files of a folder that are shown, in lower case; what a file is, its content says."""

# A scheme of one letter is a Windows drive. pathlib joins the two slashes of an address to one.
URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<rest>.*)", re.DOTALL)
ADDRESSES = frozenset({"http", "https", "ftp", "rtsp", "rtmp", "s3", "gs", "hf", "tcp", "udp", "pipe", "concat"})


@dataclass(frozen=True)
class MediaLimits:
    """How large a file's content may be; what is larger is refused before it is decoded.

    Attributes:
        image_pixels: of one still picture, width times height.
        frame_pixels: of one frame of a film, as a player shows it.
        film_frames: of a whole film, sampled or not.
        film_bytes: of the sampled frames of a film, as they are kept.
        decoded_bytes: of all frames that are decoded from a film, kept or not; None allows 12 GiB, and 4096 bytes for
            each byte of the file.
        film_seconds: spent reading one film; None allows five minutes, and a second for each 100 kB of the file.
        lost_share: of the frames of a damaged film that may be lost, from 0 to 1.
    """

    image_pixels: int = MAX_IMAGE_PIXELS
    frame_pixels: int = MAX_FRAME_PIXELS
    film_frames: int = MAX_FILM_FRAMES
    film_bytes: int = MAX_FILM_BYTES
    decoded_bytes: int | None = None
    film_seconds: float | None = None
    lost_share: float = MAX_LOST_SHARE

    def __post_init__(self) -> None:
        if self.image_pixels < 1:
            raise VideoError(f"a limit of {self.image_pixels} pixels admits no picture: give 1 or more")
        for name in ("frame_pixels", "film_frames", "film_bytes", "decoded_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise VideoError(f"a limit of {value} for {name} admits no film: give 1 or more")
        if self.film_seconds is not None and not self.film_seconds > 0:
            raise VideoError(f"a limit of {self.film_seconds} seconds admits no film: give more than 0")
        if not 0 <= self.lost_share <= 1:
            raise VideoError(f"a share of {self.lost_share} lost frames is impossible: give one from 0 to 1")

    def reading_seconds(self, file_size: int) -> float:
        """Seconds that reading a film of so many bytes may take."""
        return SECONDS_A_FILM + file_size / BYTES_A_SECOND if self.film_seconds is None else self.film_seconds

    def decoding_bytes(self, file_size: int) -> int:
        """Bytes of the frames that may be decoded from a film of so many bytes."""
        return DECODED_BYTES + DECODED_A_BYTE * file_size if self.decoded_bytes is None else self.decoded_bytes

    def check_image(self, name: str, height: int, width: int) -> None:
        """Refuse a picture that is too large to be decoded, or has no pixel.

        Raises:
            VideoError: it is; the message calls it `name`.
        """
        if not height * width:
            raise VideoError(f"{name} is {width}x{height}, it has no pixel: give a picture of 1x1 or more")
        if height * width > self.image_pixels:
            raise VideoError(
                f"{name} is {width}x{height}, {height * width} pixels, the limit is {self.image_pixels}: scale it down "
                "first, or raise --max-image-pixels (MediaLimits.image_pixels)"
            )


def existing_file(path: str | Path) -> Path:
    """The path, once it is sure that a regular file with content is there.

    A file whose name looks like an address, `a:b.png`, is read where it exists.

    Raises:
        VideoError: nothing is there, or an address, a folder, a pipe, a device or an empty file.
    """
    source = Path(path)
    try:
        status = source.stat()
    except (OSError, ValueError) as error:
        raise VideoError(_why_missing(str(path), error)) from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(f"{source} is a folder: give the path of one file")
    if not stat.S_ISREG(status.st_mode):
        kind = "a pipe" if stat.S_ISFIFO(status.st_mode) else "a device or a socket"
        raise VideoError(f"{source} is {kind}, which cannot be read twice: save its content to a file, and give that")
    if status.st_size == 0:
        raise VideoError(f"{source} is empty (0 bytes): copy or download it again")
    return source


def _why_missing(name: str, error: OSError | ValueError) -> str:
    """A sentence for a name that no file has."""
    shown = name if len(name) <= SHOWN_OF_A_NAME else f"{name[:SHOWN_OF_A_NAME]}... ({len(name)} characters)"
    address = URL.fullmatch(name)
    scheme = address["scheme"].lower() if address else ""
    if scheme == "data":
        return f"{shown} is a data: URI, files are read: decode it, and give a path or an array of pixels"
    if scheme == "file" and address:
        path = re.sub(r"^/+(localhost/)?", "/", address["rest"])
        return f"{shown} is a file: URL, paths are read: give {path[:SHOWN_OF_A_NAME]}"
    if scheme in ADDRESSES:
        shown = re.sub(r":/+", "://", shown, count=1)
        return f"{shown} is an address, only files of this machine are read: download it, and give the path"
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
    return f"{shown} cannot be opened ({reason}): check the path"
