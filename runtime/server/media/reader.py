"""What the messages of a request show, read for one bundle: opened, known again by a digest, decoded where needed.

parts -> open: files and digests -> (a conversation that has it in its caches needs no more) -> decode: frames
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from threading import Event, Lock

from framefusion.errors import RequestError
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.preprocess import Preprocessing
from framefusion.runtime.media.video.frames import FrameFollower
from framefusion.runtime.media.video.progress import FilmProgress
from framefusion.runtime.server.media.child import DecodingJob
from framefusion.runtime.server.media.decoding import (
    CPU_SECONDS,
    MEMORY,
    REQUEST_BYTES,
    SERVER_LIMITS,
    Decoded,
    decode_apart,
)
from framefusion.runtime.server.media.policy import MediaFile, MediaPolicy, open_media
from framefusion.runtime.server.protocol.parts import ALL_FRAMES, MediaPart, Sampling
from framefusion.runtime.text.prompt import Visual

_NEVER = 3  # the clock may run so many times as long as the processor: others work, too


@dataclass(frozen=True)
class OpenPart:
    """A film or picture that was opened: what is shown, of which files, and by what it is known again."""

    part: MediaPart
    files: tuple[MediaFile, ...]
    sampling: FrameSampling
    times: tuple[float, ...] | None
    key: str


class MediaReader:
    """Opens and decodes for one server.

    Args:
        policy: what clients may show.
        preprocessing: of the bundle.
        sampling: of the bundle's films.
        limits: of what is decoded.
        memory: bytes that decoding one film or picture may take.
        cpu_seconds: of processor time for it.
        decoders: that work at once, for all requests together.
        request_bytes: of all pixels that one call of `decode` gives; None for any number.
    """

    def __init__(
        self,
        policy: MediaPolicy,
        preprocessing: Preprocessing,
        sampling: FrameSampling,
        limits: MediaLimits = SERVER_LIMITS,
        memory: int = MEMORY,
        cpu_seconds: float = CPU_SECONDS,
        decoders: int = 2,
        request_bytes: int | None = REQUEST_BYTES,
    ) -> None:
        self.policy = policy
        self.limits = limits
        self._preprocessing = preprocessing
        self._sampling = sampling
        self._memory = memory
        self._request_bytes = request_bytes
        self._cpu_seconds = cpu_seconds
        self._decoders = ThreadPoolExecutor(decoders, "decoder")
        self._closing = Event()

    def close(self) -> None:
        """End what is fetched and decoded."""
        self._closing.set()
        self._decoders.shutdown(cancel_futures=True)

    def open(self, parts: Sequence[MediaPart], folder: Path, cancelled: Callable[[], bool]) -> list[OpenPart]:
        """The files of all parts.

        Args:
            parts: of a request, in order.
            folder: of the request, empty.
            cancelled: whether nobody waits any more.

        Raises:
            RequestError: one is not allowed, malformed or not there, or all together are too large.
        """
        opened = []
        total = 0
        for part in parts:
            sampling = frame_sampling(self._sampling, part)
            files = []
            for number, url in enumerate(part.urls):
                name = part.place if len(part.urls) == 1 else f"{part.place} (frame {number})"
                file = open_media(url, name, folder, self.policy, lambda: self._closing.is_set() or cancelled())
                total += file.path.stat().st_size
                if total > self.policy.file_bytes:
                    raise RequestError(
                        f"the films and pictures of the request have more than {self.policy.file_bytes} bytes: send "
                        "fewer",
                        param="messages",
                        status=413,
                    )
                files.append(file)
            times = frame_times(part)
            digests = " ".join(file.digest for file in files)
            key = hashlib.sha256(f"{part.kind} {part.of_frames} {sampling} {times} {digests}".encode()).hexdigest()
            opened.append(OpenPart(part, tuple(files), sampling, times, key))
        return opened

    def decode(self, parts: Sequence[OpenPart], images: int, cancelled: Callable[[], bool]) -> list[Decoded]:
        """Frames and pictures, decoded apart from the server, several at once.

        Args:
            parts: to decode.
            images: pictures in the whole conversation: a family may show several of them in another way than one.
            cancelled: whether nobody waits any more.

        Raises:
            VideoError: one cannot be decoded within the limits.
            RequestError: nobody waits any more.
        """
        pending = self.begin(parts, images, cancelled)
        try:
            return [future.result() for future in pending]
        finally:
            for future in pending:
                future.cancel()

    def begin(
        self,
        parts: Sequence[OpenPart],
        images: int,
        cancelled: Callable[[], bool],
        progress: Sequence[FilmProgress] = (),
    ) -> list[Future[Decoded]]:
        """`decode`, not waited for: whoever leaves has the others cancelled, and `cancelled` say so.

        `progress`, one for each part where given, shows the frames of films as they come, and ends with each.
        """
        shrink = self._preprocessing.for_images(images).shrink
        jobs = []
        for part in parts:
            film = part.part.kind is Visual.VIDEO
            paths = tuple(file.path for file in part.files)
            jobs.append(
                DecodingJob(
                    paths, film, part.part.of_frames, part.part.place, part.sampling, part.times, self.limits,
                    shrink if film else None, self._memory, self._cpu_seconds,
                )
            )  # fmt: skip
        within = _Budget(self._request_bytes, lambda: self._closing.is_set() or cancelled())
        seconds = _NEVER * self._cpu_seconds
        pending = [
            self._decoders.submit(within.decode, job, seconds, shown) for job, shown in zip_longest(jobs, progress)
        ]
        for future, shown in zip(pending, progress, strict=False):
            future.add_done_callback(partial(_end, shown))
        return pending


def _end(progress: FilmProgress, _: Future[Decoded]) -> None:
    """No more frames come, whatever became of the film: its decoding may never have begun."""
    progress.end()


class _Budget:
    """Decodes the films and pictures of one request until they are too large together: then the others end as well.

    Args:
        most: bytes of pixels; None for any number.
        cancelled: whether nobody waits any more.
    """

    def __init__(self, most: int | None, cancelled: Callable[[], bool]) -> None:
        self._most = most
        self._cancelled = cancelled
        self._held = 0
        self._lock = Lock()

    def _over(self) -> bool:
        return self._most is not None and self._held > self._most

    def decode(self, job: DecodingJob, seconds: float, follower: FrameFollower | None) -> Decoded:
        """One of them; called by several threads."""
        too_large = RequestError(
            f"the films and pictures of the request have more than {self._most} bytes of pixels: send fewer or smaller "
            "ones",
            param="messages",
            status=413,
        )
        if self._over():
            raise too_large
        try:
            decoded = decode_apart(job, seconds, lambda: self._over() or self._cancelled(), follower)
        except RequestError:
            if self._over():
                raise too_large from None
            raise
        with self._lock:
            self._held += decoded.nbytes
        if self._over():
            raise too_large
        return decoded


def frame_sampling(base: FrameSampling, part: MediaPart) -> FrameSampling:
    """Which frames of a film are decoded.

    Raises:
        RequestError: all frames of a file are wanted, or a number of times is not that of the frames.
        VideoError: the numbers choose no frame.
    """
    wanted = part.sampling
    if part.of_frames:
        return replace(base, fps=wanted.fps or base.fps)
    if wanted.num_frames == ALL_FRAMES:
        raise RequestError(f"{part.place}: all frames are asked for, num_frames is -1: give a number", param=part.place)
    if wanted.num_frames is not None:
        return base.spread(max(wanted.num_frames, base.frame_factor))
    sampling = base.overridden(wanted.fps, wanted.max_frames)
    if wanted.min_frames is not None:
        sampling = replace(sampling, min_frames=min(wanted.min_frames, sampling.max_frames))
    return sampling


def frame_times(part: MediaPart) -> tuple[float, ...] | None:
    """Seconds at which the frames of a film of pictures begin; None where they stand at a rate.

    Raises:
        RequestError: their number is not that of the frames, or there is no rate to place them.
    """
    wanted: Sampling = part.sampling
    count = len(part.urls)
    if not part.of_frames:
        if wanted.frames_indices is not None:
            raise RequestError(
                f"{part.place} is a file, frames_indices names frames that a client sampled itself: leave it out, or "
                "send those frames as data:video/jpeg;base64,...",
                param=part.place,
            )
        return None
    if wanted.frames_indices is not None:
        if len(wanted.frames_indices) != count or wanted.fps is None:
            raise RequestError(
                f"{part.place} has {count} frames, frames_indices has {len(wanted.frames_indices)}, fps is "
                f"{wanted.fps}: give an index for each frame, and the rate of the film",
                param=part.place,
            )
        return tuple(index / wanted.fps for index in wanted.frames_indices)
    if wanted.fps is None and wanted.duration is not None:
        return tuple(number * wanted.duration / count for number in range(count))
    return None
