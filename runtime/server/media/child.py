"""Decoding one film or picture in a process of its own, which may take so much memory and processor time and no more.

What comes back is a line of JSON and the bytes of arrays: nothing that a decoder under foreign control could make the
server execute. Runs in the child; knows no network.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import framefusion.runtime.families  # noqa: F401  (rules of frames are known once it is imported)
from framefusion.errors import FrameFusionError, VideoError
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.sources import as_image, as_video, video_of_frames
from framefusion.runtime.media.video.frames import Shrink, Video
from framefusion.runtime.server.media.transfer import FrameSender, send_array, send_line

ARRAYS = ("frames", "indices", "timestamps", "moments")
"""Of a film, in the order in which they are sent; behind them what its frames were shrunk to."""
MOST_WARNINGS = 16
MOST_CHARACTERS = 1000
"""Of what is said about one film, however many of its frames are damaged."""


@dataclass(frozen=True)
class DecodingJob:
    """What a child is to decode.

    Attributes:
        paths: of the file, or of all frames of a film of pictures.
        film: it is shown as one.
        of_frames: the paths are pictures.
        name: what messages call it.
        sampling: of a film's frames; those of pictures stand at its rate.
        times: [n] seconds of the frames of a film of pictures, instead of a rate.
        limits: of what is read.
        shrink: what is kept of a film's frame; see `read_video`.
        memory: bytes that the child may take beyond those it begins with.
        cpu_seconds: of processor time.
        in_parts: send a film's frames as they are decoded.
    """

    paths: tuple[Path, ...]
    film: bool
    of_frames: bool
    name: str
    sampling: FrameSampling
    times: tuple[float, ...] | None
    limits: MediaLimits
    shrink: Shrink | None
    memory: int
    cpu_seconds: float
    in_parts: bool = False


def decode_in_child(pipe: Connection, job: DecodingJob) -> None:
    """The whole life of the child: take the limits, decode, send, end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which first ends what runs
    limit_process(job.memory, job.cpu_seconds)
    arrays: list[NDArray[Any]] = []
    sender = FrameSender(pipe) if job.in_parts else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            facts, arrays = _decoded(job, sender)
        except FrameFusionError as error:
            facts = {"error": _named(str(error), job)}
        except MemoryError:
            facts = {"error": f"{job.name} needs more than {job.memory} bytes to be decoded: send a smaller one"}
    said = dict.fromkeys(_named(str(warning.message), job)[:MOST_CHARACTERS] for warning in caught)
    facts["warnings"] = list(said)[:MOST_WARNINGS]
    facts["arrays"] = [{"shape": array.shape, "dtype": array.dtype.name} for array in arrays]
    with suppress(BrokenPipeError):  # nobody waits any more
        send_line(pipe, facts)
        for array in arrays:
            send_array(pipe, array)
    pipe.close()


def _decoded(job: DecodingJob, sender: FrameSender | None) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """Facts and arrays of a film or a picture, those left out that were sent."""
    if not job.film:
        return {"kind": "image"}, [as_image(job.paths[0], job.limits)]
    if job.of_frames:
        pictures = [as_image(path, job.limits) for path in job.paths]
        if job.times is None:
            film = video_of_frames(pictures, job.sampling.fps, job.limits)
        else:
            film = video_of_frames(pictures, limits=job.limits, times=job.times)
    else:
        film = as_video(job.paths[0], job.sampling, job.limits, job.shrink, sender)
    arrays = _arrays(film)
    is_sent = sender is not None and sender.has_sent(len(film.indices))
    return _facts(film) | {"sent": is_sent}, arrays[: len(ARRAYS)] if is_sent else arrays


def _facts(film: Video) -> dict[str, Any]:
    names = ("fps", "total_frames", "duration", "seconds", "lost_frames")
    return {"kind": "video", "sampled": film.sampled is not None} | {name: getattr(film, name) for name in names}


def _arrays(film: Video) -> list[NDArray[Any]]:
    times: Sequence[NDArray[Any]] = (np.zeros(0), np.zeros(0))
    if film.sampled is not None:
        times = (film.sampled.timestamps, film.sampled.moments)
    return [film.frames, film.indices, *times, *film.shrunk]


def _named(text: str, job: DecodingJob) -> str:
    """A message as the client may read it: by the name of the field, and without a path of this machine."""
    for path in job.paths:
        text = text.replace(str(path), job.name)
    return text


def limit_process(memory: int, cpu_seconds: float) -> None:
    """Take limits that this process cannot lift again. Where the system has none, the parent's clock is the limit."""
    try:
        import resource
    except ImportError:  # Windows
        return
    with suppress(OSError):  # a process that cannot raise its niceness works all the same
        os.nice(5)
    begun = 0
    with suppress(OSError):  # not on every system
        begun = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    wanted = {
        resource.RLIMIT_AS: begun + memory,
        resource.RLIMIT_CPU: int(cpu_seconds) + 1,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for kind, limit in wanted.items():
        _, most = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            limit = min(limit, most)
        with suppress(ValueError, OSError):  # macOS refuses some of them
            resource.setrlimit(kind, (limit, limit))


def check_film(facts: dict[str, Any]) -> None:
    """Refuse facts that no decoder of ours sends.

    Raises:
        VideoError: they are not as `_facts` makes them.
    """
    whole = all(isinstance(facts.get(name), int) and facts[name] >= 0 for name in ("total_frames", "lost_frames"))
    numbers = all(isinstance(facts.get(name), (int, float)) for name in ("fps", "duration", "seconds"))
    if not whole or not numbers:
        raise VideoError("a film was decoded into something else: send another")
