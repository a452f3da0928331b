"""Frames from a film's file: those that a family's rule picks (frame_sampling.py), each at its own time (timeline.py).

Knows nothing of pixels wanted by a vision tower (preprocess.py) nor of tokens. Only the sampled frames are ever held,
and where the caller gives `shrink`, only what it makes of each.

How a film is read, fastest way first, each step checked by the next:

1. The packets are listed without decoding: their timestamps are the film, whatever the header claims.
2. For each sampled frame the decoder starts at the key frame before it, unless it is already past that key frame.
3. A frame that does not turn up under its own timestamp, or a damaged packet, means that the packets lied: then
   everything is decoded, once to list what there is and once to pick. What is lost is counted, reported, and limited.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import MediaWarning, VideoError
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits, existing_file
from framefusion.runtime.media.video.animation import AnimatedPicture, is_animated_webp
from framefusion.runtime.media.video.container.ending import Ending
from framefusion.runtime.media.video.container.listing import DRAWN_OVER, FRAME_PER_PACKET, WITHOUT_PTS, Listing
from framefusion.runtime.media.video.container.opening import open_video
from framefusion.runtime.media.video.decoding import Budget, Decoder, in_order
from framefusion.runtime.media.video.frame_pixels import composed_on_white
from framefusion.runtime.media.video.timeline import Sampled, Timeline, ascending, disorder

Pixels = NDArray[np.uint8]
Shrink = Callable[[Pixels, int], tuple[Pixels, ...]]
"""What is kept of a frame [H, W, 3] of a film of so many sampled frames: pictures [h, w, 3], alike for all of them."""

# A seek throws away what the decoder's threads have begun: closer than this, decoding on is cheaper.
SEEK_DISTANCE = 16


@dataclass(frozen=True)
class VideoFacts:
    """A film that was read, in numbers.

    Attributes:
        duration: in seconds.
        fps: frames a second; where they vary, of the film of constant rate that it was sampled as.
        frames: in the file.
        sampled_frames: of those, as often as they were looked at.
        lost_frames: that damage took from the file.
    """

    duration: float
    fps: float
    frames: int
    sampled_frames: int
    lost_frames: int


@dataclass(frozen=True)
class Video:
    """The sampled frames of one video, and where in it they stood."""

    frames: Pixels  # [N, H, W, 3] RGB, as a player shows it; [N, H, W, 0] where `shrunk` is kept instead
    indices: NDArray[np.int64]  # [N] frame numbers in the file
    fps: float  # of the file; where its rate varies, of the film of constant rate that it is sampled as
    total_frames: int  # of the file, counted
    duration: float  # seconds of film
    seconds: float  # spent reading
    sampled: Sampled | None = None  # None: frames stand at their numbers divided by `fps`
    shrunk: tuple[Pixels, ...] = ()  # each [N, h, w, 3]: what the caller's `shrink` made of the frames
    lost_frames: int = 0  # that damage took from the file

    @property
    def times(self) -> NDArray[np.float64]:
        """[N] the frames' own timestamps, in seconds from the beginning of the film."""
        return self.indices / self.fps if self.sampled is None else self.sampled.timestamps

    @property
    def moments(self) -> NDArray[np.float64]:
        """[N] seconds at which the film was looked at: the timestamps, and later ones of a frame that stays."""
        return self.indices / self.fps if self.sampled is None else self.sampled.moments

    @property
    def counted_frames(self) -> int:
        """Frames at the constant rate `fps`."""
        return self.total_frames if self.sampled is None else max(round(self.duration * self.fps), 1)

    @property
    def counted_indices(self) -> NDArray[np.int64]:
        """[N] where the sampled ones stand among them."""
        return self.indices if self.sampled is None else np.round(self.moments * self.fps).astype(np.int64)

    @property
    def facts(self) -> VideoFacts:
        """The numbers without the pixels."""
        return VideoFacts(self.duration, self.fps, self.total_frames, len(self.indices), self.lost_frames)


def facts_of_films(media: Iterable[object]) -> tuple[VideoFacts, ...]:
    """The facts of the films among the media of a conversation, in order."""
    return tuple(film.facts for film in media if isinstance(film, Video))


def read_video(
    path: str | Path,
    sampling: FrameSampling,
    *,
    limits: MediaLimits | None = None,
    shrink: Shrink | None = None,
    follower: FrameFollower | None = None,
) -> Video:
    """Read the sampled frames of a video file as a player shows them, as RGB.

    Args:
        path: of a file.
        sampling: which frames.
        limits: what the file may cost; None takes the defaults.
        shrink: what is kept of each frame, at once, so that no two of full size are held; None keeps the frames.
        follower: learns what is kept as it comes, where frames are shrunk.

    Raises:
        VideoError: the file is missing, no video, truncated, damaged beyond the limit, too large or too short.
    """
    # 1. The file, and what reading it may cost: a few kilobytes can claim hours of large frames.
    start = time.perf_counter()
    limits = limits or MediaLimits()
    source = existing_file(path)
    budget = Budget.of(source, limits)
    keep = _FrameCollector(source, shrink, limits, None if shrink is None else follower)
    # 2. The frames there are, and those among them that the rule picks; FFmpeg plays no animated WebP.
    if is_animated_webp(source):
        timeline, sampled = _read_animation(source, sampling, budget, keep)
        lost = 0
    else:
        timeline, sampled, lost = _read_film(source, sampling, budget, keep)
    # 3. Damage is reported, never hidden; the rest is the film.
    if lost:
        count = len(timeline.times) + lost
        warnings.warn(f"{source} is damaged: {lost} of {count} frames are lost", MediaWarning, stacklevel=2)
    return Video(
        frames=keep.frames(),
        indices=sampled.indices,
        fps=timeline.fps,
        total_frames=len(timeline.times),
        duration=timeline.duration,
        seconds=time.perf_counter() - start,
        sampled=None if timeline.constant else sampled,
        shrunk=keep.shrunk(),
        lost_frames=lost,
    )


