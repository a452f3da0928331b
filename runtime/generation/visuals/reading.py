"""Films and pictures of one conversation on their way to the tower, one after the other: each is spent before the next.

    decoded film -> patches, pieces of the prompt, thumbnails, facts -> (rows of the tower, while the next is decoded)

Decodes nothing and lays out no prompt.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

from framefusion.errors import VideoError
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.generation.embedder import pictures_at_once
from framefusion.runtime.generation.visuals.visual_stages import Media, VisualStages
from framefusion.runtime.media.tiles.thumbnails import ThumbnailCollector, Thumbnails
from framefusion.runtime.media.video.frames import Video, VideoFacts, facts_of_films
from framefusion.runtime.media.video.progress import FilmProgress
from framefusion.runtime.media.visual_input import Tiles, VisualInput
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Visual


@dataclass(frozen=True, eq=False)
class ReadMedia:
    """What a conversation shows, in its order, ready for its prompt to be laid out.

    Attributes:
        visuals: pieces of the prompt, with patches where the tower has not had them.
        rows: of the tower, [1+K, n, D] each; None where it has not had the patches.
        videos: the facts of the films.
        thumbnails: of all.
    """

    visuals: tuple[VisualInput, ...]
    rows: tuple[Buffer | None, ...]
    videos: tuple[VideoFacts, ...]
    thumbnails: Thumbnails


class VisualReading:
    """Takes what a conversation shows as it is decoded.

    Args:
        stages: of a pipeline.
        kinds: of all that is shown, in order.
        stopwatch: gets the stages "preprocess" and "vision".
        most_rows: with more rows than these the prompt is known to be too long, and the tower is spared.
        before: what the conversation shows before these.
        after: what it shows behind them.
    """

    def __init__(
        self,
        stages: VisualStages,
        kinds: Sequence[Visual],
        stopwatch: Stopwatch,
        most_rows: int,
        before: Sequence[Visual] = (),
        after: Sequence[Visual] = (),
    ) -> None:
        self._stages = stages
        self._kinds = tuple(kinds)
        self._stopwatch = stopwatch
        self._most_rows = most_rows
        self._before = tuple(before)
        self._after = tuple(after)
        self._visuals: list[VisualInput] = []
        self._rows: list[Buffer | None] = []
        self._videos: list[VideoFacts] = []
        self._parts: list[tuple[Tiles, Buffer]] = []  # of the next film, whole runs of the tower
        self._left: Tiles | None = None  # of the film that was taken last, behind its parts
        self._thumbnails = ThumbnailCollector(stages.preprocessor((), (*before, *kinds, *after)))
        self.is_spent = False  # whoever asked has the result, or wants none

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, so far."""
        return self._stopwatch.seconds

    def follow(self, progress: FilmProgress) -> None:
        """Run the tower for parts of the next film as its frames come: `parts`, each encoded at once.

        Raises:
            BackendError: the backend refuses or fails.
        """
        for pictures in self.parts(progress):
            self.encode_part(pictures)

    def parts(self, progress: FilmProgress) -> Generator[Tiles, None, None]:
        """Parts of the next film as its frames come, of as many pictures as one run of the tower takes.

        So the runs are those of the whole film, and the rows the same to the bit. Whether the parts are the film's is
        shown once it is whole: a family may make other pictures of a part, and a film may be picked anew. Waits for
        frames; `encode_part` has to have each part before the next one is asked for.
        """
        frames = self._thumbnails.rule.frames_per_patch()
        self._parts = []
        start = 0
        before = sum(visual.num_rows for visual in self._visuals)
        while (film := self._awaited(progress, start, frames)) is not None:
            tiles = self._pictures(film)
            if tiles is None:
                return
            pictures, patches, _ = tiles.shape
            at_once = pictures_at_once(patches)
            if pictures != at_once:
                if start or at_once % pictures:  # other pictures than the film's first ones, or no whole run of them
                    return
                frames = frames * at_once // pictures
                continue
            yield tiles
            start += frames
            if before + sum(part.shape[1] for _, part in self._parts) > self._most_rows:  # the prompt is too long
                return

    def encode_part(self, pictures: Tiles) -> None:
        """Run the tower for the next part of the next film.

        Raises:
            BackendError: the backend refuses or fails.
        """
        parts = self._parts  # nobody's once it is given up, which another thread may do meanwhile
        with self._stopwatch.stage("vision"):
            parts.append((pictures, self._stages.encode_visual(VisualInput((pictures,), ()))))

    def _awaited(self, progress: FilmProgress, start: int, count: int) -> Video | None:
        with self._stopwatch.stage("video"):
            return progress.part(start, count)

    def _pictures(self, film: Video) -> Tiles | None:
        """What a part of a film is shown as, where that is one kind of pictures."""
        try:
            visual = self._preprocessed(film)
        except VideoError:
            return None
        return visual.tiles[0] if len(visual.tiles) == 1 else None

    def _preprocessed(self, shown: Media) -> VisualInput:
        """The next video or image, or a part of it, cut into patches.

        Raises:
            VideoError: it cannot be shown to this family.
        """
        number = len(self._visuals)
        before = (*self._before, *self._kinds[:number])
        after = (*self._kinds[number + 1 :], *self._after)
        (visual,) = self._stages.preprocess([shown], self._stopwatch, before=before, after=after)
        return visual

    def take(self, shown: Media) -> None:
        """The next video or image: cut into patches. Its own pixels are not kept.

        Raises:
            VideoError: it cannot be shown to this family.
        """
        self._visuals.append(self._preprocessed(shown))
        self._rows.append(None)
        self._videos += facts_of_films([shown])
        self._thumbnails.add(shown)
        self._left = self._behind_parts()

    @property
    def has_begun(self) -> bool:
        """Whether parts of what was taken last passed the tower, so that what is left of it should as well."""
        return self._left is not None

    def encode(self) -> None:
        """Run the tower for what was taken last, or for what is left of it; its patches are not kept.

        It is spared where the prompt is too long already.

        Raises:
            BackendError: the backend refuses or fails.
        """
        visuals = self._visuals  # nobody's once they are given up, which another thread may do meanwhile
        rows = self._rows
        parts = [part for _, part in self._parts]
        left = self._left
        if not visuals or self._is_too_long():
            return
        visual = visuals[-1]
        self._parts = []
        self._left = None
        with self._stopwatch.stage("vision"):
            rows[-1] = self._stages.encode_visual(visual) if left is None else self._joined(visual, parts, left)
        visuals[-1] = without_pixels(visual)

    def _is_too_long(self) -> bool:
        return sum(visual.num_rows for visual in self._visuals) > self._most_rows

    def _behind_parts(self) -> Tiles | None:
        """Pictures of what was taken last behind its parts, none or more; None where it has no parts that are its."""
        parts = [part for part, _ in self._parts]
        visual = self._visuals[-1]
        left = None
        if parts and not self._is_too_long() and len(visual.tiles) == 1:
            left = visual.tiles[0].behind(parts)
        if left is None:
            self._parts = []
        return left

    def _joined(self, visual: VisualInput, rows: list[Buffer], left: Tiles) -> Buffer:
        """Rows of a film of which those of its parts are there; what is `left` passes the tower now."""
        if left.shape[0]:
            rows.append(self._stages.encode_visual(VisualInput((left,), ())))
        return self._stages.join_rows(rows, visual.rows)

    def result(self) -> ReadMedia:
        """All that was taken. It is the caller's now: nothing of it is kept here.

        Raises:
            ValueError: less was taken than is shown, or it was given up.
        """
        if len(self._visuals) != len(self._kinds):
            raise ValueError(f"{len(self._visuals)} of {len(self._kinds)} films and pictures were taken")
        thumbnails = self._thumbnails.thumbnails()
        read = ReadMedia(tuple(self._visuals), tuple(self._rows), tuple(self._videos), thumbnails)
        self.give_up()
        return read

    def give_up(self) -> None:
        """Keep nothing: patches and rows are large. A run of the tower that another thread is in keeps nothing, too."""
        self.is_spent = True
        self._visuals = []
        self._rows = []
        self._parts = []
        self._left = None


def without_pixels(visual: VisualInput) -> VisualInput:
    """What is needed to lay out the prompt again; patches are large, and spent once the tower had them."""
    return replace(visual, tiles=(), rows=None)
