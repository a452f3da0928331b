"""Films and pictures that several conversations show: read once, and encoded once by whoever comes first.

Each conversation is answered as if it were alone (`Pipeline.stream`). Knows no flag.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from framefusion.runtime.generation.stages import Stages, prefill_report
from framefusion.runtime.generation.visuals.reading import without_pixels
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.sources import Source
from framefusion.runtime.request import Request, Step, Stopwatch
from framefusion.runtime.text.prompt import Turn, visuals_of


class SharedMedia:
    """The videos and images of conversations that differ in what is said. Files are read now; the tower runs at need
    for the last of them, and for the others while the next one is decoded, where `stages.overlaps`.

    Args:
        stages: of a pipeline.
        turns: that show them; what they say is not used.
        files: the videos and images, in order: see `framefusion.runtime.media.sources`.
        sampling: of frames.

    Raises:
        VideoError, PromptError: see `framefusion.errors`.
    """

    def __init__(self, stages: Stages, turns: Sequence[Turn], files: Sequence[Source], sampling: FrameSampling) -> None:
        stopwatch = Stopwatch()
        read = stages.read_media(turns, files, sampling, stopwatch)
        self._stages = stages
        self._videos = read.videos
        self._visuals = read.visuals
        self._reading: Stopwatch | None = stopwatch
        self._rows = read.rows

    def stream(self, turns: Sequence[Turn], request: Request) -> Generator[Step, None, None]:
        """Answer a conversation that shows them, as `Pipeline.stream` does.

        The seconds of reading and encoding are those of the first conversation; the others have none.

        Args:
            turns: what was said, the last one the user's.
            request: limits, reduction and sampling of tokens.

        Raises:
            PromptError, BudgetError, BackendError: see `framefusion.errors`.
        """
        # 1. Turns to token ids; a prompt that is too long leaves the media to the others.
        stages = self._stages
        prompt = stages.prompt(turns, self._visuals)
        request = stages.with_default_cost(stages.clamp_new_tokens(request, prompt), visuals_of(turns))
        # 2. Whoever comes first runs the tower; its rows stay for the others.
        stopwatch = self._reading or Stopwatch()
        self._reading = None
        with stopwatch.stage("vision"):
            visual_rows = stages.encode_rest(self._visuals, self._rows)
        self._rows = tuple(visual_rows)
        self._visuals = tuple(without_pixels(visual) for visual in self._visuals)
        with stopwatch.stage("embed"):
            rows = stages.embed(prompt, visual_rows)
        # 3. The rest is as in `Pipeline.stream`.
        prefilled = stages.prefill(prompt, rows, request, stopwatch)
        del rows
        report = prefill_report(prompt, prefilled, self._videos)
        yield from stages.decode(prompt, prefilled, request, stopwatch, report=report)
