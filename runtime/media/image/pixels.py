"""Pixels of any kind as the families take them: RGB in 8 bits, upright, on white.

The kinds are Pillow's modes of an image, and arrays. Levels of more than 8 bits and floats are scaled to 0..255, never
clipped; where the range of the levels cannot be known, they are refused. Copies in bands: a large picture is in memory
once as it was decoded and once as RGB.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import VideoError

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

BAND = 256
"""Rows converted at once."""

ORIENTATION = 0x0112
"""EXIF's tag of which way is up, 1 to 8."""
UPRIGHT = 1
LYING = frozenset({5, 6, 7, 8})
"""Orientations that swap height and width."""

GREY_16 = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262
SAMPLE_FORMAT = 339
"""Tags of TIFF."""
WHITE_IS_ZERO = 0
UNSIGNED = 1


def rgb_pixels(image: PilImage, name: str) -> NDArray[np.uint8]:
    """RGB [H, W, 3] of a decoded picture, upright; what is transparent becomes white.

    Raises:
        VideoError: its levels have no known range, or lie outside theirs; `name` says whose.
    """
    orientation = exif_orientation(image)
    height = image.height
    width = image.width
    shape = (width, height, 3) if orientation in LYING else (height, width, 3)
    upright = np.empty(shape, np.uint8)
    lying = as_stored(upright, orientation)
    for top in range(0, height, BAND):
        band = image.crop((0, top, width, min(top + BAND, height)))
        lying[top : top + BAND] = _band(band, image, name)
    return upright


def exif_orientation(image: PilImage) -> int:
    """1 to 8; 1, upright, where EXIF is missing, broken or says something else."""
    try:
        orientation = image.getexif().get(ORIENTATION, UPRIGHT)
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, EOFError, struct.error, OverflowError):
        return UPRIGHT
    return orientation if isinstance(orientation, int) and orientation in range(1, 9) else UPRIGHT


def as_stored(upright: NDArray[Any], orientation: int) -> NDArray[Any]:
    """A view of an upright picture [H, W, ...] in the order that a file of this orientation stores it."""
    if orientation in (3, 4, 7, 8):
        upright = upright[::-1]
    if orientation in (2, 3, 6, 7):
        upright = upright[:, ::-1]
    return upright.swapaxes(0, 1) if orientation in LYING else upright


def _band(band: PilImage, image: PilImage, name: str) -> NDArray[np.uint8]:
    """RGB of some rows of a picture."""
    from PIL import Image

    if band.mode in GREY_16 or band.mode in ("I", "F"):
        return _grey(np.asarray(band), image, name)
    try:
        if not band.has_transparency_data:
            return np.asarray(band.convert("RGB"))
        shown = band.convert("RGBA") if band.mode != "La" else band.convert("LA").convert("RGBA")
    except (OSError, ValueError) as error:
        raise VideoError(f"{name} has colours of kind {band.mode}: convert it to RGB first") from error
    white = Image.new("RGBA", band.size, "white")
    return np.asarray(Image.alpha_composite(white, shown).convert("RGB"))


def on_white(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB [..., 3] of RGBA [..., 4]: what is transparent becomes white, to the nearest level."""
    alpha = levels[..., 3:].astype(np.uint16)
    mixed = levels[..., :3] * alpha + 255 * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def _grey(levels: NDArray[Any], image: PilImage, name: str) -> NDArray[np.uint8]:
    """RGB of grey levels of more than 8 bits, or floats."""
    tags = getattr(image, "tag_v2", {})  # of TIFF
    if levels.dtype.kind == "f":
        shares = unit_shares(levels, name)
    else:
        shares = levels.astype(np.float32) / np.float32(_white(image, name))
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        shares = 1 - shares
    grey = np.rint(shares * 255).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # of a PNG: one level is transparent
        grey = np.where(levels == clear, np.uint8(255), grey)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _white(image: PilImage, name: str) -> int:
    """The level of white in a picture of whole numbers."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    kind = tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0]
    if image.mode in GREY_16:
        return int((1 << bits) - 1)
    if bits > 16 or kind != UNSIGNED or image.format not in ("PNG", "PPM"):
        raise VideoError(
            f"{name} has whole numbers of {bits if bits > 16 else 32} bits, signed or not, whose white is not known: "
            "scale them to 16 bits, or to floats in [0, 1]"
        )
    return 0xFFFF


def unit_shares(levels: NDArray[Any], name: str) -> NDArray[np.float32]:
    """Floats that are shares of white, in fp32.

    Raises:
        VideoError: one is no number, or not in [0, 1].
    """
    low = float(levels.min())
    high = float(levels.max())
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise VideoError(
            f"{name} has floats from {low:.6g} to {high:.6g}, they must lie in [0, 1]: divide them by what white is, "
            "or give uint8"
        )
    return levels.astype(np.float32, copy=False)
