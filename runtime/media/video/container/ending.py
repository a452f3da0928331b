"""Whether a film's file ends where its container says: boxes, elements and chunks that run over the end of the file.

Headers of the outermost parts are read, no table and no packet: in time that grows with their number, which is bounded,
and in constant memory. MP4 (ISO 14496-12), Matroska (RFC 9559), AVI (RIFF), ASF (WMV), Ogg (RFC 3533), NUT, GIF and
APNG; of others, which have no length, nothing is known.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

MAX_PARTS = 20_000
"""Outermost boxes that are looked at; a fragmented MP4 has some each second."""

TAIL = 1 << 16  # an Ogg page has this many bytes at most
EBML = b"\x1a\x45\xdf\xa3"
SEGMENT = b"\x18\x53\x80\x67"
NUT = b"nut/multimedia container\0"
NUT_INDEX = b"NX\xdd\x67\x2f\x23\xe6\x4e"
ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")  # GUIDs of ASF's outermost objects
ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
PNG = b"\x89PNG"
PNG_END = b"IEND\xae\x42\x60\x82"
END_OF_STREAM = 4  # a flag of Ogg pages

Measure = Literal["frames", "seconds", "bytes"]


@dataclass(frozen=True)
class Ending:
    """What the structure of a file says of its end.

    Attributes:
        whole: whether nothing is missing; None where the container does not say.
        share: of the bytes promised that are there.
        measure: by what to judge how much of the film is there, where it is not whole.
        reason: what is missing, in words; empty where nothing is, or nothing is known.
    """

    whole: bool | None = None
    share: float = 1.0
    measure: Measure = "seconds"
    reason: str = ""

    @classmethod
    def of_file(cls, source: Path) -> Ending:
        """The ending of any container, whose kind its first bytes show."""
        size = source.stat().st_size
        with source.open("rb") as file:
            start = file.read(32)
            if start[4:8] == b"ftyp":
                return _mp4(file, size)
            if start.startswith(EBML):
                return _matroska(file, size)
            if start.startswith(b"RIFF"):
                return _riff(file, size)
            if start.startswith(ASF_HEADER):
                return _asf(file, size)
            if start.startswith(b"OggS"):
                return _ogg(file, size)
            if start.startswith(NUT):
                return _nut(file, size)
            if start.startswith((b"GIF87a", b"GIF89a")):
                return _closed(file, size, b";")
            if start.startswith(PNG):
                return _closed(file, size, PNG_END)
        return cls()

    @classmethod
    def of_mp4(cls, source: Path) -> Ending:
        """The ending of an MP4; nothing is known of others."""
        ending = cls.of_file(source)
        return ending if ending.measure == "frames" else cls()


UNCLOSED = Ending(False, reason="the mark of its end missing")


def _mp4(file: BinaryIO, size: int) -> Ending:
    position = 0
    has_index = False
    open_end = False
    for _ in range(MAX_PARTS):
        if position + 8 > size:
            break
        file.seek(position)
        length, name, long = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        has_index = has_index or name == b"moov"
        open_end = length == 0
        if length == 1:
            length = long
        elif length == 0:
            length = size - position
        position += max(length, 8)
    else:
        return Ending(measure="frames")
    lost = [f"the last {position - size} bytes"] if position > size else []
    lost += [] if has_index else ["its index, the moov box"]
    reason = f"{' and '.join(lost)} missing" if lost else ""
    whole = None if open_end and not lost else not lost
    return Ending(whole, min(size / position, 1.0) if position else 1.0, "frames", reason)


def _matroska(file: BinaryIO, size: int) -> Ending:
    position = 0
    for _ in range(2):  # the EBML header, then the segment
        file.seek(position)
        head = file.read(12).ljust(12, b"\0")
        width = 9 - head[4].bit_length()  # bytes of the size; its first bit that is set says so
        if head[4] == 0:
            return Ending()
        length = int.from_bytes(head[4 : 4 + width], "big") & ((1 << 7 * width) - 1)
        unknown = length == (1 << 7 * width) - 1
        if head[:4] == SEGMENT:
            end = position + 4 + width + length
            return Ending() if unknown else _ended(size, end, "seconds")
        position += 4 + width + length
    return Ending()


def _riff(file: BinaryIO, size: int) -> Ending:
    position = 0
    for _ in range(MAX_PARTS):  # films above 1 GB are several
        file.seek(position)
        head = file.read(8)
        if len(head) < 8 or head[:4] != b"RIFF":
            break
        length = struct.unpack("<I", head[4:])[0]
        if length in (0, 0xFFFFFFFF):  # a recording that was never closed
            return Ending()
        position += 8 + length + length % 2
    return _ended(size + size % 2, position, "bytes")


def _asf(file: BinaryIO, size: int) -> Ending:
    file.seek(16)
    header = int.from_bytes(file.read(8), "little")
    file.seek(header)
    head = file.read(50).ljust(50, b"\0")
    length = int.from_bytes(head[16:24], "little")
    if head[:16] != ASF_DATA or length <= len(head):  # broadcast, or never closed
        return Ending()
    return _ended(size, header + length, "bytes")


def _ogg(file: BinaryIO, size: int) -> Ending:
    file.seek(max(size - 2 * TAIL, 0))
    tail = file.read(2 * TAIL)
    position = 0
    while (position := tail.find(b"OggS", position)) >= 0:
        if len(tail) > position + 5 and tail[position + 5] & END_OF_STREAM:
            return Ending(whole=True)
        position += 4
    return UNCLOSED


def _nut(file: BinaryIO, size: int) -> Ending:
    file.seek(max(size - 12, 0))
    back = int.from_bytes(file.read(8), "big")  # from the end to the index
    if not 12 < back <= size:
        return UNCLOSED
    file.seek(size - back)
    return Ending(whole=True) if file.read(8) == NUT_INDEX else UNCLOSED


def _closed(file: BinaryIO, size: int, mark: bytes) -> Ending:
    """The ending of a file whose last bytes are a mark, but for empty ones behind it."""
    file.seek(max(size - TAIL, 0))
    return Ending(whole=True) if file.read(TAIL).rstrip(b"\0\r\n").endswith(mark) else UNCLOSED


def _ended(size: int, end: int, measure: Measure) -> Ending:
    if end <= size:
        return Ending(whole=True)
    return Ending(False, size / end, measure, f"the last {end - size} bytes missing")
