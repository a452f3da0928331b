"""Decoding in a child gives what decoding here gives, and a decoder that misbehaves costs its request alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import framefusion.runtime.families  # noqa: F401  (a job is made anew in a child that has imported this module alone)
from framefusion.errors import RequestError, VideoError
from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.sources import as_image, as_video
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.server.media import decoding
from framefusion.runtime.server.media.child import DecodingJob
from framefusion.runtime.server.media.decoding import decode_apart
from framefusion.runtime.server.media.policy import MediaPolicy
from framefusion.runtime.server.media.reader import MediaReader, frame_sampling, frame_times
from framefusion.runtime.server.protocol.parts import MediaPart, Sampling
from framefusion.runtime.text.prompt import Visual
from tests.films import write_film, write_picture
from tests.patience import FOREVER, PATIENCE
from tests.wheel import ROOT

SAMPLING = FrameSampling("qwen2_vl")


def job(*paths: Path, film: bool = True, of_frames: bool = False, **changes: Any) -> DecodingJob:
    plain = DecodingJob(
        paths, film, of_frames, "the film", SAMPLING, None, MediaLimits(), None, memory=1 << 30, cpu_seconds=20
    )
    return replace(plain, **changes)


def decode(wanted: DecodingJob, seconds: float = PATIENCE, cancelled: Callable[[], bool] = lambda: False) -> Any:
    return decode_apart(wanted, seconds, cancelled).media


@pytest.mark.slow
def test_a_film_is_the_same_as_here(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", frames=24)
    here = as_video(path, SAMPLING)
    apart = decode(job(path))
    assert isinstance(apart, Video)
    for name in ("frames", "indices", "times", "moments"):
        np.testing.assert_array_equal(getattr(apart, name), getattr(here, name))
    for name in ("fps", "total_frames", "duration", "lost_frames", "counted_frames"):
        assert getattr(apart, name) == getattr(here, name)


@pytest.mark.slow
def test_a_picture_and_a_film_of_pictures(tmp_path: Path) -> None:
    paths = [write_picture(tmp_path / f"{number}.png") for number in range(3)]
    np.testing.assert_array_equal(decode(job(paths[0], film=False)), as_image(paths[0]))
    film = decode(job(*paths, of_frames=True, times=(0.0, 1.0, 3.0)))
    assert film.frames.shape == (3, 64, 64, 3)
    assert film.times.tolist() == [0.0, 1.0, 3.0]


@pytest.mark.slow
def test_what_cannot_be_decoded_is_said_by_the_clients_name(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(b"no film at all" * 100)
    with pytest.raises(VideoError, match="the film") as refused:
        decode(job(path))
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="a process's memory is limited on Linux alone")
def test_memory_is_limited(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "large.png"
    Image.new("RGB", (9000, 9000)).save(path)  # 243 MB of pixels in a small file
    decode(job(path, film=False, memory=2 << 30))
    with pytest.raises(VideoError, match="the film"):
        decode(job(path, film=False, memory=64 << 20))


@pytest.mark.slow
def test_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decode_in_child", stalls)
    with pytest.raises(VideoError, match="not decoded in time"):
        decode(job(tmp_path / "x"), seconds=0.0)
    with pytest.raises(RequestError, match="not wanted any more"):
        decode(job(tmp_path / "x"), cancelled=lambda: True)


MANY_CORES = """
#define _GNU_SOURCE
#include <sched.h>
#include <string.h>
int sched_getaffinity(pid_t process, size_t size, cpu_set_t *cores) {
    memset(cores, 0, size);
    for (int core = 0; core < 64; core++) CPU_SET_S(core, size, cores);
    return 0;
}
"""
DECODE = """
import os
import sys
from pathlib import Path
from tests.runtime.server.media.test_decoding import decode, job
if __name__ == "__main__":
    print(len(os.sched_getaffinity(0)), len(decode(job(Path(sys.argv[1]))).frames))
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc") or sys.platform != "linux", reason="needs Linux and a C compiler as cc")
def test_threads_of_a_large_machine_leave_room_for_the_film(tmp_path: Path) -> None:
    """FFmpeg starts one a core, and each takes of the address space that a child is limited to."""
    source, library, script = (tmp_path / name for name in ("cores.c", "cores.so", "decode.py"))
    source.write_text(MANY_CORES)
    script.write_text(DECODE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    film = write_film(tmp_path / "film.mp4", frames=24, size=256)
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(film)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.stdout, done.returncode) == ("64 12\n", 0), done.stderr


