"""What a caller shows to a model from memory. How it is read is in runtime/media/sources.py."""

from framefusion.runtime.media.sources import (
    video_of_frames,
)

__all__ = [
    "video_of_frames",
]
