"""What a caller shows to a model: a file, or pixels in memory of whatever kind Python programs hold them.

    either  a path, the bytes of a file, a binary file that is open and can seek
    image   a PIL image, an array [H, W], [H, W, C] or [1, H, W, C] with 1, 3 or 4 channels
    video   a `Video`, an array [T, H, W, C], or a sequence of images of one size, each as above

An array is what `numpy.asarray` makes one of (tensors of torch on the CPU, for one), or what gives itself by DLPack
from the host's memory. Its numbers are uint8, other whole numbers in 0..255, booleans, or floats in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from framefusion.errors import VideoError
from framefusion.runtime.media.file_content import (
    FileContent,
    content_as_file,
    content_bytes,
    content_size,
    is_file_content,
)
from framefusion.runtime.media.frame_sampling import FASTEST, SLOWEST, FrameSampling
from framefusion.runtime.media.image.file import FILM, UNKNOWN, check_file_size, decode_image, kind_of, read_image
from framefusion.runtime.media.image.pixels import on_white, rgb_pixels, unit_shares
from framefusion.runtime.media.media_file import MediaLimits, existing_file
from framefusion.runtime.media.video.animation import is_animated_webp, still_format
from framefusion.runtime.media.video.container.opening import open_video
from framefusion.runtime.media.video.frames import FrameFollower, Shrink, Video, read_video
from framefusion.runtime.media.video.timeline import Sampled

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

Image: TypeAlias = "Path | str | ArrayLike | PilImage"
Source: TypeAlias = "Image | Video | Sequence[Image] | FileContent"
"""What may be shown; see this module's first lines."""
SourceKind: TypeAlias = Literal["video", "image"]

_HEAD = 64  # bytes
_HOST = 1  # DLPack's kDLCPU


def as_video(
    source: Source,
    sampling: FrameSampling,
    limits: MediaLimits | None = None,
    shrink: Shrink | None = None,
    follower: FrameFollower | None = None,
) -> Video:
    """A file's sampled frames. Frames in memory are all taken; they stand at the sampling's rate.

    `shrink` says what is kept of each frame of a file, and `follower` learns of it as it comes; see `read_video`.

    Raises:
        VideoError: it cannot be read, or is nothing that shows a film.
    """
    if isinstance(source, Video):
        return source
    if isinstance(source, (str, Path)):
        return read_video(source, sampling, limits=limits, shrink=shrink, follower=follower)
    if is_file_content(source):
        with content_as_file(source, "the video") as path:
            return read_video(path, sampling, limits=limits, shrink=shrink, follower=follower)
    return video_of_frames(source, sampling.fps, limits)


def video_of_frames(
    frames: Source,
    fps: float | None = None,
    limits: MediaLimits | None = None,
    *,
    times: ArrayLike | None = None,
) -> Video:
    """A film of frames in memory, all of which are shown.

    Args:
        frames: an array [T, H, W, C] or a sequence of images of one size; see this module's first lines.
        fps: frames a second.
        limits: of a picture that is read from a file.
        times: [T] seconds at which the frames begin, ascending; instead of `fps`.

    Raises:
        VideoError: there is none, they differ in size, one is no picture, or neither rate nor times place them.
    """
    if (fps is None) == (times is None):
        raise VideoError("a film's frames have a rate or times: give one of fps and times")
    pixels = _frames(frames, limits)
    count = len(pixels)
    if times is not None:
        return _at_times(pixels, times)
    rate = _rate(fps)
    return Video(pixels, np.arange(count), rate, count, count / rate, 0.0)


def _rate(fps: Any) -> float:
    try:
        rate = float(fps)
    except (TypeError, ValueError) as error:
        raise VideoError(f"a film's rate is {fps!r}: give the frames of a second as a number") from error
    if not SLOWEST <= rate <= FASTEST:
        raise VideoError(f"a film's rate is {rate}: give the frames of a second, from {SLOWEST:g} to {FASTEST:g}")
    return rate


def _at_times(pixels: NDArray[np.uint8], times: ArrayLike) -> Video:
    """A film whose frames begin at these seconds; the last one stays as long as the others usually do."""
    count = len(pixels)
    try:
        begin = np.asarray(times, np.float64)
    except (TypeError, ValueError) as error:
        raise VideoError(f"the times of a film's frames are no numbers ({error}): give seconds") from error
    gaps = np.diff(begin) if begin.ndim == 1 else np.zeros(0)
    if begin.shape != (count,) or not np.isfinite(begin).all() or begin[0] < 0 or not (gaps > 0).all():
        raise VideoError(
            f"the times of a film of {count} frames have shape {begin.shape}: give one for each frame, in seconds from "
            "0 on, each later than the one before"
        )
    usual = float(np.median(gaps)) if gaps.size else 1.0
    rate = (count - 1) / float(begin[-1] - begin[0]) if gaps.size else 1.0
    numbers = np.arange(count)
    duration = float(begin[-1]) + usual
    return Video(pixels, numbers, rate, count, duration, seconds=0.0, sampled=Sampled(numbers, begin, begin))


