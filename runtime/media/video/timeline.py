"""When the frames of a film are shown: their timestamps, and how a rule that counts frames is applied to them.

The families' rules (frame_sampling.py) were made for films of a constant rate: they know a number of frames and a rate.
Where frames stand evenly, to half a frame, they get those, as the authors' code does. Where they do not (phones,
screencasts, slides), the rule counts the frames of the film that ffmpeg would make of it at a constant rate, and each
of those is the frame that is on the screen at that moment. So one film gives one prompt, however it is stored.

Numbers only; opens no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import VideoError
from framefusion.runtime.media.frame_sampling import FrameSampling, sample_indices

HALF_A_FRAME = 0.5
EPSILON = 1e-3  # of a frame, for timestamps rounded to their time base

MAX_RATE = 240.0
"""Frames a second that a film of varying rate is counted in, at most: a pair of frames in one tick says nothing."""

NEAR = 0.9
"""Of the rate at which the closest frames stand: what a container claims is taken if it is this much."""

MAX_SECONDS = 7 * 86400.0
"""Length of a film: timestamps beyond are damage."""


@dataclass(frozen=True)
class Sampled:
    """What a rule picked.

    Attributes:
        indices: [N] frames of the film, ascending; a frame that stays on the screen may be picked more than once.
        timestamps: [N] seconds at which those frames begin, from the first frame of the film on.
        moments: [N] seconds at which they were looked at: their timestamps or, where a frame is picked again, later.
    """

    indices: NDArray[np.int64]
    timestamps: NDArray[np.float64]
    moments: NDArray[np.float64]


@dataclass(frozen=True)
class Timeline:
    """The frames of a film in time.

    Attributes:
        times: [n] seconds from the first frame on, ascending.
        duration: seconds from the first frame on until the last one is gone.
        fps: frames a second; where they vary, those of the film of constant rate that a rule counts.
        constant: whether every frame stands within half a frame of its number divided by `fps`.
    """

    times: NDArray[np.float64]
    duration: float
    fps: float
    constant: bool

    @classmethod
    def from_timestamps(
        cls, timestamps: NDArray[np.int64], tick: float, rates: Sequence[float], last_ticks: int = 0
    ) -> Timeline:
        """The timeline of a film by its container.

        Args:
            timestamps: [n] of the frames in ticks, ascending.
            tick: seconds.
            rates: frames a second as the container claims, the likeliest first; those that are 0 are passed over.
            last_ticks: how long the last frame is shown; 0 where the container does not say.

        Raises:
            VideoError: no frame, or timestamps that no film has.
        """
        # 1. Times from the first frame on, and how long the last one stays.
        count = len(timestamps)
        if not count:
            raise VideoError("the video has no frame: give a video with a picture")
        times = (timestamps - timestamps[0]) * tick
        claimed = [rate for rate in rates if rate > 0]
        gaps = np.diff(times)
        usual = 0.0
        if count > 1:
            usual = float(np.median(gaps))
        elif claimed:
            usual = 1 / claimed[0]
        last = last_ticks * tick or usual
        duration = float(times[-1]) + last
        if not 0 < duration <= MAX_SECONDS:
            raise VideoError(
                f"the film's timestamps say that it lasts {duration:.6g} seconds, the limit is {MAX_SECONDS:.0f}: "
                "copy or download it again, or convert it with ffmpeg"
            )
        # 2. A constant rate, claimed or fitted, where all frames stand on its grid: rules then get the true numbers.
        fitted = [(count - 1) / float(times[-1])] if count > 1 else [1 / last]
        for rate in [*claimed, *fitted]:
            if _is_constant(times, duration, rate):
                return cls(times, count / rate, rate, constant=True)
        # 3. Else a rate so high that no frame falls between two that a rule counts.
        rate = max([rate for rate in claimed if rate <= MAX_RATE], default=0.0)
        densest = min(1 / float(gaps[gaps > 0].min(initial=duration)), MAX_RATE)
        if rate < NEAR * densest:
            rate = densest
        return cls(times, duration, rate, constant=False)

    @property
    def counted(self) -> int:
        """Frames that a rule counts."""
        return len(self.times) if self.constant else max(round(self.duration * self.fps), 1)

    def sample(self, sampling: FrameSampling) -> Sampled:
        """The frames that a rule picks.

        Raises:
            VideoError: the film is too short for it.
        """
        chosen = sample_indices(self.counted, self.fps, sampling)
        moments = chosen / self.fps
        if self.constant:
            return Sampled(chosen, moments, moments)
        shown = np.searchsorted(self.times, moments + HALF_A_FRAME / self.fps, side="right") - 1
        again = np.diff(shown, prepend=-1) == 0
        timestamps = self.times[shown]
        return Sampled(shown, timestamps, np.where(again, np.maximum(moments, timestamps), timestamps))


def ascending(stamps: Sequence[int | None], usual: int) -> NDArray[np.int64]:
    """Timestamps in the order frames are shown, in ticks, each after the one before.  [n]

    One that is missing stands `usual` ticks after the one before. One that repeats the one before, or lies before it by
    no more than `usual`, stands a tick after it, and those behind it stay where they are. Where time jumps back
    further, as between two recordings that were joined, it goes on from there.
    """
    times = np.empty(len(stamps), np.int64)
    offset = 0
    last = None
    for place, stamp in enumerate(stamps):
        expected = 0 if last is None else last + usual
        if stamp is None:
            last = expected
        else:
            if last is not None and stamp + offset < last - usual:
                offset = expected - stamp
            last = stamp + offset if last is None else max(stamp + offset, last + 1)
        times[place] = last
    return times


def disorder(stamps: Sequence[int | None]) -> int:
    """How many timestamps, in the order frames are shown, are missing or not after the one before."""
    known = np.array([stamp for stamp in stamps if stamp is not None], np.int64)
    return len(stamps) - known.size + int(np.count_nonzero(np.diff(known) <= 0))


def _is_constant(times: NDArray[np.float64], duration: float, rate: float) -> bool:
    """Whether the frames, and the end of the last one, stand within half a frame of an even grid."""
    grid = np.append(times, duration) * rate
    return bool(np.abs(grid - np.arange(len(grid))).max() <= HALF_A_FRAME + EPSILON)
