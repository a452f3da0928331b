"""A video file as its container describes it: opened, listed packet by packet, refused when it is none or not whole.

Decodes nothing and knows no sampling rule (video.py). PyAV's objects are typed Any: it is imported on first use.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import VideoError
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.video.animation import still_format
from framefusion.runtime.media.video.ending import Ending

# A container's own count may be off by a frame or two; less than this share of it means the end of the file is missing.
COMPLETE_SHARE = 0.95

# Decoders whose every packet shows exactly one frame; the others hide frames in packets, or packets in frames.
ONE_FRAME_A_PACKET = frozenset({"h264", "hevc", "av1", "libdav1d", "vp9", "mjpeg", "gif", "apng"})

# Packets stand there in the order they are decoded, without saying when they are shown; FFmpeg guesses.
WITHOUT_PTS = frozenset({"avi"})

# Their frames are drawn over those before, though each packet calls itself a key frame.
DRAWN_OVER = frozenset({"gif", "apng"})

# Demuxers that may read a user's file. None of them opens another file or an address, runs a script, or takes text for
# a picture: playlists (hls, dash, concat, sdp), numbered pictures (image2) and devices are not among them.
DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,kux,asf,asf_o,ogg,nut,gif,apng,mxf,gxf,"
    "rm,wtv,dv,ivf,h264,hevc,vvc,av1,obu,m4v,h263,h261,vc1,cavsvideo,avs2,avs3,dirac,mjpeg,yuv4mpegpipe,swf,dhav,nsv,"
    "nuv,pva,ty,amv,flic,roq,smk,bink,jpegxl_anim,mp3,aac,flac,wav,aiff,caf,ape,tak,tta,wv,ac3,eac3,dts,amr"
)

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
    def from_container(cls, container: Any, source: Path, limits: MediaLimits, deadline: float) -> Listing:
        """List all packets of the film; nothing is decoded.

        Raises:
            VideoError: more frames than the limit, or more time than allowed.
        """
        stream = film(container)
        codec = stream.codec_context
        name = container.format.name
        pts, dts, flags, ticks, sizes, holes = (array("q") for _ in range(6))
        packed = bool(PACKED & set(name.split(",")))
        end = 0
        hole = 0
        count = 0
        sound_end = 0.0
        for packet in packets(container) if packed else packets(container, stream):
            own = packet.stream_index == stream.index
            count += 1
            if packed and packet.pos is not None:
                skipped = packet.pos - end if end else 0
                if name == "avi" and own and dts and packet.dts is not None:  # an empty chunk repeats a frame
                    skipped -= CHUNK_HEADER * (packet.dts - dts[-1])
                hole += skipped if skipped > HOLE_BYTES else 0
                end = max(end, packet.pos + packet.size)
            if not own:
                if packet.stream.type == "audio" and packet.pts is not None:
                    sound_end = max(sound_end, (packet.pts + (packet.duration or 0)) * float(packet.time_base))
                continue
            if len(pts) % 256 == 0:
                check_deadline(source, deadline)
            if len(pts) >= limits.film_frames:
                raise VideoError(
                    f"{source} has more than {limits.film_frames} frames, the limit: cut it, or raise --max-film-frames"
                )
            pts.append(NO_STAMP if packet.pts is None else packet.pts)
            dts.append(NO_STAMP if packet.dts is None else packet.dts)
            flags.append(KEY * packet.is_keyframe + DISCARD * packet.is_discard + CORRUPT * packet.is_corrupt)
            ticks.append(packet.duration or 0)
            sizes.append(packet.size)
            holes.append(hole)
            hole = 0
        index = AVI_INDEX_ENTRY * (count + stream.frames) if name == "avi" else 0
        rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
        return cls(
            np.array(pts, np.int64),
            np.array(dts, np.int64),
            np.array(flags, np.int64),
            np.array(ticks, np.int64),
            np.array(sizes, np.int64),
            np.array(holes, np.int64),
            max(source.stat().st_size - end - index, 0) if end else 0,
            name,
            codec.name,
            tuple(float(rate or 0) for rate in rates),
            codec.height,
            codec.width,
            float(stream.sample_aspect_ratio or 1),
            stream.frames,
            _promised_seconds(container, stream),
            sound_end,
            float(stream.time_base),
        )

    @cached_property
    def shown(self) -> NDArray[np.int64]:
        """Timestamps of the frames in the order they are shown; as many as there are different ones."""
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
        """Timestamps of the packets in the order they are decoded, of those that are shown."""
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
        lost = 0
        for place in np.flatnonzero((self.holes > 0) | (self.flags & CORRUPT > 0)).tolist():
            around = self.pts[max(place - REORDERED, 0) : place + REORDERED]
            around = around[around != NO_STAMP]
            if around.size:
                first, last = np.searchsorted(self.shown, [around.min(), around.max()]).tolist()
                missing = int(np.maximum(np.round(gaps[first:last] / usual) - 1, 0).sum())
                lost += min(missing, -(-int(self.holes[place]) // smallest) or LOST_BY_CORRUPTION)
        if self.has_tail:
            length = (int(self.shown[-1]) - min(int(self.shown[0]), 0)) * self.tick
            length = max(length, self.sound_seconds)
            missing = round((self.header_seconds - length) / (usual * self.tick)) - 1
            if not self.header_seconds:
                missing = round(len(self.pts) * self.tail / int(self.sizes.sum()))
            lost += max(min(missing, -(-self.tail // smallest)), 0)
        return lost

    @property
    def has_tail(self) -> bool:
        """Whether more than a small part of the file lies behind the last packet: the container broke there."""
        return self.tail > max(HOLE_BYTES, (1 - COMPLETE_SHARE) * (self.tail + int(self.sizes.sum())))

    def tells_frames_apart(self) -> bool:
        """Whether every frame has a packet and a timestamp of its own, and a key frame to start from."""
        frames = np.count_nonzero(self.flags & DISCARD == 0)
        if self.kind in WITHOUT_PTS and self.codec != "mjpeg":
            return False
        has_keys = bool(self.keys.size and frames and self.shown.size and self.keys[0, 0] <= self.shown[0])
        return self.codec in ONE_FRAME_A_PACKET and self.shown.size == frames and has_keys

    @property
    def display_width(self) -> int:
        """Width of the frames with square pixels."""
        return max(round(self.width * self.aspect), 1)

    def check_size(self, source: Path, limit: int) -> None:
        """Refuse what cannot be a film, before memory is spent on it."""
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
        frames or seconds; one that breaks off, or whose structure does not tell, is measured by what was promised.
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


def _promised_seconds(container: Any, stream: Any) -> float:
    """How long the film is by its header; 0 where that is no promise but what FFmpeg saw of the end of the file."""
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


def check_deadline(source: Path, deadline: float) -> None:
    """Refuse a film that takes longer to read than allowed; `deadline` is of time.monotonic."""
    if time.monotonic() > deadline:
        raise VideoError(
            f"{source} takes longer to read than its limit allows: cut it or scale it down, or raise --max-film-seconds"
        )


def packets(container: Any, stream: Any = None) -> Iterator[Any]:
    """The packets that have content, of one track or all, up to where the container ends or breaks off."""
    import av

    demuxer = container.demux() if stream is None else container.demux(stream)
    while True:
        try:
            packet = next(demuxer, None)
        except (av.FFmpegError, IndexError):  # IndexError: PyAV's, when damage makes up a new track
            return  # as a player: what lies behind is lost
        if packet is None:
            return
        if packet.size:
            yield packet


def film(container: Any) -> Any:
    """The track that a player shows: the default one, else the first; no cover of a song, no still beside a film."""
    if not container.streams.video:
        return None
    kinds = type(container.streams.video[0].disposition)
    aside = kinds.attached_pic | kinds.timed_thumbnails | kinds.still_image | kinds.dependent
    tracks = [track for track in container.streams.video if not track.disposition & aside]
    if "avif" in container.metadata.get("major_brand", "") + container.metadata.get("compatible_brands", ""):
        tracks.sort(key=lambda track: track.frames < 2)  # a still picture stands before the film, undeclared
    return next((track for track in tracks if track.disposition & kinds.default), tracks[0] if tracks else None)


def _lenient(av: Any) -> dict[str, Any]:
    """What makes PyAV pass over metadata that is not UTF-8: since 19 it does so unasked."""
    return {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


@contextmanager
def open_video(source: Path) -> Iterator[Any]:
    """A PyAV container that has a moving picture; what FFmpeg finds wrong becomes a VideoError."""
    import av

    if still := still_format(source):
        raise VideoError(f"{source} is an image ({still}): pass it as an image")
    # An absolute path behind "file:" is a path for FFmpeg, whatever colons its name has.
    address = f"file:{source.absolute()}"
    # Given as `options`, PyAV 14 writes them past the tracks of a container that finds its tracks late (FLV).
    options = {"protocol_whitelist": "file", "format_whitelist": DEMUXERS}
    try:
        with av.open(address, container_options=options, **_lenient(av)) as container:
            _check_kind(source, container)
            film(container).thread_type = "AUTO"
            yield container
    except (av.FFmpegError, IndexError) as error:
        lost = Ending.of_mp4(source).reason
        reason = f"is truncated ({lost})" if lost else f"is damaged or no video ({_said(error)})"
        if isinstance(error, av.EOFError) and not lost:
            reason = "has no frame (it ends before the first)"
        raise VideoError(f"{source} {reason}: copy or download it again, or convert it with ffmpeg") from error


def _said(error: Exception) -> str:
    """What FFmpeg said, without the address."""
    return str(getattr(error, "strerror", "") or error)


def _check_kind(source: Path, container: Any) -> None:
    """FFmpeg opens stills as films of one frame, and the cover of a song as a film."""
    if film(container) is None:
        held = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        if container.streams.video:
            held += ", none of it moving"
        raise VideoError(f"{source} has no video track (it holds {held}): give a file with a moving picture")
    if film(container).codec_context is None:
        raise VideoError(f"{source} has a video track in an unknown codec: convert it with ffmpeg to H.264")
