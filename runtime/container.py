"""A video file as its container describes it: opened, listed packet by packet, refused when it is none or not whole.

Decodes nothing and knows no sampling rule (video.py). PyAV's objects are typed Any: it is imported on first use.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import VideoError

# A container's own count may be off by a frame or two; less than this share of it means the end of the file is missing.
COMPLETE_SHARE = 0.95

# What FFmpeg takes for drawings made of letters.
TEXT_FORMATS = frozenset({"tty", "bin", "xbin", "adf", "idf"})

# Decoders whose every packet shows exactly one frame; the others hide frames in packets, or packets in frames.
ONE_FRAME_A_PACKET = frozenset({"h264", "hevc", "av1", "libdav1d", "vp9", "mjpeg"})


class Packet(NamedTuple):
    """One packet of the film, undecoded."""

    pts: int | None
    dts: int | None
    is_key: bool
    is_discard: bool  # decoded but never shown: cut away by an edit list


@dataclass(frozen=True)
class Listing:
    """What the container and its packets say before anything is decoded."""

    packets: list[Packet]
    codec: str
    fps: float
    height: int
    width: int
    header_frames: int  # 0: the header does not say
    header_seconds: float  # 0: the header does not say
    time_base: float  # seconds per tick

    @classmethod
    def from_container(cls, container: Any) -> Listing:
        """List all packets of the first moving picture; nothing is decoded."""
        stream = film(container)
        packets = [
            Packet(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard)
            for packet in container.demux(stream)
            if packet.size
        ]
        codec, rate = stream.codec_context, stream.average_rate or stream.guessed_rate or 0
        seconds = _seconds(stream.metadata.get("DURATION", ""))
        return cls(
            packets, codec.name, float(rate), codec.height, codec.width, stream.frames, seconds, float(stream.time_base)
        )

    @cached_property
    def discarded(self) -> int:
        """Packets that show nothing."""
        return sum(packet.is_discard for packet in self.packets)

    @cached_property
    def pts(self) -> NDArray[np.int64]:
        """Timestamps of the frames in the order they are shown; as many as there are different ones."""
        shown = {packet.pts for packet in self.packets if packet.pts is not None and not packet.is_discard}
        return np.array(sorted(shown), np.int64)

    @cached_property
    def keys(self) -> NDArray[np.int64]:
        """[keys, 2]: timestamp of each key frame, ascending, and the timestamp a seek must be given to reach it."""
        stamps = [(packet.pts, packet.dts) for packet in self.packets if packet.is_key]
        keys = [(pts, pts if dts is None else min(pts, dts)) for pts, dts in stamps if pts is not None]
        return np.array(sorted(keys), np.int64).reshape(-1, 2)

    def tells_frames_apart(self) -> bool:
        """Whether every frame has a packet and a timestamp of its own, and a key frame to start from."""
        frames = len(self.packets) - self.discarded
        has_keys = bool(self.keys.size and frames and self.keys[0, 0] <= self.pts[0])
        return self.codec in ONE_FRAME_A_PACKET and self.pts.size == frames and has_keys

    def check_size(self, source: Path, max_frame_pixels: int) -> None:
        """Refuse what cannot be a film, before memory is spent on it."""
        if not self.packets or not self.height * self.width:
            raise VideoError(f"{source} has no frame: it holds a video track without pictures; give another file")
        check_pixels(source, self.height, self.width, max_frame_pixels)

    def check_bytes(self, source: Path, count: int, max_bytes: int) -> None:
        """Refuse sampled frames that would not fit in memory."""
        size = count * self.height * self.width * 3
        if size > max_bytes:
            raise VideoError(
                f"{source}: {count} frames of {self.width}x{self.height} take {size} bytes, the limit is {max_bytes}: "
                "sample fewer frames (lower fps or max_frames) or scale the video down"
            )

    def check_complete(self, source: Path, found: int) -> None:
        """Refuse a file whose end is missing."""
        share = found / self.header_frames if self.header_frames else 1.0
        if not self.header_frames and self.header_seconds and self.pts.size:
            share = (float(self.pts[-1]) * self.time_base + 1 / max(self.fps, 1)) / self.header_seconds
        if share < COMPLETE_SHARE:
            raise VideoError(
                f"{source} is truncated: {found} frames are there, {share:.0%} of what its header promises; "
                "copy or download it again"
            )


def _seconds(clock: str) -> float:
    """Seconds of a Matroska duration tag such as 00:01:02.500000000; 0 for anything else."""
    parts = clock.split(":")
    try:
        return int(parts[-3]) * 3600 + int(parts[-2]) * 60 + float(parts[-1])
    except (IndexError, ValueError):
        return 0.0


def check_pixels(source: Path, height: int, width: int, limit: int) -> None:
    """Refuse a frame or picture too large to be decoded."""
    if height * width > limit:
        raise VideoError(
            f"{source} is {width}x{height}, {height * width} pixels a frame, the limit is {limit}: scale it down first"
        )


def film(container: Any) -> Any:
    """The first video track that is not the cover of a song, or None."""
    tracks = container.streams.video
    return next((track for track in tracks if not track.disposition & track.disposition.attached_pic), None)


def _lenient(av: Any) -> dict[str, Any]:
    """What makes PyAV pass over metadata that is not UTF-8: since 19 it does so unasked."""
    return {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


@contextmanager
def open_video(source: Path) -> Iterator[Any]:
    """A PyAV container that has a moving picture; what FFmpeg finds wrong becomes a VideoError."""
    import av

    try:
        # A playlist must not make this process fetch other addresses.
        with av.open(str(source), options={"protocol_whitelist": "file"}, **_lenient(av)) as container:
            _check_kind(source, container)
            film(container).thread_type = "AUTO"
            yield container
    except (av.FFmpegError, IndexError) as error:  # IndexError: PyAV's, when damage makes up a new track
        lost = _missing_from_mp4(source)
        reason = f"is truncated ({lost})" if lost else f"is damaged or no video ({error})"
        if isinstance(error, av.EOFError) and not lost:
            reason = "has no frame (it ends before the first)"
        raise VideoError(f"{source} {reason}: copy or download it again, or convert it with ffmpeg") from error


def _check_kind(source: Path, container: Any) -> None:
    """FFmpeg opens stills as films of one frame, text as a recorded terminal, and the cover of a song as a film."""
    name = container.format.name
    if name.endswith("_pipe") or name == "image2":
        raise VideoError(f"{source} is an image ({name.removesuffix('_pipe')}): pass it as an image")
    if name in TEXT_FORMATS:
        raise VideoError(f"{source} is damaged or no video (it reads as text): give a file with a moving picture")
    if film(container) is None:
        held = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise VideoError(f"{source} has no video track (it holds {held}): give a file with a moving picture")
    if film(container).codec_context is None:
        raise VideoError(f"{source} has a video track in an unknown codec: convert it with ffmpeg to H.264")


def _missing_from_mp4(source: Path) -> str:
    """What an MP4's top-level boxes show to be missing; empty for a whole MP4 and for other containers."""
    size, at, names = source.stat().st_size, 0, []
    with source.open("rb") as file:
        while at + 8 <= size:
            file.seek(at)
            length, name, long = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            length = long if length == 1 else length or size - at
            names.append(name)
            at += max(length, 8)
    if b"ftyp" not in names[:1]:
        return ""
    lost = [f"the last {at - size} bytes"] if at > size else []
    lost += [] if b"moov" in names else ["its index, the moov box"]
    return f"{' and '.join(lost)} missing" if lost else ""
