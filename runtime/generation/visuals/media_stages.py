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
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.concurrency.one_ahead import in_turn, one_ahead
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.generation.embedder import Embedder
from framefusion.runtime.generation.visuals.reading import Media, ReadMedia, VisualReading
from framefusion.runtime.machine.cpu import available_cores
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.preprocess import Preprocessing
from framefusion.runtime.media.sources import Source, as_image, as_video
from framefusion.runtime.media.video.container.opening import ended_by
from framefusion.runtime.media.video.frames import Shrink, Video
from framefusion.runtime.media.video.progress import FilmProgress
from framefusion.runtime.media.visual_input import RowMap, VisualInput
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual, as_turns, visuals_of


def leaves_cores_free(backend: Backend) -> bool:
    """Whether something else can be computed on this machine's CPU while a graph runs, without slowing it down.

    So it is where graphs run on a device, and where an operator takes fewer threads than there are cores for this
    process. Measured in docs/films.md.
    """
    threads: int | None = getattr(backend, "host_threads", 0)  # a backend of another package may not say
    return threads is None or 0 < threads < available_cores()


class MediaStages:
    """What each of these stages needs of a bundle; `Stages` opens it.

    Attributes:
        manifest: of the bundle.
        backend: that runs the tower.
        embedder: that the tower belongs to.
        limits: of the files that are read.
        overlaps: decode the next film of a request while the tower has the one before it.
    """

    manifest: Manifest
    backend: Backend
    embedder: Embedder
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
                if last and ahead:
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

    def preprocessor(self, media: Sequence[Media], others: Sequence[Visual] = ()) -> Preprocessing:
        """What turns the videos and images of one conversation into patches; their number may change how."""
        images = sum(not isinstance(shown, Video) for shown in media)
        return self.manifest.preprocessing.for_images(images + others.count(Visual.IMAGE))

    def preprocess(
        self,
        media: Sequence[Media],
        stopwatch: Stopwatch,
        *,
        before: Sequence[Visual] = (),
        after: Sequence[Visual] = (),
    ) -> list[VisualInput]:
        """Patches and pieces of the prompt for videos and images of one conversation.

        Args:
            media: decoded.
            stopwatch: gets the stage "preprocess".
            before: what the conversation shows before these: videos and images are numbered.
            after: what it shows behind them.

        Raises:
            VideoError: a picture cannot be shown to this family.
        """
        visuals = list[VisualInput]()
        videos = before.count(Visual.VIDEO)
        images = before.count(Visual.IMAGE)
        preprocessor = self.preprocessor(media, [*before, *after])
        for shown in media:
            with stopwatch.stage("preprocess"):
                if isinstance(shown, Video):
                    visuals.append(preprocessor.video(shown, videos))
                    videos += 1
                else:
                    visuals.append(preprocessor.image(shown, images))
                    images += 1
        return visuals

    def encode_visual(self, visual: VisualInput) -> Buffer:
        """Rows [1+K, n, D] of one video or image: see `Embedder.encode_visual`."""
        return self.embedder.encode_visual(visual)

    def join_rows(self, parts: Sequence[Buffer], mapping: RowMap | None) -> Buffer:
        """Rows [1+K, n, D] of a video whose pictures passed the tower in parts: see `Embedder.join`."""
        return self.embedder.join(parts, mapping)

    def encode_rest(self, visuals: Sequence[VisualInput], rows: Sequence[Buffer | None]) -> list[Buffer]:
        """Rows [1+K, n, D] of each: the tower runs for those that have none.

        Raises:
            BackendError: the backend refuses or fails.
        """
        return [self.encode_visual(visual) if had is None else had for visual, had in zip(visuals, rows, strict=True)]
