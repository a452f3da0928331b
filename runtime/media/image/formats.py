"""PNG, JPEG and PNM as far as it takes to keep the pixels where the rest of a file is odd, soon.

Chunks, markers, missing ends, and levels that Pillow would read one by one in Python.

Bytes in, bytes out; decodes no pixel and opens no file.
"""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import MediaWarning, VideoError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
END_OF_IMAGE = b"\xff\xd9"

PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
"""What the pixels of a PNG come from; eXIf says which side is up, the rest is metadata."""

MISSING_SHARE = 0.05
"""Of the pixels of a picture that may be missing, as of the frames of a film."""

ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Of an interlaced PNG's passes: first column and row, and the steps to the next ones."""

PLAIN_PIXELS = 1 << 22
"""Of a PNM in text."""

MAX_SCANS = 100
"""Of a JPEG: encoders write about ten. A scan takes a few bytes and a pass over all pixels."""

# Between scans: a marker that is no stuffed zero, no restart and no fill byte.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
# Magic number, width, height and white of a PNM; comments run to the end of their line.
_SPACE = rb"(?:\s|#[^\n]*\n)+"
_PNM = re.compile(rb"(P[1-6])%s(\d{1,9})%s(\d{1,9})(?:%s(\d{1,6}))?\s" % (_SPACE, _SPACE, _SPACE))
_WITHOUT_LENGTH = frozenset({0x01, 0xD8, 0xD9, *range(0xD0, 0xD8)})
_START_OF_SCAN = 0xDA
_END = 0xD9
_METADATA = frozenset({*range(0xE0, 0xF0), 0xFE})  # markers of application segments and comments
# How the metadata begins that says how the pixels are meant (the colours, and which side is up), and its least length.
_MEANING = {0xE0: (b"JFIF\0", 14), 0xE1: (b"Exif\0\0", 14), 0xEE: (b"Adobe", 12)}
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})


class Chunk(NamedTuple):
    """One chunk of a PNG."""

    name: bytes
    start: int  # of its content
    end: int
    whole: bool  # its content and checksum lie within the file


def png_chunks(file: memoryview) -> Iterator[Chunk]:
    """The chunks of a PNG, up to the end of the file or IEND."""
    at = len(PNG_SIGNATURE)
    while at + 8 <= len(file):
        length, name = struct.unpack_from(">I4s", file, at)
        start = at + 8
        end = at + 8 + length
        yield Chunk(bytes(name), start, min(end, len(file)), end + 4 <= len(file))
        if name == b"IEND":
            return
        at = end + 4


def png_pixels(file: memoryview, name: str) -> bytes:
    """The PNG of these pixels alone, closed where its end is missing, so that odd metadata cannot cost the picture.

    Of an animation it is the still picture that readers without animations show.

    Raises:
        VideoError: a chunk of pixels does not match its checksum, or too many pixels are missing; `name` is the file's.
    """
    parts = [PNG_SIGNATURE]
    pixels = list[memoryview]()
    closed = True
    header = b""
    for chunk in png_chunks(file):
        content = file[chunk.start : chunk.end]
        if chunk.name == b"eXIf" and chunk.whole and bytes(content[:2]) in (b"II", b"MM"):
            parts.append(_chunk(chunk.name, content))  # it may stand behind the pixels
        if chunk.name not in PIXEL_CHUNKS or chunk.name == b"IEND":
            continue
        if chunk.whole and zlib.crc32(content, zlib.crc32(chunk.name)) != _number(file, chunk.end):
            raise VideoError(
                f"{name} is damaged: its chunk {chunk.name.decode()} at byte {chunk.start} does not match its "
                "checksum; copy or download it again"
            )
        header = bytes(content) if chunk.name == b"IHDR" and not header else header
        closed = closed and chunk.whole
        if chunk.name == b"IDAT":
            pixels.append(content)
        elif chunk.whole and not pixels:
            parts.append(_chunk(chunk.name, content))
    if closed and pixels:
        parts += [_chunk(b"IDAT", content) for content in pixels]
    else:
        parts.append(_chunk(b"IDAT", _completed(header, pixels, name)))
    return b"".join([*parts, _chunk(b"IEND", b"")])


def _completed(header: bytes, pixels: Sequence[memoryview], name: str) -> bytes:
    """Compressed rows of a PNG whose end is missing, with blank rows where few enough are."""
    total = scanline_bytes(header)
    inflater = zlib.decompressobj()
    rows = bytearray()
    try:
        for piece in pixels:
            rows += inflater.decompress(piece, total - len(rows) + 1)  # 1: no limit is what 0 means
    except zlib.error as error:
        raise VideoError(f"{name} is damaged ({error}): copy or download it again") from error
    missing = max(1 - len(rows) / total, 0.0) if total else 1.0
    check_missing(name, missing, most=0.0 if header[-1:] == b"\x01" else MISSING_SHARE)  # blanks would be everywhere
    return zlib.compress(bytes(rows[:total]).ljust(total, b"\0"), 1)


