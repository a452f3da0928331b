"""The films of one request on their way to the tower while the rest of them is decoded.

    decoders (processes)   film 0 .......... | film 1 ..........
    engine                      | frames 0 to 16, then a token for all that run | frames 16 to 32, ...

A run of the tower is a job of the engine's, so that those who decode get their tokens between two of them, and the
engine waits for no decoder: a run begins once its frames are there. Rows that wait for their prompt take the device's
memory: one request at a time reads ahead, and none where others wait for the engine already, which has no idle time to
be filled then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Event

from framefusion.runtime.generation.visuals.reading import VisualReading
from framefusion.runtime.media.video.progress import FilmProgress
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.request import Step, Stopwatch
from framefusion.runtime.server.engine import Engine, Job
from framefusion.runtime.server.media.decoding import Decoded
from framefusion.runtime.server.media.reader import MediaReader, OpenPart
from framefusion.runtime.session import Session
from framefusion.runtime.text.prompt import Turn, Visual, visuals_of


class TowerJob(Job):
    """One run of the tower.

    Args:
        pipeline: whose turn it takes.
        run: computes it.

    Attributes:
        done: once the tower had it, or nobody wants it any more.
    """

    def __init__(self, pipeline: Pipeline, run: Callable[[], None]) -> None:
        super().__init__()
        self._pipeline = pipeline
        self._compute = run
        self.done: Future[None] = Future()

    @property
    def nbytes(self) -> int:
        """It has no keys and values."""
        return 0

    def start(self) -> Generator[Step, None, None]:
        """Run the tower; there is no step to give."""
        with self._pipeline.runner.turn():
            self._compute()
        yield from ()

    def give(self, step: Step) -> None:
        """See `Job.give`: never called."""

    def finish(self, error: BaseException | None) -> None:
        """Wake whoever waits."""
        if not self.done.set_running_or_notify_cancel():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


class ReadingAhead:
    """Decodes what requests show; where it pays, the tower has what is there of a film while the rest is decoded.

    Args:
        pipeline: of the bundle.
        reader: of what clients show.
        engine: that runs the tower.
    """

    def __init__(self, pipeline: Pipeline, reader: MediaReader, engine: Engine) -> None:
        self._pipeline = pipeline
        self._reader = reader
        self._engine = engine
        self._latest: VisualReading | None = None

    def begin(self, session: Session, turns: Sequence[Turn]) -> VisualReading | None:
        """What takes the films of a session's next turn as they are decoded; None where they are decoded first."""
        kinds = visuals_of(turns)
        is_taken = self._latest is not None and not self._latest.is_spent
        is_one_picture = len(kinds) < 2 and Visual.VIDEO not in kinds
        if not self._pipeline.overlaps or is_one_picture or is_taken or self._engine.waiting:
            return None
        most_rows = self._pipeline.manifest.limits.max_input_len
        before = visuals_of(session.turns)
        self._latest = VisualReading(self._pipeline, kinds, Stopwatch(), most_rows, before)
        return self._latest

    async def decode(
        self, reading: VisualReading, parts: Sequence[OpenPart], images: int, cancelled: Callable[[], bool]
    ) -> list[Decoded]:
        """Frames and pictures as `MediaReader.decode` gives them; the tower had all but what was decoded last.

        Raises:
            VideoError, RequestError: as `MediaReader.decode`; nothing is decoded any more.
            BackendError: the tower failed.
        """
        loop = asyncio.get_running_loop()
        ended = Event()
        progress = [FilmProgress() for _ in parts]
        pending = self._reader.begin(parts, images, lambda: ended.is_set() or cancelled(), progress)
        decoded = list[Decoded]()
        try:
            for future, shown in zip(pending, progress, strict=True):
                # 1. While it is decoded, the tower has what is there, a run after the other.
                parts_there = reading.parts(shown)
                while (pictures := await loop.run_in_executor(None, next, parts_there, None)) is not None:
                    await self._run(partial(reading.encode_part, pictures))
                # 2. Once it is whole, the tower has the rest: of the last one only if it had a part.
                decoded.append(await asyncio.wrap_future(future))
                await loop.run_in_executor(None, reading.take, decoded[-1].media)
                if reading.has_begun or future is not pending[-1]:
                    await self._run(reading.encode)
        except BaseException:
            reading.give_up()
            raise
        finally:
            ended.set()
            for future, shown in zip(pending, progress, strict=True):
                future.cancel()
                shown.end()  # its decoder may take a moment to end
        return decoded

    async def _run(self, compute: Callable[[], None]) -> None:
        """Have the engine compute something between the steps of others."""
        job = TowerJob(self._pipeline, compute)
        self._engine.submit(job)
        try:
            await asyncio.wrap_future(job.done)
        finally:
            job.cancel()