# --- A child under somebody else's control ---------------------------------------------------------------------------


def dies(pipe: Connection, _: DecodingJob) -> None:
    os._exit(3)


def lies(pipe: Connection, given: DecodingJob) -> None:
    pipe.send_bytes(given.name.encode())
    time.sleep(FOREVER)


@pytest.mark.slow
@pytest.mark.parametrize(
    "facts",
    [
        [],
        {"kind": "image", "warnings": [], "arrays": [{"shape": [1 << 40, 3], "dtype": "uint8"}]},
        {"kind": "image", "warnings": [], "arrays": [{"shape": [-1, 4, 3], "dtype": "uint8"}]},
        {"kind": "image", "warnings": [], "arrays": [{"shape": [1, 1, 3], "dtype": "object"}]},
        {"kind": "image", "warnings": [], "arrays": []},
        {"kind": "video", "warnings": [], "arrays": [], "sampled": False},
        {"kind": "video", "warnings": 3, "arrays": []},
        {"arrays": []},
    ],
)
def test_nothing_is_believed(facts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decoding, "decode_in_child", lies)
    start = time.monotonic()
    with pytest.raises(VideoError):
        decode(job(tmp_path / "x", name=json.dumps(facts)))
    assert time.monotonic() - start < PATIENCE  # it did not wait for the bytes of an impossible array


@pytest.mark.slow
def test_a_decoder_that_dies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decoding, "decode_in_child", dies)
    with pytest.raises(VideoError, match=r"its decoder ended \(3\)"):
        decode(job(tmp_path / "x"))
    assert multiprocessing.active_children() == []


def stalls(pipe: Connection, _: DecodingJob) -> None:
    os.write(pipe.fileno(), b"\0\0\0\x10{")  # the head of 16 bytes, and one of them
    time.sleep(FOREVER)


@pytest.mark.slow
def test_a_decoder_that_begins_to_send_and_stops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decoding, "decode_in_child", stalls)
    start = time.monotonic()
    with pytest.raises(VideoError):
        decode(job(tmp_path / "x"), seconds=2)
    assert time.monotonic() - start < PATIENCE
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_small_files_that_are_large_pictures_together(tmp_path: Path) -> None:
    from PIL import Image

    parts = []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (1000, 1000)).save(path)  # 3 MB of pixels each
        parts.append(MediaPart(Visual.IMAGE, (path.as_uri(),), path.name))
    policy = MediaPolicy(local_folder=tmp_path)
    for most in (12_000_000, 11_999_999):
        reader = MediaReader(policy, QwenVLPreprocessing(), SAMPLING, request_bytes=most)
        opened = reader.open(parts, tmp_path, lambda: False)
        if most == 12_000_000:
            assert len(reader.decode(opened, 4, lambda: False)) == 4
        else:
            with pytest.raises(RequestError, match="11999999 bytes of pixels"):
                reader.decode(opened, 4, lambda: False)
        reader.close()


def test_frames_that_a_client_chose_of_a_film_that_it_did_not() -> None:
    part = MediaPart(Visual.VIDEO, ("data:video/mp4;base64,AAAA",), "the film", Sampling(fps=1, frames_indices=(0, 9)))
    with pytest.raises(RequestError, match="frames_indices"):
        frame_times(part)


@pytest.mark.parametrize(("wanted", "count"), [(5, 5), (2, 2), (1, 2)])
def test_a_number_of_frames_is_that_of_the_commands(wanted: int, count: int) -> None:
    """But for fewer than the model takes at once: a client of another server means the fewest then."""
    part = MediaPart(Visual.VIDEO, ("file:///x.mp4",), "the film", Sampling(num_frames=wanted))
    assert frame_sampling(SAMPLING, part) == SAMPLING.spread(count)


@pytest.mark.slow
def test_what_children_are_copies_of_may_be_killed(tmp_path: Path) -> None:
    from multiprocessing import forkserver

    path = write_picture(tmp_path / "picture.png")
    decode(job(path, film=False))
    number = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    if number is None:
        pytest.skip("children are no copies here")
    os.kill(number, signal.SIGKILL)
    decode(job(path, film=False))
