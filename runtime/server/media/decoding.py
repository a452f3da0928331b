"""Decoding apart from the server: a child for each film or picture, watched, and its results taken with care.

    file --> child with limits (child.py) --> lines of JSON, bytes --> checked against the limits --> Video or picture
                                              (transfer.py)             (frames as they come --> whoever follows)

A decoder that dies, hangs or takes too much is the end of its child, and an error of the request.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from threading import Event, Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import RequestError, VideoError
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.video.frames import FrameFollower, Video
from framefusion.runtime.media.video.timeline import Sampled
from framefusion.runtime.server.media.child import ARRAYS, DecodingJob, check_film, decode_in_child
from framefusion.runtime.server.media.transfer import FilmReceiver

MEMORY = 2 << 30
CPU_SECONDS = 120.0
SERVER_LIMITS = MediaLimits(film_bytes=716 << 20, film_seconds=60.0, film_frames=200_000)
"""What a client's film may cost, where the flags say nothing else: less than what a user may show to their own machine.
"""
REQUEST_BYTES = 1 << 30
"""Of all films and pictures of one request together, decoded: many small files may each be large pictures."""
_SENT_WRONGLY = (
    EOFError, OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
_STARTS = 40
_LOOK = 0.05  # seconds between two looks at whether anybody waits
_GONE = 10.0  # until one that has closed its pipe counts as running, on a machine with much to do


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


def decode_apart(
    job: DecodingJob, seconds: float, cancelled: Callable[[], bool], follower: FrameFollower | None = None
) -> Decoded:
    """Decode in a child.

    Args:
        job: what, and within which limits.
        seconds: to wait for it.
        cancelled: whether nobody waits any more.
        follower: learns of a film's frames as they come, where they are shrunk; only of those that were checked.

    Raises:
        VideoError: it cannot be decoded, or not within the limits.
        RequestError: it was cancelled.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    job = replace(job, in_parts=follower is not None)
    process = _context().Process(target=decode_in_child, args=(theirs, job), daemon=True)
    try:
        _start(process)
    except (OSError, EOFError) as error:
        ours.close()
        raise VideoError(f"{job.name} could not be decoded, no decoder began ({error}): send it again") from error
    finally:
        theirs.close()
    watch = _Watch(process, seconds, cancelled)
    try:
        receiver = FilmReceiver(ours, job.limits, follower)
        facts = receiver.facts()
        if "error" in facts:
            raise VideoError(str(facts["error"]))
        arrays = [receiver.array(about) for about in facts["arrays"]]
        return Decoded(_media(facts, [*arrays, *receiver.kept]), tuple(map(str, facts["warnings"])))
    except _SENT_WRONGLY as error:
        if isinstance(error, (EOFError, OSError)) and not ours.closed:  # which a length out of all bounds closes
            watch.join(_GONE)
        watch.end()
        raise _failure(error, process, watch, job) from error
    finally:
        watch.end()
        if process.is_alive():
            process.kill()
        process.join()
        process.close()
        ours.close()


class _Watch:
    """Ends a child that nobody waits for any more, or not so long, whatever it does: it may have sent half a line.

    Args:
        process: the child.
        seconds: that it has.
        cancelled: whether nobody waits any more.

    Attributes:
        is_cancelled: it was ended because nobody waits.
        is_late: because its time was up.
    """

    def __init__(self, process: BaseProcess, seconds: float, cancelled: Callable[[], bool]) -> None:
        self.is_cancelled = False
        self.is_late = False
        self._process = process
        self._deadline = time.monotonic() + seconds
        self._cancelled = cancelled
        self._ended = Event()
        self._thread = Thread(target=self._look, name="decoder-watch", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(_LOOK):
            self.is_cancelled = self._cancelled()
            self.is_late = not self.is_cancelled and time.monotonic() > self._deadline
            if self.is_cancelled or self.is_late:
                self._process.kill()
                return

    def join(self, seconds: float) -> None:
        """Wait for the end of a child that has closed its pipe, and look at whether anybody waits meanwhile."""
        end = time.monotonic() + seconds
        while self._process.exitcode is None and time.monotonic() < end:
            self._process.join(_LOOK)

    def end(self) -> None:
        """Look no more; may be called again. Behind it no process is killed, which may be no more then."""
        self._ended.set()
        self._thread.join()


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


def _failure(error: Exception, process: BaseProcess, watch: _Watch, job: DecodingJob) -> VideoError | RequestError:
    """What a request hears where a child's last message is not whole, or not what a child of ours sends."""
    if watch.is_cancelled:
        return RequestError(f"{job.name} is not wanted any more", param=job.name)
    if watch.is_late:
        return VideoError(f"{job.name} was not decoded in time: send a shorter or smaller one")
    if isinstance(error, (EOFError, OSError)) and process.exitcode is not None:
        return VideoError(_death(process, job))
    return VideoError(f"{job.name} was decoded into something else ({type(error).__name__}): send another")


def _death(process: BaseProcess, job: DecodingJob) -> str:
    """Why a child is gone that had not sent everything."""
    code = process.exitcode
    if code is not None and code < 0 and -code in (24, 9):  # SIGXCPU, SIGKILL
        return f"{job.name} took more than {job.cpu_seconds:g} s of processor time: send a shorter or smaller one"
    return (
        f"{job.name} could not be decoded, its decoder ended ({code}) with more than {job.memory} bytes or a fault: "
        "send a smaller one, or encode it anew"
    )
