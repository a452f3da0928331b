"""A film in parts is the film, and a child that lies about its parts, dies or hangs between them leaves nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import framefusion.runtime.families  # noqa: F401  (a job is made anew in a child that has imported this module alone)
from framefusion.errors import RequestError, VideoError
from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.sources import as_video
from framefusion.runtime.server.media import decoding
from framefusion.runtime.server.media.child import DecodingJob
from framefusion.runtime.server.media.decoding import Decoded, decode_apart
from framefusion.runtime.server.media.transfer import FilmReceiver, FrameSender
from tests.films import write_film
from tests.patience import FOREVER, PATIENCE

SAMPLING = FrameSampling("qwen2_vl")
PART = {"part": [0, 2], "of": 4, "size": [8, 8], "pictures": [[8, 8]]}
NEXT = PART | {"part": [2, 4]}
FACTS = {"kind": "video", "sent": True, "arrays": []}
PIXELS = 8 * 8 * 3  # bytes of a frame


class Follower:
    """Takes a copy of what it is shown, when it is shown."""

    def __init__(self) -> None:
        self.shown: list[NDArray[np.uint8]] = []
        self.is_over = False

    def begin(self) -> None:
        assert self.shown  # of the first time alone the child knows
        self.is_over = True

    def add(self, kept: tuple[NDArray[np.uint8], ...], size: tuple[int, int], ready: int) -> None:
        self.shown.append(kept[0][:ready].copy())


def job(path: Path, name: str = "the film") -> DecodingJob:
    shrink = QwenVLPreprocessing().shrink
    return DecodingJob((path,), True, False, name, SAMPLING, None, MediaLimits(), shrink, 1 << 30, 20)


def decode(
    wanted: DecodingJob, follower: Any, seconds: float = PATIENCE, cancelled: Callable[[], bool] = lambda: False
) -> Decoded:
    return decode_apart(wanted, seconds, cancelled, follower)


@pytest.mark.slow
def test_a_film_in_parts_is_the_film(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", frames=24, size=256)
    here = as_video(path, SAMPLING, shrink=QwenVLPreprocessing().shrink)
    follower = Follower()
    film = decode(job(path), follower).media
    assert len(follower.shown) > 2
    for shown in follower.shown:  # no frame that was shown is another one later
        np.testing.assert_array_equal(shown, here.shrunk[0][: len(shown)])
    assert len(follower.shown[-1]) == len(here.indices)
    assert not isinstance(film, np.ndarray)
    assert film.frames.shape == here.frames.shape
    for name in ("indices", "times", "moments"):
        np.testing.assert_array_equal(getattr(film, name), getattr(here, name))
    np.testing.assert_array_equal(film.shrunk, here.shrunk)


def test_frames_that_are_picked_anew_are_sent_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The film is what came last, and nothing is sent of what the packets lied about."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    film = np.full((4, 300, 300, 3), 7, np.uint8)
    sender = FrameSender(theirs)
    follower = Follower()
    receiver = FilmReceiver(ours, MediaLimits(), follower)
    sender.begin()  # a collector begins with no frame at all
    sender.begin()
    messages: list[Any] = []
    monkeypatch.setattr(theirs, "send_bytes", messages.append)
    sender.add((film[:0],), (300, 300), 0)
    sender.add((film,), (300, 300), 4)
    assert (sender.has_sent(4), len(messages)) == (True, 3)  # a line, and two blocks
    sender.begin()
    sender.add((film,), (300, 300), 4)
    assert (sender.has_sent(4), len(messages)) == (False, 3)
    monkeypatch.undo()
    theirs.send_bytes(json.dumps(PART).encode())
    theirs.send_bytes(bytes(2 * PIXELS))
    theirs.send_bytes(b'{"sent": false}')
    assert receiver.facts() == {"sent": False}
    assert (len(follower.shown), receiver.kept) == (1, ())
    assert follower.is_over  # and holds nothing of them


def test_a_film_picked_anew_has_the_room_of_its_parts() -> None:
    """Both together would be beyond the limits."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    whole = 100 << 20
    limits = MediaLimits(film_bytes=whole, image_pixels=1)
    receiver = FilmReceiver(ours, limits, Follower())
    theirs.send_bytes(json.dumps(PART | {"of": whole // PIXELS}).encode())
    theirs.send_bytes(bytes(2 * PIXELS))
    theirs.send_bytes(b'{"sent": false}')
    receiver.facts()
    theirs.send_bytes(b"x")  # memory was taken for more
    with pytest.raises(ValueError, match="shorter than it was said to be"):
        receiver.array({"shape": [whole], "dtype": "uint8"})


# --- A child under somebody else's control ---------------------------------------------------------------------------


def says(pipe: Connection, given: DecodingJob) -> None:
    """Send what the job's name holds, lines and numbers of bytes, and do what stands at its end."""
    for message in json.loads(given.name):
        if isinstance(message, int):
            pipe.send_bytes(bytes(message))
        elif message == "dies":
            os._exit(3)
        elif message == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif message == "half a block":
            os.write(pipe.fileno(), b"\0\0\1\0half")
        elif message == "claims a gigabyte":
            os.write(pipe.fileno(), b"\x40\0\0\0" + bytes(1 << 16))
        else:
            pipe.send_bytes(json.dumps(message).encode())
    time.sleep(FOREVER)


def job_that_says(*messages: Any) -> DecodingJob:
    return job(Path("x"), json.dumps(messages))


@pytest.mark.slow
@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([PART | {"part": [0, 5]}], id="more frames than the film has"),
        pytest.param([PART | {"part": [1, 2]}], id="not from the beginning"),
        pytest.param([PART | {"part": [0, 0]}], id="no frame"),
        pytest.param([PART | {"part": [0, -1]}], id="fewer than none"),
        pytest.param([PART, 2 * PIXELS, PART], id="a part again"),
        pytest.param([PART, 2 * PIXELS, NEXT | {"part": [3, 4]}], id="a gap"),
        pytest.param([PART, 2 * PIXELS, NEXT | {"of": 8}], id="a film that grows"),
        pytest.param([PART, 2 * PIXELS, NEXT | {"pictures": [[4, 8]]}], id="pictures that change"),
        pytest.param([PART, 2 * PIXELS, NEXT | {"size": [8, 9]}], id="frames that change"),
        pytest.param([PART | {"of": 1 << 40}], id="a film beyond the limits"),
        pytest.param([PART | {"pictures": [[8, 8]] * 9999, "of": 1 << 20}], id="many pictures beyond the limits"),
        pytest.param([PART | {"size": [1 << 20, 1 << 20]}], id="a frame beyond the limits"),
        pytest.param([PART | {"size": [-8, -8]}], id="a frame of less than nothing"),
        pytest.param([PART | {"pictures": [[-8, -8]]}], id="a picture of less than nothing"),
        pytest.param([PART | {"pictures": [[0, 8]]}], id="a picture of nothing"),
        pytest.param([PART | {"pictures": []}], id="no picture"),
        pytest.param([{"part": 3}], id="half a line"),
        pytest.param([PART | {"part": ["a", 2]}], id="a word for a number"),
        pytest.param([PART, PIXELS], id="fewer bytes than frames"),
        pytest.param([PART, 3 * PIXELS], id="more bytes than frames"),
        pytest.param([PART, "claims a gigabyte"], id="a gigabyte of bytes"),
        pytest.param([PART, 2 * PIXELS, FACTS], id="half a film as all"),
        pytest.param([FACTS], id="nothing as all"),
        pytest.param([PART, 2 * PIXELS, NEXT, 2 * PIXELS, FACTS | {"kind": "image"}], id="a film as a picture"),
        pytest.param([["part"]], id="a list"),
        pytest.param(["part"], id="a text"),
    ],
)  # fmt: skip
def test_nothing_is_believed(messages: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decode_in_child", says)
    follower = Follower()
    start = time.monotonic()
    with pytest.raises(VideoError, match="was decoded into something else"):
        decode(job_that_says(*messages), follower)
    assert time.monotonic() - start < PATIENCE  # it did not wait for the child's end
    assert multiprocessing.active_children() == []
    assert all(len(shown) == 2 or messages[2] == NEXT for shown in follower.shown)


@pytest.mark.slow
def test_parts_that_nobody_wanted_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decode_in_child", says)
    with pytest.raises(VideoError, match=r"something else \(ValueError\)"):
        decode(job_that_says(PART, 2 * PIXELS), None)


def test_all_arrays_together_are_limited() -> None:
    """Each of them alone is within the limits."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    receiver = FilmReceiver(ours, MediaLimits(film_bytes=1000, image_pixels=1), None)
    about = {"shape": [1 << 20], "dtype": "uint8"}
    for _ in range(64):
        theirs.send_bytes(b"x")  # memory was taken for more
        with pytest.raises(ValueError, match="shorter than it was said to be"):
            receiver.array(about)
    with pytest.raises(ValueError, match="an array of shape"):
        receiver.array(about)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "problem"),
    [
        ("dies", r"its decoder ended \(3\)"),
        ("is killed", "took more than 20 s of processor time"),
        ("half a block", "was not decoded in time"),
        ("hangs", "was not decoded in time"),
    ],
)
@pytest.mark.parametrize("sent", [[PART, 2 * PIXELS], [PART]], ids=["between parts", "within a part"])
def test_a_child_that_ends_halfway_gives_its_named_error(
    sent: list[Any], end: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "decode_in_child", says)
    messages = [*sent, end] if end != "hangs" else sent
    seconds = 1.0 if "in time" in problem else PATIENCE
    with pytest.raises(VideoError, match=problem):
        decode(job_that_says(*messages), Follower(), seconds)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize("sent", [[PART, 2 * PIXELS], [PART], [PART, "half a block"]])
def test_who_leaves_halfway_ends_the_child(sent: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, whatever it is doing."""
    monkeypatch.setattr(decoding, "decode_in_child", says)
    start = time.monotonic()
    with pytest.raises(RequestError, match="is not wanted any more"):
        decode(job_that_says(*sent), Follower(), cancelled=lambda: time.monotonic() > start + 0.5)
    assert time.monotonic() - start < PATIENCE
    assert multiprocessing.active_children() == []
