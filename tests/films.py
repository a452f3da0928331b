"""Short films drawn in a moment: a still gradient, a square that moves, some noise."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np


def write_film(path: Path, frames: int = 16, fps: int = 4, size: int = 64, seed: int = 0) -> Path:
    """A film in MPEG-4 with this many frames of size x size."""
    import av

    random = np.random.default_rng(seed)
    still = np.broadcast_to(np.linspace(0, 200, size, dtype=np.uint8)[:, None, None], (size, size, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(fps))
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for t in range(frames):
            picture = still + random.integers(0, 8, still.shape, np.uint8)
            at = t * size // (2 * max(frames, 1))
            picture[at : at + size // 3, at : at + size // 3] = (230, 30, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_picture(path: Path, size: int = 64) -> Path:
    """A still picture."""
    from PIL import Image

    Image.fromarray(np.random.default_rng(1).integers(0, 255, (size, size, 3), np.uint8)).save(path)
    return path
