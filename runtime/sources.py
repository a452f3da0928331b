"""What a caller shows to a model from memory. How it is read is in runtime/media/sources.py."""

from framefusion.runtime.media.sources import as_image, as_video, video_of_frames

__all__ = ["as_image", "as_video", "video_of_frames"]