def _frames(frames: object, limits: MediaLimits | None) -> NDArray[np.uint8]:
    """RGB [T, H, W, 3] of what shows a film.

    Raises:
        VideoError: it is one picture, or nothing that holds frames.
    """
    if is_pil_image(frames):
        raise VideoError("one picture was given where a video is shown: give a list of frames, or show it as an image")
    if isinstance(frames, (list, tuple)):
        return _stacked(frames, limits)
    array = _array(frames, "the video")
    if array.ndim == 3:  # which of its sides is time cannot be known
        raise VideoError(
            f"the video has shape {array.shape}: give [frames, height, width, channels]; one picture is a film as "
            "array[None], and frames of grey are one as array[..., None]"
        )
    return _rgb(array, "the video", dimensions=4)


def source_kind(source: Source) -> SourceKind:
    """Whether a source is a film or a picture, where the caller does not say: by what it holds, never by its name.

    What moves is a film, animated PNG and WebP too, and so is every GIF and every list. Decodes nothing.

    Raises:
        VideoError: it is neither, or a file that cannot be opened.
    """
    if isinstance(source, (str, Path)):
        return _file_kind(source)
    if is_file_content(source):
        with content_as_file(source, "the source") as path:
            return _file_kind(path)
    if isinstance(source, (Video, list, tuple)):
        return "video"
    if is_pil_image(source):
        return "image"
    dimensions = len(shape) if isinstance(shape := getattr(source, "shape", None), tuple) else 0
    if dimensions in (2, 3):
        return "image"
    if dimensions == 4:
        return "video"
    if hasattr(source, "__dlpack__") and not shape:
        return source_kind(_array(source, "the source"))
    remedy = _remedy(source) or (
        "give a path, bytes, a PIL image, an array [height, width, channels] or [frames, height, width, channels], or "
        "a list of frames"
    )
    shaped = f" and shape {shape}" if isinstance(shape, tuple) else ""
    raise VideoError(f"a source of type {type(source).__name__}{shaped} is neither a film nor a picture: {remedy}")


def _file_kind(path: str | Path) -> SourceKind:
    """What a file holds, by its first bytes; a film by opening it."""
    source = existing_file(path)
    try:
        with source.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise VideoError(f"{source} cannot be opened ({error.strerror}): check the path") from error
    if still_format(source):
        return "image"
    if is_animated_webp(source):
        return "video"
    try:
        with open_video(source):
            return "video"
    except VideoError as error:
        kind = kind_of(head)
        if kind in (FILM, UNKNOWN):  # what FFmpeg says of it is more
            kind = str(error).removeprefix(f"{source} ").partition(": ")[0]
        raise VideoError(
            f"{source} is neither a film nor a picture that is read ({kind}): give an MP4, MKV, WebM or AVI film, or a "
            "PNG, JPEG or WebP picture"
        ) from error


def as_image(source: Source, limits: MediaLimits | None = None) -> NDArray[np.uint8]:
    """RGB [H, W, 3] of one picture, upright; what is transparent becomes white.

    Raises:
        VideoError: it cannot be read, or is nothing that shows a picture.
    """
    if isinstance(source, (str, Path)):
        return read_image(source, limits)
    if is_file_content(source):
        limits = limits or MediaLimits()
        check_file_size("the image", content_size(source, "the image"), limits)
        return decode_image(content_bytes(source, "the image"), "the image", limits)
    if is_pil_image(source):
        return _loaded(source, limits or MediaLimits())
    if isinstance(source, Video):
        raise VideoError("a film was given where an image is shown: show it as a video, or give one of its frames")
    array = _array(source, "the image")
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    return _rgb(array, "the image", dimensions=3)


def is_pil_image(source: object) -> TypeGuard[PilImage]:
    """Whether it is PIL's, without importing PIL."""
    return any(kind.__module__ == "PIL.Image" and kind.__name__ == "Image" for kind in type(source).__mro__)


def _loaded(image: PilImage, limits: MediaLimits) -> NDArray[np.uint8]:
    """RGB of a PIL image, which may not be decoded yet."""
    from PIL import Image as pil

    name = str(getattr(image, "filename", "")) or "the image"
    limits.check_image(name, image.height, image.width)
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise VideoError(f"{name} cannot be read as an image ({error}): give one that is whole") from error
    return rgb_pixels(image, name)


