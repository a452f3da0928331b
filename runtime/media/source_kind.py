"""Whether a source is a film or a picture, where the caller does not say: by what it holds, never by its name.

What moves is a film, animated PNG and WebP too, and so is every GIF and every list. Decodes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from framefusion.errors import VideoError
from framefusion.runtime.media.image.file import kind_of
from framefusion.runtime.media.media_file import existing_file
from framefusion.runtime.media.sources import Source, is_pil_image
from framefusion.runtime.media.video.animation import is_animated_webp, still_format
from framefusion.runtime.media.video.container.opening import open_video
from framefusion.runtime.media.video.frames import Video

SourceKind: TypeAlias = Literal["video", "image"]

_HEAD = 64  # bytes
_PNM = (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF")


def source_kind(source: Source) -> SourceKind:
    """What a source shows: see `framefusion.runtime.media.sources`.

    Raises:
        VideoError: it is neither, or a file that cannot be opened.
    """
    if isinstance(source, (str, Path)):
        return _file_kind(source)
    if isinstance(source, (Video, list, tuple)):
        return "video"
    if is_pil_image(source):
        return "image"
    dimensions = getattr(source, "ndim", None)
    if dimensions in (2, 3):
        return "image"
    if dimensions == 4:
        return "video"
    raise VideoError(
        f"a source of type {type(source).__name__} is neither a film nor a picture: give a path, a PIL image, an array "
        "[height, width, channels] or [frames, height, width, channels], or a list of frames"
    )


def _file_kind(path: str | Path) -> SourceKind:
    """What a file holds, by its first bytes; a film by opening it."""
    source = existing_file(path)
    with source.open("rb") as file:
        head = file.read(_HEAD)
    if still_format(source) or head.startswith(_PNM):
        return "image"
    if is_animated_webp(source):
        return "video"
    try:
        with open_video(source):
            return "video"
    except VideoError as error:
        raise VideoError(
            f"{source} is neither a film nor a picture that is read ({kind_of(head)}): give an MP4, MKV, WebM or AVI "
            "film, or a PNG, JPEG or WebP picture"
        ) from error
