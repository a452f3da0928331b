"""Frames from a file, read with PyAV: those that a family's rule picks (frame_sampling.py).

Knows nothing of pixels wanted by a vision tower (preprocess.py) nor of tokens. Only the sampled frames are ever held.

How a video is read, fastest way first, each step checked by the next:

1. The packets are listed without decoding: their number is the number of frames, whatever the header claims.
2. For each sampled frame the decoder starts at the key frame before it, unless it is already past that key frame.
3. A frame that does not turn up under its own timestamp means that the packets lied too: then everything is decoded,
   once to count and once to pick.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.runtime.container import Listing, film, open_video
from framefusion.runtime.frame_sampling import FrameSampling, sample_indices
from framefusion.runtime.media_file import existing_file

MAX_FRAME_PIXELS = 8192 * 4320
MAX_BYTES = 8 << 30

# A seek throws away what the decoder's threads have begun: closer than this, decoding on is cheaper.
SEEK_DISTANCE = 16


@dataclass(frozen=True)
class Video:
    """The sampled frames of one video, and where in it they stood."""

    frames: NDArray[np.uint8]  # [N, H, W, 3] RGB, upright
    indices: NDArray[np.int64]  # [N] frame numbers in the file
    fps: float  # of the file
    total_frames: int  # of the file, counted
    duration: float  # seconds of film
    seconds: float  # spent reading

    @property
    def times(self) -> NDArray[np.float64]:
        """[N] seconds from the beginning of the film."""
        return self.indices / self.fps


def read_video(
    path: str | Path,
    sampling: FrameSampling,
    *,
    max_frame_pixels: int = MAX_FRAME_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Video:
    """Read the sampled frames of a video file, upright, as RGB."""
    start = time.perf_counter()
    source = existing_file(path)
    with open_video(source) as container:
        listing = Listing.from_container(container)
    listing.check_size(source, max_frame_pixels)
    listing.check_complete(source, len(listing.packets))

    frames, total = None, len(listing.pts)
    if listing.tells_frames_apart():
        indices = sample_indices(total, listing.fps, sampling)
        listing.check_bytes(source, indices.size, max_bytes)
        frames = _decode_by_seeking(source, listing, np.unique(indices))
    if frames is None:
        total = sum(1 for _ in _decode_all(source))
        listing.check_complete(source, total + listing.discarded)
        indices = sample_indices(total, listing.fps, sampling)
        listing.check_bytes(source, indices.size, max_bytes)
        chosen = set(indices.tolist())
        frames = [_upright(frame, listing) for i, frame in enumerate(_decode_all(source)) if i in chosen]
    seconds = time.perf_counter() - start
    each = np.unique(indices, return_inverse=True)[1]  # some rules look at a frame of a short film more than once
    pixels = np.stack([frames[i] for i in each.tolist()])
    return Video(pixels, indices, listing.fps, total, total / listing.fps, seconds)


def _decode_all(source: Path) -> Iterator[Any]:
    with open_video(source) as container:
        yield from container.decode(film(container))


def _decode_by_seeking(source: Path, listing: Listing, indices: NDArray[np.int64]) -> list[NDArray[np.uint8]] | None:
    """The frames at `indices`, or None when one does not turn up under its timestamp."""
    frames = []
    with open_video(source) as container:
        stream = film(container)
        decoder, reached = container.decode(stream), 0
        for index, pts in zip(indices.tolist(), listing.pts[indices].tolist(), strict=True):
            key_pts, seek_to = listing.keys[np.searchsorted(listing.keys[:, 0], pts, side="right") - 1].tolist()
            if np.searchsorted(listing.pts, key_pts) - reached > SEEK_DISTANCE:
                container.seek(seek_to, stream=stream)
                decoder = container.decode(stream)
            # A decoder may show a few frames from before the key frame; one without a timestamp cannot be placed.
            frame = next((frame for frame in decoder if frame.pts is None or frame.pts >= pts), None)
            if frame is None or frame.pts != pts:
                return None
            frames.append(_upright(frame, listing))
            reached = index
    return frames


def _upright(frame: Any, listing: Listing) -> NDArray[np.uint8]:
    """RGB [H, W, 3] as a player shows it: phones store films lying on their side, with a note."""
    # A film may change its size on the way; all its frames get the size that was checked.
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24", width=listing.width, height=listing.height)
    return np.rot90(pixels, round(frame.rotation / 90) % 4)
