"""Decoding as a player does it: what a damaged packet would have shown is passed over, counted, and the film goes on.

Knows no sampling rule and no pixel's meaning.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import VideoError
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.video.container.listing import Listing
from framefusion.runtime.media.video.container.opening import check_deadline, film, packets
from framefusion.runtime.media.video.frame_pixels import UPRIGHT, as_shown, display_matrix

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# FFmpeg's own decoders of these drop the transparency that a second picture in each packet holds; the library's do not.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@dataclass
class Budget:
    """What reading one film may cost, and what it has cost.

    Attributes:
        source: for messages.
        deadline: of time.monotonic.
        limit, spent: bytes of decoded frames, kept or not.
    """

    source: Path
    deadline: float
    limit: int
    spent: int = 0

    @classmethod
    def of(cls, source: Path, limits: MediaLimits) -> Budget:
        """As the limits allow for a file of this size, from now on."""
        size = source.stat().st_size
        return cls(source, time.monotonic() + limits.reading_seconds(size), limits.decoding_bytes(size))

    def check(self, count: int, pixels: int) -> None:
        """Refuse a film of so many frames, all of which must be decoded, before the first is.

        Raises:
            VideoError: they pass the limit.
        """
        if count * pixels > self.limit:
            raise VideoError(self._too_much(f"{count} frames of {pixels} pixels"))

    def spend(self, decoded: int) -> None:
        """Count one decoded picture.

        Raises:
            VideoError: a limit is passed.
        """
        check_deadline(self.source, self.deadline)
        self.spent += decoded
        if self.spent > self.limit:
            raise VideoError(self._too_much("more"))

    def _too_much(self, what: str) -> str:
        return (
            f"{self.source} has {self.source.stat().st_size} bytes and decodes to {what}, the limit is {self.limit} "
            "bytes of frames: cut it, scale it down, or raise --max-decoded-bytes"
        )


class Decoder:
    """The frames of a film's track in the order they are shown.

    Attributes:
        damaged: packets so far that could not be decoded.
        matrix: of the first frame, how the film is laid.
    """

    def __init__(self, container: InputContainer, budget: Budget) -> None:
        self.container = container
        self.budget = budget
        self.stream = film(container)
        self.codec = _codec(self.stream)
        self.damaged = 0
        self.matrix: tuple[int, int, int, int] | None = None

    def frames(self) -> Iterator[VideoFrame]:
        """Frames from where the container stands, in the order they are shown.

        Raises:
            VideoError: the budget is spent.
        """
        for packet in packets(self.container, self.stream):
            yield from self._decoded(packet)
        yield from self._decoded(None)

    def seek(self, timestamp: int) -> Iterator[VideoFrame]:
        """Frames from the key frame at a timestamp in ticks on; iterators from before end here."""
        self.container.seek(timestamp, stream=self.stream)
        self.codec.flush_buffers()
        return self.frames()

    def _decoded(self, packet: Packet[Any] | None) -> Iterator[VideoFrame]:
        import av

        try:
            frames = self.codec.decode(packet)
        except av.EOFError:
            return
        except av.FFmpegError:
            self.damaged += 1
            return
        for frame in frames:
            self.budget.spend(sum(plane.buffer_size for plane in frame.planes))
            if self.matrix is None:
                self.matrix = display_matrix(frame)
            yield frame

    def shown(self, frame: VideoFrame, listing: Listing) -> NDArray[np.uint8]:
        """RGB [H, W, 3] of a frame of this film, as a player shows it."""
        return as_shown(frame, listing.height, listing.width, listing.aspect, self.matrix or UPRIGHT)


def _codec(stream: VideoStream) -> VideoCodecContext:
    """The decoder of a track: one that knows transparency where the track has any."""
    import av

    builtin = stream.codec_context
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    if tags.get("alpha_mode") != "1" or builtin.name not in ALPHA_DECODERS:
        return builtin
    try:
        codec: Any = av.CodecContext.create(ALPHA_DECODERS[builtin.name], "r")
    except (av.FFmpegError, ValueError):  # a build without the library
        return builtin
    codec.extradata = builtin.extradata
    decoder: VideoCodecContext = codec
    return decoder


def in_order(frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    """Frames up to the first that a player would have shown before the one that came before it."""
    last = None
    for frame in frames:
        if last is not None and frame.pts is not None and frame.pts <= last:
            return
        last = frame.pts
        yield frame
