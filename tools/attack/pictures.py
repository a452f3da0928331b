"""Mutated still pictures: each ends in pixels or in a VideoError, soon, and within the memory of the limits.

    python -m tools.attack.pictures --trials 2000 --seed 0

Prints one JSON object; exit code 1 where a trial failed. A trial is known by its seed and number.
"""

from __future__ import annotations

import io
import resource
import struct
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from framefusion.errors import VideoError
from framefusion.runtime.media.image.file import FORMATS, decode_image
from framefusion.runtime.media.media_file import MediaLimits
from tools.attack.alone import run_alone

SECONDS = 60.0
"""Of the processor, of one trial; the target of the whole attack."""
LIMITS = MediaLimits(image_pixels=1 << 22)
LARGEST = 4 << 20
"""Bytes that a mutation adds, at most."""
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def originals(seed: int) -> list[bytes]:
    """A small picture in every format and in the modes that have readers of their own."""
    random = np.random.default_rng(seed)
    colours = Image.fromarray(random.integers(0, 256, (40, 56, 3), np.uint8))
    clear = colours.convert("RGBA")
    clear.putalpha(colours.convert("L"))
    grey = Image.fromarray(random.integers(0, 65536, (40, 56), np.uint16))
    floats = Image.fromarray(random.random((40, 56), np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.init()
    known = [kind for kind in FORMATS if kind in Image.SAVE]
    wanted: list[tuple[Image.Image, str, dict[str, Any]]] = [(colours, kind, {}) for kind in known]
    wanted += [(colours, "JPEG", {"progressive": True, "exif": exif}), (colours.convert("CMYK"), "JPEG", {})]
    wanted += [(clear, kind, {"exif": exif}) for kind in ("PNG", "WEBP", "TIFF")]
    wanted += [(grey, kind, {}) for kind in ("PNG", "TIFF", "PPM")] + [(floats, "TIFF", {})]
    wanted += [(colours, "TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")]
    wanted += [(colours.convert("P"), kind, {"transparency": 3}) for kind in ("PNG", "GIF")]
    frames = [colours, clear.convert("RGB"), colours.rotate(90)]
    wanted += [
        (colours, kind, {"save_all": True, "append_images": frames, "duration": 40}) for kind in ("GIF", "WEBP", "PNG")
    ]
    files = []
    for image, kind, options in wanted:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def flip(file: bytearray, random: np.random.Generator, _: bytes) -> bytearray:
    """Some bytes become others."""
    for at in random.integers(0, len(file), random.choice([1, 3, 30])).tolist():
        file[at] = int(random.integers(256))
    return file


def cut(file: bytearray, random: np.random.Generator, _: bytes) -> bytearray:
    """The end is missing."""
    return file[: int(random.integers(1, len(file)))]


def number(file: bytearray, random: np.random.Generator, _: bytes) -> bytearray:
    """A number near the head, where sizes stand, becomes an extreme one."""
    at = int(random.integers(0, min(len(file), 200)))
    form = str(random.choice(["<H", ">H", "<I", ">I"]))
    value = int(random.choice(NUMBERS)) & ((1 << 8 * struct.calcsize(form)) - 1)
    file[at : at + struct.calcsize(form)] = struct.pack(form, value)
    return file


def repeat(file: bytearray, random: np.random.Generator, _: bytes) -> bytearray:
    """A piece stands there many times."""
    start, end = sorted(map(int, random.integers(0, len(file), 2)))
    times = min(int(random.choice([1, 10, 300])), LARGEST // max(end - start, 1))
    return file[:end] + file[start:end] * times + file[end:]


def remove(file: bytearray, random: np.random.Generator, _: bytes) -> bytearray:
    """A piece is missing."""
    start, end = sorted(map(int, random.integers(0, len(file), 2)))
    return file[:start] + file[end:]


def splice(file: bytearray, random: np.random.Generator, other: bytes) -> bytearray:
    """The head of one file, the tail of another."""
    tail = other[int(random.integers(0, len(other))) :]
    return file[: int(random.integers(1, len(file)))] + tail


MUTATIONS: tuple[Callable[[bytearray, np.random.Generator, bytes], bytearray], ...] = (
    flip, cut, number, repeat, remove, splice,
)  # fmt: skip


def trial(files: list[bytes], seed: int, index: int) -> bytes:
    """The file of one trial."""
    random = np.random.default_rng((seed, index))
    file = bytearray(files[int(random.integers(len(files)))])
    for _ in range(int(random.integers(1, 4))):
        if file:
            file = MUTATIONS[int(random.integers(len(MUTATIONS)))](
                file, random, files[int(random.integers(len(files)))]
            )
    return bytes(file)


def attack(trials: int, seed: int) -> dict[str, Any]:
    """Run the trials: how many were read and refused, and those that failed."""
    files = originals(seed)
    counts = Counter[str]()
    failed = list[dict[str, Any]]()
    slowest = 0.0
    for index in range(trials):
        file = trial(files, seed, index)
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels = decode_image(file, "picture", LIMITS)
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.size <= 3 * LIMITS.image_pixels
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {
        "attack": "pictures", "seed": seed, "trials": trials, **counts, "failed": failed, "slowest_s": slowest,
        "peak_mb": peak,
    }  # fmt: skip


if __name__ == "__main__":
    run_alone(__doc__, attack)
