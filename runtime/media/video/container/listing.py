"""The packets of a film, listed without decoding: its frames and their times, its key frames, and what is damaged.

Knows no sampling rule and no pixel. What the header claims is kept beside what the packets prove.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import VideoError
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.video.container.ending import Ending
from framefusion.runtime.media.video.container.opening import check_deadline, film, packets

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

# A container's own count may be off by a frame or two; less than this share of it means the end of the file is missing.
COMPLETE_SHARE = 0.95

# Decoders whose every packet shows exactly one frame; the others hide frames in packets, or packets in frames.
FRAME_PER_PACKET = frozenset({"h264", "hevc", "av1", "libdav1d", "vp9", "mjpeg", "gif", "apng"})

# Packets stand there in the order they are decoded, without saying when they are shown; FFmpeg guesses.
WITHOUT_PTS = frozenset({"avi"})

# Their frames are drawn over those before, though each packet calls itself a key frame.
DRAWN_OVER = frozenset({"gif", "apng"})

# Where the bytes between two packets are headers and other tracks' packets, so that a hole shows.
PACKED = frozenset({"matroska", "avi", "flv", "nut", "ivf", "yuv4mpegpipe", "gif", "apng"})
HOLE_BYTES = 100
"""More between two packets than headers take."""
CHUNK_HEADER = 8
AVI_INDEX_ENTRY = 16
REORDERED = 8
"""Packets among which frames are out of order, at most: three levels of B-frames."""
LOST_BY_CORRUPTION = 8
"""Frames that one corrupt packet of a transport stream, whose holes have no size, can stand for."""

NO_STAMP = -(1 << 63)
KEY = 1
DISCARD = 2
CORRUPT = 4


class _PacketTable:
    """The packets of a film as they come, a column for each number: a film may have a million of them.

    Attributes:
        packed: whether the bytes between two packets can only be headers and other tracks' packets.
        pts, dts, flags, ticks, sizes, holes: the columns of `Listing`.
        sound_seconds: where the sound ends, as far as its packets were among them.
    """

    def __init__(self, kind: str) -> None:
        self.packed = bool(PACKED & set(kind.split(",")))
        self.pts = array("q")
        self.dts = array("q")
        self.flags = array("q")
        self.ticks = array("q")
        self.sizes = array("q")
        self.holes = array("q")
        self.sound_seconds = 0.0
        self._is_avi = kind == "avi"
        self._end = 0  # of the packets so far, in bytes of the file
        self._hole = 0  # bytes since the last packet of the film that belong to none
        self._count = 0  # of all tracks

    def __len__(self) -> int:
        return len(self.pts)

    def note_place(self, packet: Packet[Any], is_film: bool) -> None:
        """Look for a hole between a packet of any track and the one before it."""
        self._count += 1
        if packet.pos is None:
            return
        skipped = packet.pos - self._end if self._end else 0
        if self._is_avi and is_film and self.dts and packet.dts is not None:  # an empty chunk repeats a frame
            skipped -= CHUNK_HEADER * (packet.dts - self.dts[-1])
        self._hole += skipped if skipped > HOLE_BYTES else 0
        self._end = max(self._end, packet.pos + packet.size)

    def note_sound(self, packet: Packet[Any]) -> None:
        """Go on with the end of the sound, where a packet is of it."""
        if packet.stream.type == "audio" and packet.pts is not None:
            end = (packet.pts + (packet.duration or 0)) * float(packet.time_base)
            self.sound_seconds = max(self.sound_seconds, end)

    def add(self, packet: Packet[Any]) -> None:
        """A packet of the film."""
        self.pts.append(NO_STAMP if packet.pts is None else packet.pts)
        self.dts.append(NO_STAMP if packet.dts is None else packet.dts)
        self.flags.append(KEY * packet.is_keyframe + DISCARD * packet.is_discard + CORRUPT * packet.is_corrupt)
        self.ticks.append(packet.duration or 0)
        self.sizes.append(packet.size)
        self.holes.append(self._hole)
        self._hole = 0

    def tail(self, file_size: int, header_frames: int) -> int:
        """Bytes of a file behind the last packet that belong to none; 0 where that cannot be known."""
        if not self._end:
            return 0
        index = AVI_INDEX_ENTRY * (self._count + header_frames) if self._is_avi else 0
        return max(file_size - self._end - index, 0)


@dataclass(frozen=True, eq=False)
class Listing:
    """What the container and its packets say before anything is decoded.

    Attributes:
        pts, dts: [packets] timestamps in ticks in the order of the file; NO_STAMP where a packet has none.
        flags: [packets] KEY, DISCARD (decoded but never shown: cut away by an edit list) and CORRUPT.
        ticks: [packets] how long each is shown; 0 where the container does not say.
        sizes: [packets] in bytes.
        holes: [packets] bytes before the packet that belong to none.
        tail: bytes behind the last packet that belong to none.
        kind: FFmpeg's name of the container.
        codec: FFmpeg's name of the decoder.
        rates: frames a second as the container claims, the likeliest first; 0 where it does not.
        height, width: of the frames as they are coded, in pixels.
        aspect: width of a pixel through its height.
        header_frames, header_seconds: what the header promises; 0 where it does not.
        sound_seconds: where the sound ends, which may last longer than the pictures; 0 where that was not listed.
        tick: seconds.
    """

    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    flags: NDArray[np.int64]
    ticks: NDArray[np.int64]
    sizes: NDArray[np.int64]
    holes: NDArray[np.int64]
    tail: int
    kind: str
    codec: str
    rates: tuple[float, ...]
    height: int
    width: int
    aspect: float
    header_frames: int
    header_seconds: float
    sound_seconds: float
    tick: float

    @classmethod
    def from_container(cls, container: InputContainer, source: Path, limits: MediaLimits, deadline: float) -> Listing:
        """List all packets of the film; nothing is decoded.

        Raises:
            VideoError: more frames than the limit, or more time than allowed.
        """
        stream = film(container)
        codec = stream.codec_context
        kind = container.format.name
        # 1. Walk over the packets; where the container leaves no room between them, over those of all tracks.
        table = _PacketTable(kind)
        for packet in packets(container) if table.packed else packets(container, stream):
            is_film = packet.stream_index == stream.index
            if table.packed:
                table.note_place(packet, is_film)
            if is_film:
                if len(table) % 256 == 0:
                    check_deadline(source, deadline)
                if len(table) >= limits.film_frames:
                    raise VideoError(
                        f"{source} has more than {limits.film_frames} frames, the limit: cut it, or raise "
                        "--max-film-frames"
                    )
                table.add(packet)
            else:
                table.note_sound(packet)
        # 2. What the header says: only the packets prove it.
        rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
        return cls(
            pts=np.array(table.pts, np.int64),
            dts=np.array(table.dts, np.int64),
            flags=np.array(table.flags, np.int64),
            ticks=np.array(table.ticks, np.int64),
            sizes=np.array(table.sizes, np.int64),
            holes=np.array(table.holes, np.int64),
            tail=table.tail(source.stat().st_size, stream.frames),
            kind=kind,
            codec=codec.name,
            rates=tuple(float(rate or 0) for rate in rates),
            height=codec.height,
            width=codec.width,
            aspect=float(stream.sample_aspect_ratio or 1),
            header_frames=stream.frames,
            header_seconds=_promised_seconds(container, stream),
            sound_seconds=table.sound_seconds,
            tick=_tick(stream),
        )

    @cached_property
    def shown(self) -> NDArray[np.int64]:
        """Timestamps of the frames in the order they are shown, in ticks, each once.  [frames]"""
        stamps: NDArray[np.int64] = np.unique(self.pts[(self.flags & DISCARD == 0) & (self.pts != NO_STAMP)])
        return stamps

    @cached_property
    def keys(self) -> NDArray[np.int64]:
        """[keys, 2]: timestamp of each key frame, ascending, and the timestamp a seek must be given to reach it."""
        is_key = (self.flags & KEY > 0) & (self.pts != NO_STAMP)
        if self.codec in DRAWN_OVER:
            is_key[1:] = False
        pts = self.pts[is_key]
        dts = self.dts[is_key]
        keys = np.stack((pts, np.where(dts == NO_STAMP, pts, np.minimum(pts, dts))), axis=1)
        return keys[np.argsort(pts, kind="stable")]

    @cached_property
    def decoding_times(self) -> NDArray[np.int64]:
        """Decoding timestamps, in ticks and ascending, of the packets that are shown.  [packets]"""
        return np.sort(self.dts[(self.flags & DISCARD == 0) & (self.dts != NO_STAMP)])

    @cached_property
    def last_ticks(self) -> int:
        """How long the frame that is shown last is shown; 0 where the container does not say."""
        if not self.shown.size:
            return 0
        return int(self.ticks[np.flatnonzero((self.pts == self.shown[-1]) & (self.flags & DISCARD == 0))[0]])

    @cached_property
    def decodable(self) -> int:
        """Frames that a decoder can be expected to show: not those before the first key frame."""
        shown = np.count_nonzero(self.flags & DISCARD == 0)
        if not (self.keys.size and self.shown.size):
            return int(shown)
        return int(shown - np.count_nonzero(self.shown < self.keys[0, 0]))

    @cached_property
    def torn(self) -> int:
        """Frames that are missing where the container is damaged.

        By the time that passes at each hole, as far as they fit into its bytes: in films of varying rate time passes
        between frames that are all there.
        """
        gaps = np.diff(self.shown)
        if not gaps.size:
            return 0
        usual = float(np.median(gaps))
        smallest = max(int(np.quantile(self.sizes, 0.1)), 1)
        # 1. At each hole: the frames that its time has room for, but no more than its bytes do.
        lost = 0
        for place in np.flatnonzero((self.holes > 0) | (self.flags & CORRUPT > 0)).tolist():
            around = self.pts[max(place - REORDERED, 0) : place + REORDERED]
            around = around[around != NO_STAMP]
            if around.size:
                first, last = np.searchsorted(self.shown, [around.min(), around.max()]).tolist()
                missing = int(np.maximum(np.round(gaps[first:last] / usual) - 1, 0).sum())
                fitting = math.ceil(int(self.holes[place]) / smallest)
                lost += min(missing, fitting or LOST_BY_CORRUPTION)
        # 2. Behind the last packet: the frames that the header promises there, with the same limit.
        if self.has_tail:
            if self.header_seconds:
                length = (int(self.shown[-1]) - min(int(self.shown[0]), 0)) * self.tick
                length = max(length, self.sound_seconds)
                missing = round((self.header_seconds - length) / (usual * self.tick)) - 1
            else:
                missing = round(len(self.pts) * self.tail / int(self.sizes.sum()))
            lost += max(min(missing, math.ceil(self.tail / smallest)), 0)
        return lost

    @property
    def has_tail(self) -> bool:
        """Whether more than a small part of the file lies behind the last packet: the container broke there."""
        return self.tail > max(HOLE_BYTES, (1 - COMPLETE_SHARE) * (self.tail + int(self.sizes.sum())))

    def identifies_frames(self) -> bool:
        """Whether every frame has a packet and a timestamp of its own, and a key frame to start from."""
        frames = np.count_nonzero(self.flags & DISCARD == 0)
        if self.kind in WITHOUT_PTS and self.codec != "mjpeg":
            return False
        has_keys = bool(self.keys.size and frames and self.shown.size and self.keys[0, 0] <= self.shown[0])
        return self.codec in FRAME_PER_PACKET and self.shown.size == frames and has_keys

    @property
    def display_width(self) -> int:
        """Width of the frames with square pixels."""
        return max(round(self.width * self.aspect), 1)

    def check_size(self, source: Path, limit: int) -> None:
        """Refuse what cannot be a film, before memory is spent on it.

        Raises:
            VideoError: no frame, or frames of more than `limit` pixels; `source` is for the message.
        """
        if not self.pts.size or not self.height * self.width:
            raise VideoError(f"{source} has no frame: it holds a video track without pictures; give another file")
        pixels = self.height * max(self.width, self.display_width)
        if pixels > limit:
            raise VideoError(
                f"{source} is {max(self.width, self.display_width)}x{self.height}, {pixels} pixels a frame, the limit "
                f"is {limit}: scale it down first, or raise --max-frame-pixels"
            )

    def check_complete(self, source: Path, ending: Ending) -> None:
        """Refuse a file whose end is missing.

        A file whose structure is whole is whole, however long its last frame is shown and whatever its header says of
        frames or seconds; one that breaks off, or whose structure leaves it open, is measured by what was promised.
        """
        if ending.whole or (ending.whole is None and self.has_tail):  # the second is damage: `torn` counts it
            return
        share = ending.share
        if ending.measure == "frames" and self.header_frames:
            share = len(self.pts) / self.header_frames
        elif ending.measure == "seconds" and self.header_seconds and self.shown.size:
            usual = int(np.median(np.diff(self.shown))) if self.shown.size > 1 else 0
            length = int(self.shown[-1]) - min(int(self.shown[0]), 0) + (self.last_ticks or usual)
            share = max(length * self.tick, self.sound_seconds) / self.header_seconds
        if share < COMPLETE_SHARE:
            raise VideoError(
                f"{source} is truncated: {len(self.pts)} frames are there, {share:.0%} of what its header promises; "
                "copy or download it again"
            )


def _promised_seconds(container: InputContainer, stream: VideoStream) -> float:
    """How long the film is by its header; 0 where that is no promise but what FFmpeg read at the end of the file."""
    kinds = set(container.format.name.split(","))
    if kinds & {"matroska", "flv", "asf"}:
        return float((container.duration or 0) / 1e6)
    return _seconds(stream.metadata.get("DURATION", "")) if kinds & {"ogg", "nut"} else 0.0


def _seconds(clock: str) -> float:
    """Seconds of a duration tag such as 00:01:02.500000000; 0 for anything else."""
    parts = clock.split(":")
    try:
        return int(parts[-3]) * 3600 + int(parts[-2]) * 60 + float(parts[-1])
    except (IndexError, ValueError):
        return 0.0


def _tick(stream: VideoStream) -> float:
    assert stream.time_base is not None  # FFmpeg's demuxers set it
    return float(stream.time_base)