def scanline_bytes(header: bytes) -> int:
    """Bytes of a PNG's uncompressed rows, each behind its filter; 0 for a header that is none."""
    if len(header) != 13:
        return 0
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    total = 0
    for left, top, across, down in passes:
        columns = -((left - width) // across)  # rounded up
        rows = -((top - height) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def check_missing(name: str, missing: float, most: float = MISSING_SHARE) -> None:
    """One rule for the end of a picture: a small share may be missing and is warned of, more is refused.

    Raises:
        VideoError: a share of more than `most` of the pixels is missing.
    """
    if missing > most:
        raise VideoError(f"{name} is truncated: {missing:.1%} of its pixels are missing; copy or download it again")
    if missing:
        warnings.warn(f"{name} lacks its last bytes: {missing:.1%} of its pixels are blank", MediaWarning, stacklevel=2)


def pnm_levels(file: bytes, name: str) -> bytes:
    """A binary PGM or PPM whose white is neither 255 nor 65535, with levels of 0..255; other files as they are.

    Pillow scales such levels one by one, 2 seconds a megapixel.

    Raises:
        VideoError: levels are missing, or they are written as text and too many for that.
    """
    header = _PNM.match(file)
    if header is None:
        return file
    kind = header[1]
    width = int(header[2])
    height = int(header[3])
    white = int(header[4] or 255)
    if kind in (b"P1", b"P2", b"P3") and width * height > PLAIN_PIXELS:
        raise VideoError(
            f"{name} is {width}x{height} in levels that are written as text, the limit of such is {PLAIN_PIXELS} "
            "pixels: save it as PNG"
        )
    direct = {b"P5": (255, 65535), b"P6": (255,)}.get(kind)
    if direct is None or white in direct or not 0 < white < 65536:
        return file
    count = width * height * (3 if kind == b"P6" else 1)
    if white > 255:
        content = file[header.end() : header.end() + 2 * count]
        levels = np.frombuffer(content[: len(content) // 2 * 2], ">u2")
    else:
        levels = np.frombuffer(file[header.end() : header.end() + count], np.uint8)
    if levels.size < count:
        share = 1 - levels.size / count
        raise VideoError(f"{name} is truncated: {share:.1%} of its pixels are missing; copy or download it again")
    if levels.max(initial=0) > white:
        raise VideoError(f"{name} is damaged: a level is {levels.max()}, white is {white}; copy or download it again")
    table: NDArray[np.uint8] = np.rint(np.arange(white + 1) / white * 255).astype(np.uint8)
    scaled: bytes = table[levels].tobytes()
    return b"%s %d %d 255\n" % (kind, width, height) + scaled


def _number(file: memoryview, at: int) -> int:
    return int(struct.unpack_from(">I", file, at)[0])


def _chunk(name: bytes, content: bytes | memoryview) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(name))
    return b"".join((struct.pack(">I4s", len(content), name), content, struct.pack(">I", checksum)))


def jpeg_pixels(file: bytes) -> bytes:
    """The JPEG without its metadata, which may be broken, but for what says how its pixels are meant.

    Left out before the first scan: comments, colour profiles, previews, and whatever is too short for its kind. A file
    whose segments cannot be followed that far stays as it is.
    """
    kept = [file[:2]]
    at = 2
    while at + 4 <= len(file) and file[at] == 0xFF:
        marker = file[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in _WITHOUT_LENGTH:
            break
        if marker == _START_OF_SCAN:
            return b"".join((*kept, file[at:]))
        end = at + 2 + int(struct.unpack_from(">H", file, at + 2)[0])
        start, least = _MEANING.get(marker, (b"", 0))
        has_meaning = least and file.startswith(start, at + 4) and end - at - 4 >= least
        if marker not in _METADATA or has_meaning:
            kept.append(file[at:end])
        at = end
    return file


@dataclass(frozen=True)
class JpegScans:
    """What the markers of a JPEG say.

    Attributes:
        scans: passes over the pixels, counted to `MAX_SCANS` + 1.
        all_coefficients: a scan was begun for every coefficient of each component in full precision.
        closed: the end-of-image marker is there.
    """

    scans: int
    all_coefficients: bool
    closed: bool

    @classmethod
    def from_bytes(cls, file: bytes | memoryview) -> JpegScans:
        """Walk over the markers; one that lies about its length ends the walk."""
        at = 2
        scans = 0
        closed = False
        components = set[int]()
        bits = dict[tuple[int, int], int]()  # (component, coefficient): lowest bit sent
        while match := _MARKER.search(file, at):
            marker = match.group(1)[0]
            at = match.end()
            closed = closed or marker == _END
            if marker in _WITHOUT_LENGTH or at + 2 > len(file):
                if marker == _END:
                    break
                continue
            length = int(struct.unpack_from(">H", file, at)[0])
            content = bytes(file[at + 2 : at + length])
            at += length
            if marker in _FRAMES:
                components |= set(content[6::3])
            if marker == _START_OF_SCAN:
                scans += 1
                _note_scan(content, bits)
                if scans > MAX_SCANS:
                    break
        coefficients = ((component, place) for component in components for place in range(64))
        return cls(scans, all(bits.get(coefficient) == 0 for coefficient in coefficients), closed)


def _note_scan(content: bytes, bits: dict[tuple[int, int], int]) -> None:
    """The coefficients that a scan sends, down to which bit: all in a baseline JPEG, a part in a progressive one."""
    count = content[0] if content else 0
    if len(content) < 4 + 2 * count:
        return
    first, last, approximation = content[1 + 2 * count : 4 + 2 * count]
    for component in content[1 : 1 + 2 * count : 2]:
        for place in range(first, min(last, 63) + 1):
            bits[component, place] = approximation & 15
