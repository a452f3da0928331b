"""A decoded frame as a player shows it: RGB, upright or mirrored as the file asks, with square pixels, on white.

Knows one frame of PyAV's, no file and no time.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

Pixels = NDArray[np.uint8]

UPRIGHT = (1, 0, 0, 1)


def as_shown(
    frame: VideoFrame, height: int, width: int, aspect: float = 1.0, matrix: tuple[int, int, int, int] = UPRIGHT
) -> Pixels:
    """RGB [H, W, 3] of a frame.

    Args:
        frame: PyAV's VideoFrame.
        height, width: of the film's frames as they are coded: one that differs, in a film that changes its size on the
            way, gets them.
        aspect: width of a pixel through its height; the width is stretched by it.
        matrix: the film's `display_matrix`.
    """
    wide = max(round(width * aspect), 1)
    fits = (frame.height, frame.width) == (height, wide)
    colours = _colours(frame)
    if has_alpha(frame):
        shown = composed_on_white(_array(frame, "rgba", **colours))
        if not fits:  # only now: colours under what is transparent must not bleed
            from PIL import Image

            shown = np.asarray(Image.fromarray(shown).resize((wide, height), Image.Resampling.BICUBIC))
    elif fits:
        shown = _array(frame, "rgb24", **colours)
    else:
        shown = _array(frame, "rgb24", height=height, width=wide, interpolation="BICUBIC", **colours)
    return turned(shown, matrix)


def _array(frame: VideoFrame, layout: str, **conversion: Any) -> Pixels:
    """A frame's pixels in a layout of 8 bits a channel, converted by FFmpeg's scaler.  [H, W, channels]"""
    pixels: Any = frame.to_ndarray(format=layout, **conversion)
    return np.asarray(pixels, np.uint8)


def _colours(frame: VideoFrame) -> dict[str, Any]:
    """From the frame's own matrix and range to those of RGB: PyAV 14, without a matrix, takes BT.601 for all."""
    from av.video.reformatter import ColorRange, Colorspace

    full = int(frame.color_range) == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return {
        "src_color_range": ColorRange.JPEG if full else ColorRange.MPEG,
        "dst_color_range": ColorRange.UNSPECIFIED,  # of RGB it says nothing; PyAV 14 passes over what is alike
        "dst_colorspace": Colorspace.DEFAULT,
    }


def has_alpha(frame: VideoFrame) -> bool:
    """Whether some of a frame may be transparent."""
    layout = frame.format
    return layout.name == "pal8" or any(component.is_alpha for component in layout.components)


def composed_on_white(rgba: Pixels) -> Pixels:
    """RGB [H, W, 3] of RGBA [H, W, 4], as Pillow composes pictures: what is transparent becomes white."""
    if (rgba[:, :, 3] == 255).all():
        return np.ascontiguousarray(rgba[:, :, :3])
    from PIL import Image

    white = Image.new("RGBA", (rgba.shape[1], rgba.shape[0]), "white")
    return np.asarray(Image.alpha_composite(white, Image.fromarray(rgba)).convert("RGB"))


def display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c, d: a pixel at (x, y) is shown at (a x + c y, b x + d y), each -1, 0 or 1; the nearest such where it is
    none (ISO 14496-12, 8.2.2).

    Read it from one frame of a film: PyAV's side data keep their frame in memory until garbage is collected.
    """
    from av.sidedata.sidedata import Type

    # looked up: a loop yields values until PyAV 18, keys from 19 on
    all_side_data: Any = frame.side_data  # its keys are Types, whatever PyAV's hints say
    side_data = all_side_data.get(Type["DISPLAYMATRIX"])
    if side_data is None:
        return UPRIGHT
    a, b, _, c, d = struct.unpack("=5i", bytes(side_data)[:20])
    return _nearest(a, b, c, d)


def _nearest(a: int, b: int, c: int, d: int) -> tuple[int, int, int, int]:
    """Of the eight ways to lay a picture, the one that a matrix is nearest to; upright for one of zeros."""
    if max(abs(a), abs(d)) >= max(abs(b), abs(c)):
        return (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
    return (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)


def turned(pixels: Pixels, matrix: tuple[int, int, int, int]) -> Pixels:
    """A view of a picture, laid as a display matrix says.  [H, W, 3] -> [H, W, 3] or [W, H, 3]"""
    a, b, c, d = matrix
    if b:  # x and y change places, then each may be mirrored
        pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if b < 0 else 1, :: -1 if c < 0 else 1]
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
