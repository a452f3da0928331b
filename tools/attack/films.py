"""Mutated films: each ends in frames or in a VideoError, soon, and within the memory of the limits.

    python -m tools.attack.films --trials 2000 --seed 0

Prints one JSON object; exit code 1 where a trial failed. A trial is known by its seed and number.
"""

from __future__ import annotations

import resource
import tempfile
import time
import warnings
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from framefusion.errors import VideoError
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.video.frames import read_video
from tools.attack.alone import run_alone
from tools.attack.pictures import SECONDS, trial

LIMITS = MediaLimits(
    frame_pixels=1 << 22, film_frames=10_000, film_bytes=1 << 28, decoded_bytes=1 << 30, film_seconds=10.0
)
MEMORY = 2 << 30
"""Bytes that the process may take; the target of the whole attack."""

KINDS = (
    ("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.flv", "libx264"), ("a.nut", "libx264"),
    ("a.avi", "mpeg4"), ("a.mov", "mpeg4"), ("a.webm", "libvpx-vp9"), ("a.ogv", "libvpx"), ("a.gif", "gif"),
    ("a.apng", "apng"), ("a.wmv", "wmv2"), ("a.mpg", "mpeg2video"),
)  # fmt: skip
"""Containers and codecs that are attacked, those that this build of FFmpeg writes."""
PIXELS = {"gif": "rgb8", "apng": "rgb24"}


def originals(seed: int, frames: int = 12) -> list[bytes]:
    """A short film in every container, and a playlist of each kind that names one of them."""
    import av

    random = np.random.default_rng(seed)
    pictures = [random.integers(0, 256, (32, 48, 3), np.uint8) // 4 + 10 * t for t in range(frames)]
    films = []
    with tempfile.TemporaryDirectory() as folder:
        for name, codec in KINDS:
            path = Path(folder) / name
            try:
                with av.open(str(path), "w") as container:
                    stream: Any = container.add_stream(codec, rate=Fraction(25))
                    stream.width = 48
                    stream.height = 32
                    stream.pix_fmt = PIXELS.get(codec, "yuv420p")
                    for picture in pictures:
                        frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
                        container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
                    container.mux(stream.encode(None))
            except (av.FFmpegError, ValueError):  # a build without this encoder
                continue
            films.append(path.read_bytes())
        path = Path(folder) / "a.webp"
        images = [Image.fromarray(picture.astype(np.uint8)) for picture in pictures]
        images[0].save(path, save_all=True, append_images=images[1:], duration=40)
        films.append(path.read_bytes())
    films.append(b"#EXTM3U\n#EXTINF:2,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n")
    films.append(b"ffconcat version 1.0\nfile '/etc/hostname'\n")
    return films


def attack(trials: int, seed: int) -> dict[str, Any]:
    """Run the trials: how many were read and refused, and those that failed."""
    begun = _peak()
    files = originals(seed)
    counts = Counter[str]()
    failed = list[dict[str, Any]]()
    slowest = 0.0
    sampling = FrameSampling("qwen2_vl", min_frames=1, frame_factor=1)
    with tempfile.TemporaryDirectory() as folder:
        for index in range(trials):
            path = Path(folder) / "film"
            path.write_bytes(trial(files, seed, index) or b"\0")
            start = time.process_time()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    video = read_video(path, sampling, limits=LIMITS)
                assert video.frames.nbytes <= LIMITS.film_bytes
                assert np.isfinite(video.times).all()
                assert np.all(np.diff(video.indices) >= 0)
                assert 0 < video.duration < float("inf")
                counts["read"] += 1
            except VideoError as error:
                counts["refused"] += 1
                if not str(error).isprintable():
                    failed.append({"trial": index, "error": f"not printable: {error!r}"})
            except Exception as error:  # any other is what the attack looks for
                failed.append({"trial": index, "error": f"{type(error).__name__}: {error}"})
            spent = time.process_time() - start
            slowest = max(slowest, spent)
            if spent > SECONDS:
                failed.append({"trial": index, "error": f"took {spent:.1f} seconds of the processor"})
    peak = _peak()
    if peak - begun > MEMORY:
        failed.append({"trial": None, "error": f"{peak - begun} bytes of memory, the limit is {MEMORY}"})
    return {
        "attack": "films", "seed": seed, "trials": trials, **counts, "failed": failed, "slowest_s": slowest,
        "peak_mb": peak >> 20,
    }  # fmt: skip


def _peak() -> int:
    """Bytes resident at most since this process began, whatever it did before."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    run_alone(__doc__, attack)
