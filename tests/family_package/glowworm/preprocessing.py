"""What the runtime must know: `<frame>` Q rows `</frame>` for each frame, and which frames are shown. No torch."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from framefusion.runtime.families.internvl import InternVLPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling, Indices, frame_rule


@dataclass(frozen=True, kw_only=True)
class GlowwormPreprocessing(InternVLPreprocessing):
    """Square frames as InternVL has them, no blocks of patches joined, an image one picture."""

    rule: ClassVar[str] = "glowworm"

    merge_size: int = 1
    max_tiles: int = 1
    start: str = "<frame>"
    pad: str = ""
    end: str = "</frame>"
    frame_label: str = ""


@frame_rule("glowworm")
def last_frames(total_frames: int, video_fps: float, sampling: FrameSampling) -> Indices:
    """The film's end: frames at `fps` a second, the last `max_frames` of them."""
    return np.arange(0, total_frames, max(round(video_fps / sampling.fps), 1))[-sampling.max_frames :]
