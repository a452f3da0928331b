"""Decoding apart from the server: a child for each film or picture, watched, and its results taken with care.

    file --> child with limits (child.py) --> line of JSON, bytes --> checked against the limits --> Video or picture

A decoder that dies, hangs or takes too much is the end of its child, and an error of the request.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from threading import Timer
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import RequestError, VideoError
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.video.timeline import Sampled
from framefusion.runtime.server.media.child import ARRAYS, DecodingJob, check_film, decode_in_child

MEMORY = 2 << 30
CPU_SECONDS = 120.0
SERVER_LIMITS = MediaLimits(film_bytes=716 << 20, film_seconds=60.0, film_frames=200_000)
"""What a client's film may cost, where the flags say nothing else: less than what a user may show to their own machine.
"""
REQUEST_BYTES = 1 << 30
"""Of all films and pictures of one request together, decoded: many small files may each be large pictures."""
_HEADER = 1 << 20  # bytes of the line of JSON
_STARTS = 40
_LOOK = 0.05  # seconds between two looks at whether anybody waits
_DTYPES = {"uint8": np.uint8, "int64": np.int64, "float64": np.float64}


@dataclass(frozen=True)
class Decoded:
    """A film or picture, and what its decoder warned of."""

    media: Video | NDArray[np.uint8]
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its pixels."""
        arrays = (self.media.frames, *self.media.shrunk) if isinstance(self.media, Video) else (self.media,)
        return sum(array.nbytes for array in arrays)


def decode_apart(job: DecodingJob, seconds: float, cancelled: Callable[[], bool]) -> Decoded:
    """Decode in a child.

    Args:
        job: what, and within which limits.
        seconds: to wait for it.
        cancelled: whether nobody waits any more.

    Raises:
        VideoError: it cannot be decoded, or not within the limits.
        RequestError: it was cancelled.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = _context().Process(target=decode_in_child, args=(theirs, job), daemon=True)
    try:
        _start(process)
    except (OSError, EOFError) as error:
        ours.close()
        raise VideoError(f"{job.name} could not be decoded, no decoder began ({error}): send it again") from error
    finally:
        theirs.close()
    deadline = time.monotonic() + seconds
    stalled = Timer(seconds + _LOOK, process.kill)  # one that has begun to send, and sends no more
    stalled.daemon = True
    stalled.start()
    try:
        facts = _facts(ours, job, deadline, cancelled)
        arrays = [_array(ours, about, job.limits) for about in facts["arrays"]]
        return Decoded(_media(facts, arrays), tuple(map(str, facts["warnings"])))
    except EOFError:
        late = time.monotonic() > deadline  # then we have killed it
        problem = f"{job.name} was not decoded in time: send a shorter or smaller one"
        raise VideoError(problem if late else _death(process, job)) from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError, RecursionError) as error:
        # nothing that our child sends
        raise VideoError(
            f"{job.name} was decoded into something else ({type(error).__name__}): send another"
        ) from error
    finally:
        stalled.cancel()
        stalled.join()  # it may be about to kill, and would kill a process that is no more
        if process.is_alive():
            process.kill()
        process.join()
        process.close()
        ours.close()


def _start(process: BaseProcess) -> None:
    """Start a child; where what children are copies of was killed, it takes a moment until there is another.

    Raises:
        OSError, EOFError: there is none.
    """
    for _ in range(_STARTS - 1):
        with suppress(OSError, EOFError):
            process.start()
            return
        time.sleep(_LOOK)
    process.start()


def start_decoders() -> None:
    """Start what children are forked from, before the server has threads and connections of its own."""
    _context().Process(target=os.getpid, daemon=True).start()


def _context() -> ForkServerContext | SpawnContext:
    """How children begin: as copies of a process that has imported the decoders and nothing else."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([decode_in_child.__module__])
    return context


def _facts(pipe: Connection, job: DecodingJob, deadline: float, cancelled: Callable[[], bool]) -> dict[str, Any]:
    """The line of JSON, once it is there.

    Raises:
        VideoError: it does not come in time, or says what is wrong.
        RequestError: nobody waits any more.
    """
    while not pipe.poll(_LOOK):
        if cancelled():
            raise RequestError(f"{job.name} is not wanted any more", param=job.name)
        if time.monotonic() > deadline:
            raise VideoError(f"{job.name} was not decoded in time: send a shorter or smaller one")
    facts: dict[str, Any] = json.loads(pipe.recv_bytes(_HEADER))
    if "error" in facts:
        raise VideoError(str(facts["error"]))
    return facts


def _array(pipe: Connection, about: dict[str, Any], limits: MediaLimits) -> NDArray[Any]:
    """The next array, if it is one that the limits admit."""
    shape = tuple(int(side) for side in about["shape"])
    dtype = np.dtype(_DTYPES[about["dtype"]])
    count = 1
    for side in shape:
        count *= side
    most = max(limits.film_bytes, 3 * limits.image_pixels)
    if any(side < 0 for side in shape) or len(shape) > 4 or count * dtype.itemsize > most:
        raise ValueError(f"an array of shape {shape}")
    array = np.empty(shape, dtype)
    if array.nbytes and pipe.recv_bytes_into(array.data.cast("B")) != array.nbytes:
        raise ValueError("an array is shorter than it was said to be")
    return array


def _media(facts: dict[str, Any], arrays: list[NDArray[Any]]) -> Video | NDArray[np.uint8]:
    """A film or a picture of its parts, if they fit together."""
    if facts["kind"] == "image":
        (picture,) = arrays
        if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8:
            raise ValueError(f"a picture of shape {picture.shape}")
        return picture
    check_film(facts)
    named = dict(zip(ARRAYS, arrays, strict=False))
    shrunk = tuple(arrays[len(ARRAYS) :])
    count = named["indices"].size
    pixels = (named["frames"], *shrunk)
    if not count or any(array.ndim != 4 or len(array) != count or array.dtype != np.uint8 for array in pixels):
        raise ValueError(f"a film of {count} frames")
    sampled = None
    if facts["sampled"]:
        sampled = Sampled(named["indices"], named["timestamps"], named["moments"])
        if not sampled.timestamps.size == sampled.moments.size == count:
            raise ValueError(f"times of {count} frames")
    film = Video(
        named["frames"],
        named["indices"],
        facts["fps"],
        facts["total_frames"],
        facts["duration"],
        facts["seconds"],
        sampled,
        shrunk,
    )
    return replace(film, lost_frames=facts["lost_frames"])


def _death(process: BaseProcess, job: DecodingJob) -> str:
    """Why a child is gone that sent nothing."""
    process.join(1)
    code = process.exitcode
    if code is not None and code < 0 and -code in (24, 9):  # SIGXCPU, SIGKILL
        return f"{job.name} took more than {job.cpu_seconds:g} s of processor time: send a shorter or smaller one"
    return (
        f"{job.name} could not be decoded, its decoder ended ({code}) with more than {job.memory} bytes or a fault: "
        "send a smaller one, or encode it anew"
    )