def _read_film(
    source: Path, sampling: FrameSampling, budget: Budget, keep: _FrameCollector
) -> tuple[Timeline, Sampled, int]:
    """Timeline, what was sampled and how many frames are lost; the frames go to `keep`."""
    limits = keep.limits
    # 1. List the packets: they are the film, whatever the header claims, and cost no decoding.
    with open_video(source) as container:
        listing = Listing.from_container(container, source, limits, budget.deadline)
    listing.check_size(source, limits.frame_pixels)
    ending = Ending.of_file(source)
    listing.check_complete(source, ending)
    if ending.reason:
        warnings.warn(f"{source} breaks off: {ending.reason}; what is there is shown", MediaWarning, stacklevel=3)
    # 2. Where each frame has a packet and a timestamp, decode only what is sampled: seconds instead of minutes.
    if listing.identifies_frames():
        if listing.codec in DRAWN_OVER:
            budget.check(len(listing.pts), listing.height * listing.width)
        timeline = Timeline.from_timestamps(listing.shown, listing.tick, listing.rates, listing.last_ticks)
        lost = listing.torn
        _check_lost(source, lost, len(timeline.times), limits)
        sampled = timeline.sample(sampling)
        keep.start(sampled.indices, listing.height, listing.display_width)
        if all(keep.add(pixels) for pixels in _picked(source, listing, keep.unique, budget)):
            return timeline, sampled, lost
    # 3. Else decode everything to learn which frames there are, without keeping any.
    budget.check(len(listing.pts), listing.height * listing.width)
    stamps, damaged = _all_timestamps(source, listing, budget)
    timeline = Timeline.from_timestamps(stamps, listing.tick, listing.rates, listing.last_ticks)
    hidden = listing.decodable - len(stamps) if listing.codec in FRAME_PER_PACKET else damaged
    lost = listing.torn + (max(hidden, 0) if damaged else 0)
    _check_lost(source, lost, len(stamps), limits)
    sampled = timeline.sample(sampling)
    # 4. And once more, to pick the sampled ones by their number.
    keep.start(sampled.indices, listing.height, listing.display_width)
    chosen = set(keep.unique.tolist())
    with open_video(source) as container:
        decoder = Decoder(container, budget)
        for number, frame in enumerate(decoder.frames()):
            if number in chosen:
                keep.add(decoder.shown(frame, listing))
            if number == keep.unique[-1]:
                break
    return timeline, sampled, lost


def _picked(source: Path, listing: Listing, indices: NDArray[np.int64], budget: Budget) -> Iterator[Pixels | None]:
    """The frames [H, W, 3] at `indices`, ascending; None, and no more, where the packets turn out to have lied."""
    with open_video(source) as container:
        decoder = Decoder(container, budget)
        frames = decoder.frames()
        reached = 0
        for index, pts in zip(indices.tolist(), listing.shown[indices].tolist(), strict=True):
            last_key = np.searchsorted(listing.keys[:, 0], pts, side="right") - 1
            key_pts, seek_to = listing.keys[last_key].tolist()
            if np.searchsorted(listing.shown, key_pts) - reached > SEEK_DISTANCE:
                frames = decoder.seek(seek_to)
            # A decoder may show a few frames from before the key frame; one without a timestamp cannot be placed.
            frame = next((frame for frame in in_order(frames) if frame.pts is None or frame.pts >= pts), None)
            if frame is None or frame.pts != pts or decoder.damaged:
                yield None
                return
            yield decoder.shown(frame, listing)
            reached = index


def _all_timestamps(source: Path, listing: Listing, budget: Budget) -> tuple[NDArray[np.int64], int]:
    """Timestamps of all frames that can be decoded, ascending, and how many packets cannot."""
    with open_video(source) as container:
        decoder = Decoder(container, budget)
        stamps = [(frame.pts, frame.dts) for frame in decoder.frames()]
    if not stamps:
        raise VideoError(f"{source} has no frame that can be decoded: copy or download it again")
    if listing.kind in WITHOUT_PTS and len(stamps) == listing.decoding_times.size:
        # One frame a packet: the first that is shown is shown when the first packet is due, and so on.
        return ascending(listing.decoding_times.tolist(), 1), decoder.damaged
    rate = next((rate for rate in listing.rates if rate > 0), 25.0)
    by_pts = [pts for pts, _ in stamps]
    by_dts = [dts for _, dts in stamps]
    better = min(by_pts, by_dts, key=disorder)
    return ascending(better, max(round(1 / rate / listing.tick), 1)), decoder.damaged


