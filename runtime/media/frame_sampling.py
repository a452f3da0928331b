"""Which frames of a video a family looks at: a rule's name and its numbers. Reads no file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError, VideoError

SLOWEST = 1e-6
FASTEST = 1e9
"""Frames a second that are asked for: one in eleven days; more than any film has."""
MOST_FRAMES = 100_000


@dataclass(frozen=True)
class FrameSampling:
    """How many frames of a video are seen, and which: a rule's name and its numbers."""

    rule: str = "qwen2_vl"
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    frame_factor: int = 2
    force: bool = False  # always max_frames, evenly spread, however short the video (llava)

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


def linspace_fp32(last: int, count: int) -> NDArray[np.float32]:
    """`torch.linspace(0, last, count)` bit for bit: fp32, one rounding a value, each half counted from its own end.

    Positions that fall midway between two frames are common, and float64 would round some of them the other way.
    """
    if count == 1:
        return np.zeros(1, np.float32)
    step = np.float64(np.float32(last) / np.float32(count - 1))
    i = np.arange(count, dtype=np.float64)
    return np.where(i < count // 2, step * i, last - step * (count - 1 - i)).astype(np.float32)


def qwen2_vl_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> NDArray[np.int64]:
    """Evenly spread frames, first and last included; their number is a multiple of `frame_factor`."""
    factor = sampling.frame_factor
    low = -(-sampling.min_frames // factor) * factor
    high = sampling.max_frames // factor * factor
    wanted = min(max(total_frames / video_fps * sampling.fps, low), high, total_frames)
    count = int(wanted // factor) * factor
    if count < factor:
        raise VideoError(
            f"the video has {total_frames} frame(s), the model needs {factor} or more: give a longer clip, or an image"
        )
    return linspace_fp32(total_frames - 1, count).round().astype(np.int64)


def minicpmv_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> NDArray[np.int64]:
    """Every n-th frame from the first on, n next to the wanted rate; of too many, the middles of equal parts."""
    seen = np.arange(0, total_frames, max(round(video_fps / sampling.fps), 1))
    if seen.size <= sampling.max_frames:
        return seen
    part = seen.size / sampling.max_frames
    return seen[[int(i * part + part / 2) for i in range(sampling.max_frames)]]


def internvl_chat_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> NDArray[np.int64]:
    """Near the middle of each of n equal parts: see `_parts`; a film of fewer frames shows some of them again."""
    count = _parts(total_frames, video_fps, sampling)
    part = (total_frames - 1) / count
    return (part / 2 + np.round(part * np.arange(count))).astype(np.int64)


def internvl_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> NDArray[np.int64]:
    """The middle of each of n equal parts: see `_parts`; no frame twice.

    In fp32, as transformers' `torch.arange` has it: middles that fall on a whole number are common.
    """
    count = min(_parts(total_frames, video_fps, sampling), total_frames)
    part = total_frames / count
    return (part / 2 + np.arange(count) * part).astype(np.float32).astype(np.int64)


def _parts(total_frames: int, video_fps: float, sampling: FrameSampling) -> int:
    """`max_frames` (`force`), or as many as `fps` asks for up to that."""
    asked = sampling.max_frames if sampling.force else int(total_frames / video_fps * sampling.fps)
    return max(min(asked, sampling.max_frames), 1)


def nvila_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> NDArray[np.int64]:
    """Evenly spread frames, first and last included, however short the video (`force`); else `fps` frames a second.

    A short video gives some frames several times, as many as the model was trained with.
    """
    if sampling.force:
        return np.linspace(0, total_frames - 1, sampling.max_frames).round().astype(np.int64)
    step = 1 / sampling.fps
    times = np.arange(min(math.ceil(total_frames / video_fps / step), sampling.max_frames)) * step
    indices = (times * video_fps).astype(np.int64)
    return indices[indices < total_frames]  # the last time may round up to the end


def llava_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> NDArray[np.int64]:
    """A frame every 1 / fps seconds; where these are more than `max_frames`, or by `force`, that many evenly spread.

    Spread ones include first and last, rounded down; a shorter film shows some frames again.
    """
    every = np.arange(0, total_frames, max(round(video_fps / sampling.fps), 1))
    if sampling.force or every.size > sampling.max_frames:
        return np.linspace(0, total_frames - 1, sampling.max_frames, dtype=np.int64)
    return every


def uniform_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> NDArray[np.int64]:
    """The first frames of equal parts: `max_frames` of them with `force`, else `fps` a second up to that."""
    wanted = total_frames if sampling.force else max(1, int(total_frames / video_fps * sampling.fps))
    count = min(wanted, sampling.max_frames, total_frames)
    return np.arange(count) * total_frames // count


def qwen3_vl_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> NDArray[np.int64]:
    """Evenly spread frames, first and last included; their number may be odd."""
    wanted = int(total_frames / video_fps * sampling.fps)
    count = min(max(wanted, sampling.min_frames), sampling.max_frames, total_frames)
    if count < sampling.frame_factor:
        raise VideoError(
            f"the video has {total_frames} frame(s), the model needs {sampling.frame_factor} or more: give a longer "
            "clip, or an image"
        )
    return np.linspace(0, total_frames - 1, count).round().astype(np.int64)


RULES: dict[str, Callable[[int, float, FrameSampling], NDArray[np.int64]]] = {
    "qwen2_vl": qwen2_vl_indices,
    "qwen3_vl": qwen3_vl_indices,
    "llava": llava_indices,
    "uniform": uniform_indices,
    "internvl_chat": internvl_chat_indices,
    "internvl": internvl_indices,
    "minicpmv": minicpmv_indices,
    "nvila": nvila_indices,
}


def sample_indices(total_frames: int, video_fps: float, sampling: FrameSampling) -> NDArray[np.int64]:
    """Numbers of the frames to look at, ascending [N], by the family's rule."""
    if total_frames < 1:
        raise VideoError("the video has no frame: give a video with a picture")
    if not video_fps > 0:
        raise VideoError(f"the video's frame rate is {video_fps}: convert it to a constant frame rate (ffmpeg -r 25)")
    return RULES[sampling.rule](total_frames, video_fps, sampling)