def _stacked(frames: Sequence[Any], limits: MediaLimits | None) -> NDArray[np.uint8]:
    """Frames of one size as [T, H, W, 3]."""
    if not frames:
        raise VideoError("a video of no frames was given: give one or more")
    first = as_image(frames[0], limits)
    pixels = np.empty((len(frames), *first.shape), np.uint8)
    for number, frame in enumerate(frames):
        shown = as_image(frame, limits) if number else first
        if shown.shape != first.shape:
            raise VideoError(
                f"frame {number} of the video is {shown.shape[1]}x{shown.shape[0]}, the first is "
                f"{first.shape[1]}x{first.shape[0]}: resize them to one size"
            )
        pixels[number] = shown
    return pixels


def _array(source: object, name: str) -> NDArray[Any]:
    """The array that an object holds or makes.

    Raises:
        VideoError: it makes none, or one of other things than numbers.
    """
    kind = type(source).__name__
    if source is None or isinstance(source, (dict, set)):
        raise VideoError(f"{name} is of type {kind}: give a path, a PIL image, an array of pixels or a list of them")
    if (remedy := _remedy(source)) is not None:
        raise VideoError(f"{name} of type {kind} is no array of pixels: {remedy}")
    by_dlpack = hasattr(source, "__dlpack__") and not hasattr(source, "__array__")
    try:
        array = np.from_dlpack(source) if by_dlpack else np.asarray(source)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise VideoError(
            f"{name} of type {kind} makes no array ({error}): give a path, a PIL image or an array of uint8 in the "
            "host's memory, a tensor as tensor.detach().cpu(), bfloat16 as tensor.float()"
        ) from error
    if array.dtype.kind not in "buif":
        raise VideoError(
            f"{name} of type {kind} is no array of pixels (its values are {array.dtype}): give a path, a PIL image, an "
            "array of uint8 or a list of frames"
        )
    return array


def _remedy(source: object) -> str | None:
    """What to give instead of an object that holds pixels, but not as an array; None where nothing is known of it."""
    if isinstance(source, np.ma.MaskedArray):
        return "its mask would be passed over, give array.filled(0)"
    if isinstance(source, np.ndarray) and source.dtype == object:
        return "its values are objects, give list(array)"
    if hasattr(source, "__next__"):
        return "an iterator can be read once only, give list(frames)"
    if callable(getattr(source, "asnumpy", None)):
        return "give its array, frames.asnumpy()"
    if isinstance(shape := getattr(source, "shape", None), tuple) and len(shape) == 5:
        return "a batch is several films, give a list of them as files, each [frames, height, width, channels]"
    if callable(getattr(source, "__dlpack_device__", None)) and not hasattr(source, "__array__"):
        (where, _) = source.__dlpack_device__()  # type: ignore[attr-defined]
        if where != _HOST:
            return "it lies in the memory of a device, copy it to the host"
    return None


def _rgb(array: NDArray[Any], name: str, dimensions: int) -> NDArray[np.uint8]:
    """RGB [..., H, W, 3] of levels [..., H, W] or [..., H, W, C].

    Raises:
        VideoError: the array has another shape, or numbers that are no levels.
    """
    layout = "[frames, height, width, channels]" if dimensions == 4 else "[height, width, channels]"
    if array.ndim == dimensions - 1:
        array = array[..., None]
    if array.ndim != dimensions or array.shape[-1] not in (1, 3, 4) or not array.size:
        hint = ""
        if array.ndim == dimensions and array.size and array.shape[-3] in (1, 3, 4):
            hint = "; channels stand first, move them behind the width: numpy.moveaxis(numpy.asarray(source), -3, -1)"
        raise VideoError(f"{name} has shape {array.shape}: give {layout}, with 1, 3 or 4 channels{hint}")
    levels = _levels(array, name)
    if levels.shape[-1] == 4:
        return on_white(levels)
    return np.repeat(levels, 3, axis=-1) if levels.shape[-1] == 1 else levels


def _levels(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Numbers of an array as levels of 0 to 255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "f":
        return np.rint(unit_shares(array, name) * 255).astype(np.uint8)
    low = int(array.min())
    high = int(array.max())
    if array.dtype == np.uint16 or not 0 <= low <= high <= 255:
        raise VideoError(
            f"{name} has whole numbers from {low} to {high} of type {array.dtype}, they must be uint8 or lie in "
            "0..255: divide them by what white is, and give floats in [0, 1]"
        )
    return array.astype(np.uint8)
