"""Which frames of a video a model is shown: the name of a rule and its numbers. Reads no file.

The rules themselves are beside their family's preprocessing in `framefusion.runtime.families`; importing that package
makes all of them known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError, VideoError

SLOWEST = 1e-6
FASTEST = 1e9
"""Frames a second that may be chosen: one in eleven days; more than any film has."""
MOST_FRAMES = 100_000

Indices = NDArray[np.int64]  # [N] numbers of frames, ascending


@dataclass(frozen=True)
class FrameSampling:
    """How many frames of a video are shown, and which.

    Attributes:
        rule: a name that a family gave with `frame_rule`.
        fps: frames from a second of film.
        min_frames, max_frames: bounds of their number.
        frame_factor: what their number is a multiple of.
        force: always `max_frames`, evenly spread, however short the video.

    Raises:
        BundleError: the rule is unknown.
        VideoError: the numbers choose no frame, or more than anyone could mean.
    """

    rule: str
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    frame_factor: int = 2
    force: bool = False

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise BundleError(
                f"sampling rule {self.rule!r} is unknown, known are {', '.join(RULES)}: update this package"
            )
        if not SLOWEST <= self.fps <= FASTEST:
            raise VideoError(
                f"frames cannot be sampled at {self.fps} a second: give fps from {SLOWEST:g} to {FASTEST:g}"
            )
        if self.max_frames > MOST_FRAMES:
            raise VideoError(f"max_frames={self.max_frames} is above the limit of {MOST_FRAMES}: give fewer")
        if self.frame_factor < 1 or self.max_frames < self.frame_factor:
            raise VideoError(
                f"sampling of max_frames={self.max_frames} takes no frame: give max_frames >= {self.frame_factor}"
            )

    def overridden(self, fps: float | None, max_frames: int | None) -> FrameSampling:
        """The same rule with a user's numbers, None keeping the rule's: a rate of frames ends `force`.

        Raises:
            VideoError: a number is out of range.
        """
        most = max_frames or self.max_frames
        low = min(self.min_frames, most)
        force = self.force and fps is None
        return replace(self, fps=fps or self.fps, max_frames=most, min_frames=low, force=force)

    def spread(self, count: int) -> FrameSampling:
        """The same rule with so many frames, evenly spread: as many of them as it can choose, however long the film.

        Raises:
            VideoError: no film has so many, or the model takes more at least.
        """
        if count < self.frame_factor:
            raise VideoError(
                f"{count} frame(s) are fewer than the model takes at once: give {self.frame_factor} or more"
            )
        return replace(self, min_frames=count, max_frames=count, force=True)


FrameRule = Callable[[int, float, FrameSampling], Indices]
"""(frames of the film, its frames a second, the numbers) -> which of them, ascending [N]."""
RULES: dict[str, FrameRule] = {}


def frame_rule(name: str) -> Callable[[FrameRule], FrameRule]:
    """Make a rule known under the name that manifests have for it.

    Raises:
        ValueError: another rule has this name.
    """

    def register(rule: FrameRule) -> FrameRule:
        if RULES.setdefault(name, rule) is not rule:
            raise ValueError(f"two rules of sampling are called {name!r}")
        return rule

    return register


def linspace_fp32(last: int, count: int) -> NDArray[np.float32]:
    """`torch.linspace(0, last, count)` bit for bit: fp32, one rounding a value, each half counted from its own end.

    Positions that fall midway between two frames are common, and float64 would round some of them the other way.
    """
    if count == 1:
        return np.zeros(1, np.float32)
    step = np.float64(np.float32(last) / np.float32(count - 1))
    i = np.arange(count, dtype=np.float64)
    return np.where(i < count // 2, step * i, last - step * (count - 1 - i)).astype(np.float32)


def sample_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> Indices:
    """Numbers of the frames to show, ascending [N], by the family's rule.

    Raises:
        VideoError: a film without frames or without a rate, or too short for the rule.
    """
    if total_frames < 1:
        raise VideoError("the video has no frame: give a video with a picture")
    if not video_fps > 0:
        raise VideoError(f"the video's frame rate is {video_fps}: convert it to a constant frame rate (ffmpeg -r 25)")
    return RULES[sampling.rule](total_frames, video_fps, sampling)
