"""The stages of a request that see its films and pictures: from files to rows of the vision tower.

    decode_media -> preprocess -> encode_visual        everything at once, or
    read_media, encode_rest                            film after film, the next one decoded while the tower has one

Knows no token but by the pieces that a family makes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from framefusion.errors import PromptError
from framefusion.runtime.backends.base import Backend
from framefusion.runtime.concurrency.one_ahead import in_turn, one_ahead
from framefusion.runtime.generation.visuals.reading import ReadMedia, VisualReading
from framefusion.runtime.generation.visuals.visual_stages import Media, VisualStages
from framefusion.runtime.machine.cpu import available_cores
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.sources import Source, as_image, as_video
from framefusion.runtime.media.video.container.opening import ended_by
from framefusion.runtime.media.video.frames import Shrink, Video
from framefusion.runtime.media.video.progress import FilmProgress
from framefusion.runtime.media.visual_input import VisualInput
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual, as_turns, visuals_of


def leaves_cores_free(backend: Backend) -> bool:
    """Whether something else can be computed on this machine's CPU while a graph runs, without slowing it down.

    So it is where graphs run on a device, and where an operator takes fewer threads than there are cores for this
    process. Measured in docs/films.md.
    """
    threads: int | None = getattr(backend, "host_threads", 0)  # a backend of another package may not say
    return threads is None or 0 < threads < available_cores()


class MediaStages(VisualStages):
    """What each of these stages needs of a bundle; `Stages` opens it.

    Attributes:
        backend: that runs the tower.
        limits: of the files that are read.
        overlaps: decode the next film of a request while the tower has the one before it.
    """

    backend: Backend
    limits: MediaLimits
    overlaps: bool

    def read_visuals(
        self, turns: Sequence[Turn], files: Sequence[Source], sampling: FrameSampling, stopwatch: Stopwatch
    ) -> list[VisualInput]:
        """What the turns show, in their order, preprocessed: `decode_media`, then `preprocess`."""
        return self.preprocess(self.decode_media(turns, files, sampling, stopwatch, whole=False), stopwatch)

    def decode_media(
        self,
        turns: Sequence[Turn],
        files: Sequence[Source],
        sampling: FrameSampling,
        stopwatch: Stopwatch,
        whole: bool = True,
        others: Sequence[Visual] = (),
    ) -> list[Media]:
        """Videos and images that the turns show, in their order, as they are in the files.

        Args:
            turns: of the conversation.
            files: one source for each Visual of the turns.
            sampling: of a video's frames.
            stopwatch: gets the stage "video".
            whole: keep frames of films at their size, or only as large as the family shows them.
            others: what the conversation shows in turns that are not given.

        Raises:
            PromptError: turns and files disagree.
            VideoError: a file is none of a kind that is read, is damaged or beyond `limits`.
        """
        kinds = self._kinds(turns, files)
        shrink = self._shrink([*kinds, *others])
        media: list[Media] = []
        for kind, file in zip(kinds, files, strict=True):
            with stopwatch.stage("video"):
                media.append(self._decode(kind, file, sampling, None if whole else shrink))
        return media

    def read_media(
        self,
        turns: Sequence[Turn],
        files: Sequence[Source],
        sampling: FrameSampling,
        stopwatch: Stopwatch,
        *,
        before: Sequence[Visual] = (),
        after: Sequence[Visual] = (),
    ) -> ReadMedia:
        """What the turns show, film after film, up to where their prompt can be laid out.

        Where `overlaps`, a thread decodes, and the tower has what is decoded: a film's first frames while the rest of
        it comes, and all of it while the next one does. Else no film passes the tower here, so that a prompt that is
        too long costs none. Rows are the same.

        Args:
            turns: of the conversation.
            files: one source for each Visual of the turns.
            sampling: of a video's frames.
            stopwatch: gets the stages "video", which is what was waited for films, "preprocess" and "vision".
            before: what the conversation shows before these: videos and images are numbered.
            after: what it shows behind them.

        Raises:
            PromptError: turns and files disagree.
            VideoError: see `decode_media` and `preprocess`; of the first that has an error.
            BackendError: the backend refuses or fails.
        """
        kinds = self._kinds(turns, files)
        shrink = self._shrink([*before, *kinds, *after])
        reading = VisualReading(self, kinds, stopwatch, self.manifest.limits.max_input_len, before, after)
        ahead = self.overlaps and not all(isinstance(file, Video) for file in files)
        progress = [FilmProgress() for _ in kinds]

        def decode(number: int, is_ended: Callable[[], bool]) -> Media:
            try:
                with ended_by(is_ended):
                    return self._decode(kinds[number], files[number], sampling, shrink, progress[number])
            finally:
                progress[number].end()

        def follow(number: int) -> None:
            reading.follow(progress[number])

        jobs = [partial(decode, number) for number in range(len(kinds))]
        with closing(one_ahead(jobs, "framefusion-film", follow) if ahead else in_turn(jobs)) as films:
            for last in range(len(jobs) - 1, -1, -1):
                begun = time.perf_counter() - sum(stopwatch.seconds.values())
                shown = next(films)
                stopwatch.add("video", time.perf_counter() - sum(stopwatch.seconds.values()) - begun)
                reading.take(shown)
                del shown  # pixels are large: two films of them are held at most
                if reading.has_begun or (last and ahead):
                    reading.encode()
        return reading.result()

    def _kinds(self, turns: Sequence[Turn], files: Sequence[Source]) -> list[Visual]:
        """What the turns show.

        Raises:
            PromptError: turns and files disagree.
        """
        kinds = visuals_of(as_turns(turns))
        if isinstance(files, (str, bytes, Path)):
            raise PromptError(f"files is one name, {str(files)[:120]!r}: give a list of what the turns show")
        if len(kinds) != len(files):
            raise PromptError(
                f"the conversation shows {len(kinds)} video(s) and image(s), {len(files)} were given: "
                "give one source for each Visual of the turns"
            )
        return kinds

    def _shrink(self, kinds: Sequence[Visual]) -> Shrink:
        """What is kept of each frame of a conversation that shows all these."""
        return self.manifest.preprocessing.for_images(kinds.count(Visual.IMAGE)).shrink

    def _decode(
        self,
        kind: Visual,
        file: Source,
        sampling: FrameSampling,
        shrink: Shrink | None,
        follower: FilmProgress | None = None,
    ) -> Media:
        """One video or image."""
        if kind is Visual.IMAGE:
            return as_image(file, self.limits)
        return as_video(file, sampling, self.limits, shrink, follower)