def _read_animation(
    source: Path, sampling: FrameSampling, budget: Budget, keep: _FrameCollector
) -> tuple[Timeline, Sampled]:
    """As `_read_film`, of an animated WebP."""
    film = AnimatedPicture(source, keep.limits)
    budget.check(film.count, film.height * film.width)
    # 1. Once for the times, which stand beside the pixels.
    begins = list[int]()
    stays = list[int]()
    for begin, stay, pixels in film.frames():
        budget.spend(pixels.nbytes)
        begins.append(begin)
        stays.append(stay)
    timeline = Timeline.from_timestamps(np.array(begins, np.int64), film.tick, (), stays[-1])
    sampled = timeline.sample(sampling)
    # 2. Once more for the sampled frames.
    keep.start(sampled.indices, film.height, film.width)
    chosen = set(keep.unique.tolist())
    for number, (_, _, pixels) in enumerate(film.frames()):
        budget.spend(pixels.nbytes)
        if number in chosen:
            keep.add(composed_on_white(pixels))
    return timeline, sampled


def _check_lost(source: Path, lost: int, present: int, limits: MediaLimits) -> None:
    """Refuse a film of which too much is lost.

    Raises:
        VideoError: the share is above the limit.
    """
    share = lost / max(lost + present, 1)
    if share > limits.lost_share:
        raise VideoError(
            f"{source} is damaged: {lost} of {lost + present} frames are lost ({share:.0%}), the limit is "
            f"{limits.lost_share:.0%}: copy or download it again, or raise --max-lost-share"
        )


class FrameFollower(Protocol):
    """Who learns of frames as they come: see progress.py."""

    def begin(self) -> None:
        """Frames are picked, or picked anew."""

    def add(self, kept: tuple[Pixels, ...], size: tuple[int, int], ready: int) -> None:
        """So many frames are there, of those that whole arrays have room for."""


class _FrameCollector:
    """Takes the sampled frames one after the other and holds what is kept of each, once."""

    def __init__(
        self, source: Path, shrink: Shrink | None, limits: MediaLimits, follower: FrameFollower | None
    ) -> None:
        self.source = source
        self.limits = limits
        self._shrink = shrink
        self._follower = follower
        self.start(np.zeros(0, np.int64), 0, 0)

    def start(self, indices: NDArray[np.int64], height: int, width: int) -> None:
        """Begin anew.

        Args:
            indices: frames that the rule picks, ascending, as often as it picks them.  [N]
            height, width: of the frames, in pixels.

        Raises:
            VideoError: frames that are kept as they are would take more memory than the limit.
        """
        # Some rules look at a frame of a short film more than once.
        self.unique, self._places = np.unique(indices, return_inverse=True)
        self._kept: tuple[Pixels, ...] = ()
        self._size = (height, width)
        self._added = 0
        if self._follower is not None:
            self._follower.begin()
        if self._shrink is None:
            self._check_bytes(indices.size * height * width * 3, f"{indices.size} frames of {width}x{height}")

    def add(self, pixels: Pixels | None) -> bool:
        """The next frame [H, W, 3]; False for None.

        Raises:
            VideoError: what is kept of all frames would take more memory than the limit.
        """
        if pixels is None:
            return False
        self._size = (pixels.shape[0], pixels.shape[1])
        count = len(self._places)
        pictures = (pixels,) if self._shrink is None else self._shrink(pixels, count)
        if not self._added:
            self._check_bytes(count * sum(picture.nbytes for picture in pictures), f"what is kept of {count} frames")
            self._kept = tuple(np.empty((count, *picture.shape), np.uint8) for picture in pictures)
        for kept, picture in zip(self._kept, pictures, strict=True):
            kept[self._places == self._added] = picture
        self._added += 1
        if self._follower is not None:
            self._follower.add(self._kept, self._size, int(np.searchsorted(self._places, self._added)))
        return True

    def frames(self) -> Pixels:
        """The frames, as often as the rule picks them: [N, H, W, 3], or [N, H, W, 0] where they are shrunk.

        Raises:
            VideoError: not all of them came.
        """
        if self._added != self.unique.size:
            raise VideoError(f"{self.source} decodes differently each time: convert it with ffmpeg")
        if self._shrink is None:
            return self._kept[0]
        return np.empty((len(self._places), *self._size, 0), np.uint8)

    def shrunk(self) -> tuple[Pixels, ...]:
        """What `shrink` made of them, each [N, h, w, 3]."""
        return () if self._shrink is None else self._kept

    def _check_bytes(self, size: int, what: str) -> None:
        limit = self.limits.film_bytes
        if size > limit:
            raise VideoError(
                f"{self.source}: {what} take {size} bytes, the limit is {limit}: sample fewer frames (lower fps or "
                "max_frames), scale the video down, or raise --max-film-bytes"
            )
