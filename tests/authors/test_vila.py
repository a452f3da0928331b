"""NVILA beside its authors' repository: which frames, and what HEAD makes of a film."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL
import PIL.Image
import pytest

from framefusion.runtime.media.frame_sampling import FrameSampling, sample_indices
from tests.authors.repositories import VILA

VILA.required()
MEDIA = "llava/utils/media.py"


class Capture:
    """A film by its number of frames and rate, as OpenCV shows it: each frame says its number."""

    def __init__(self, total: int, rate: float) -> None:
        self.total = total
        self.rate = rate
        self.at = 0

    def get(self, key: str) -> float:
        return self.rate if key == "rate" else self.total

    def set(self, _: str, index: float) -> None:
        self.at = int(index)

    def grab(self) -> bool:
        return self.at < self.total

    def read(self) -> tuple[bool, Any]:
        return self.at < self.total, np.full((1, 1, 3), [self.at % 256, self.at // 256, 0], np.uint8)


@pytest.mark.parametrize(("count", "fps"), [(8, 0.0), (32, 0.0), (8, 2.0), (256, 1.5)])
@pytest.mark.parametrize("total", [8, 31, 100, 751, 4000])
def test_the_same_frames(total: int, count: int, fps: float) -> None:
    reader: Any = SimpleNamespace(
        VideoCapture=lambda _: Capture(total, 25.0),
        CAP_PROP_FPS="rate", CAP_PROP_FRAME_COUNT="count", CAP_PROP_POS_FRAMES="at", COLOR_BGR2RGB=0,
        cvtColor=lambda frame, _: frame,
    )  # fmt: skip
    quiet = SimpleNamespace(info=lambda _: None, warning=lambda _: None)
    needed = {"cv2": reader, "np": np, "PIL": PIL, "os": __import__("os"), "logger": quiet, "glob": None}
    code = VILA.functions(MEDIA, ("_load_video",), needed)
    shown = code["_load_video"]("film.mp4", num_frames=count, fps=fps)
    frames = [int(pixel[0]) + 256 * int(pixel[1]) for pixel in (frame.getpixel((0, 0)) for frame in shown)]
    sampling = FrameSampling("nvila", fps=fps or 1.0, min_frames=1, max_frames=count, frame_factor=1, force=not fps)
    assert sample_indices(total, 25.0, sampling).tolist() == frames


def test_head_sends_a_film_as_images() -> None:
    """Said in docs/families.md: this project follows the video route, which the published figures were made with."""
    film = type("Film", (), {})
    needed = {
        "defaultdict": defaultdict, "Image": type("Still", (), {}), "Video": film, "PIL": PIL, "logger": None,
        "MEDIA_TOKENS": {"image": "<image>", "video": "<vila/video>"}, "make_list": lambda value: value,
        "_extract_video": lambda *_: [0, 1, 2], "_extract_image": None,
    }  # fmt: skip
    code = VILA.functions(MEDIA, ("extract_media",), needed)
    message: dict[str, Any] = {"value": [film(), "What?"]}
    media = code["extract_media"]([message], SimpleNamespace(num_video_frames=3))
    assert dict(media) == {"image": [0, 1, 2]}
    assert message["value"] == "<image>" * 3 + "What?"
