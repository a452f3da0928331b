"""Qwen2.5-VL's rule: Qwen2-VL's, with temporal positions that tell how many seconds lie between the grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from framefusion.errors import BundleError
from framefusion.runtime.families.qwen_vl import QwenVLPreprocessing
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.visual_input import VisualInput


@dataclass(frozen=True, kw_only=True)
class Qwen25VLPreprocessing(QwenVLPreprocessing):
    """Pixel limits are per frame."""

    rule: ClassVar[str] = "qwen2_5_vl"

    tokens_per_second: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokens_per_second > 0:
            raise BundleError(f"tokens_per_second {self.tokens_per_second} is impossible: it must be more than 0")

    def video(self, video: Video, index: int = 0) -> VisualInput:
        """As Qwen2-VL's; a temporal grid is `tokens_per_second` positions a second after the one before."""
        sampled_fps = len(video.indices) / video.counted_frames * video.fps
        seconds = np.float32(self.temporal_patch_size / sampled_fps)  # of a grid; rounded where transformers rounds
        interval = float(np.float32(self.tokens_per_second) * seconds)
        return self.shown(self.patches(video), self.video_pad, interval)
