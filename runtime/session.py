"""A conversation of several turns whose earlier tokens stay in the caches: a turn prefills only what is new.

    turn 1   [ prompt with a film, reduced | answer ]
    turn 2   [ ........ in the caches ............. | rest of the template, what is said and shown | answer ]

Tokens of earlier turns are never moved and never reduced again; a new film is reduced by itself. The prompt is laid out
for the whole conversation each time, as one request would be. Where its tokens are not those in the caches, the session
goes back to where they part; where that lies before a film, or the graphs cannot go on behind a cache, it prefills
everything afresh, and its record says why.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from framefusion.console.layout import counted
from framefusion.errors import PromptError
from framefusion.reduction import tracks
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.concurrency.step_runner import gather_answer
from framefusion.runtime.generation.batching.decode_batch import DecodeBatch
from framefusion.runtime.generation.prefill import Prefilled
from framefusion.runtime.generation.stages import Stages, prefill_report
from framefusion.runtime.generation.visuals.reading import VisualReading, without_pixels
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.sources import Source
from framefusion.runtime.media.tiles.thumbnails import Thumbnails
from framefusion.runtime.media.video.frames import VideoFacts
from framefusion.runtime.media.visual_input import VisualInput
from framefusion.runtime.memory import cache_bytes, slot_bytes
from framefusion.runtime.request import Generation, PrefillReport, Request, Step, Stopwatch
from framefusion.runtime.text.messages import Conversation, listed_files, read_conversation
from framefusion.runtime.text.prompt import Prompt, Turn, Visual, visuals_of

TOO_LONG = "begin a new session, sample fewer frames"


@dataclass(frozen=True, eq=False)
class _NextTurn:
    """The conversation with a turn that is not part of it yet."""

    turns: tuple[Turn, ...]
    files: tuple[Source, ...]
    visuals: tuple[VisualInput, ...]  # of all turns; those that the tower had have no pixels any more
    rows: tuple[Buffer | None, ...]  # of the tower, for the last visuals, those that are not in the caches
    prompt: Prompt
    start: int  # the first token that is not in the caches
    restart: str | None
    videos: tuple[VideoFacts, ...]  # those of the new turns
    shown: Thumbnails  # of the new turns

    def without_pixels(self) -> _NextTurn:
        """What is needed to lay out the conversation again."""
        return replace(self, visuals=tuple(without_pixels(visual) for visual in self.visuals), rows=())


class Session:
    """One conversation over one bundle, one turn at a time: a second one before the first is over is refused.

    `turns`, `files` and `records` say what was said, shown and prefilled so far. A turn that fails, or whose steps are
    not taken to the end, is not part of the conversation: it may be put again.

    Args:
        stages: of a pipeline.
        sampling: of frames of every film; None takes the bundle's.
        max_cache_bytes: most keys and values that a turn may need; None leaves the bundle's limits alone.
        files: shown with the first message, before those that come with it.
        request: how a message is answered that brings none along; None takes `Request()`.
        system: what the system says; None leaves it to the first turns.
        batch: decodes this session's answers together with those of others; None by themselves.
    """

    def __init__(
        self,
        stages: Stages,
        *,
        sampling: FrameSampling | None = None,
        max_cache_bytes: int | None = None,
        files: Sequence[Source] = (),
        request: Request | None = None,
        system: str | None = None,
        batch: DecodeBatch | None = None,
    ) -> None:
        self.turns: tuple[Turn, ...] = ()
        self.files: tuple[Source, ...] = ()
        self.records: list[PrefillReport] = []
        self.max_cache_bytes = max_cache_bytes
        self.request = request or Request()
        self._attached = tuple(files)
        self._system = () if system is None else (Turn("system", system),)
        self._stages = stages
        self._sampling = sampling or stages.manifest.sampling
        self._visuals: tuple[VisualInput, ...] = ()
        self._cached: Prompt | None = None  # the tokens that the caches stand for, dropped ones included
        self._caches: list[SegmentCache] = []
        self._batch = batch
        self._running = False

    def __repr__(self) -> str:
        cached = 0 if self._cached is None else self._cached.token_ids.size
        return (
            f"<Session of {counted(len(self.records), 'message')} about {len(self.files)} film(s) and picture(s): "
            f"{cached} tokens in {self.cache_bytes} bytes of caches>"
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that are held, free slots included."""
        return sum(cache.nbytes for cache in self._caches)

    def ask(
        self,
        turns: Conversation,
        files: Sequence[Source] = (),
        request: Request | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Say something and get the whole answer: `stream`, run to its end.

        Raises:
            VideoError, PromptError, BudgetError: see `stream`; the conversation is as before.
        """
        return Generation.from_steps(self.stream(turns, files, request), on_text)

    def stream(
        self,
        turns: Conversation,
        files: Sequence[Source] = (),
        request: Request | None = None,
        *,
        logits: bool = False,
        reading: VisualReading | None = None,
    ) -> Generator[Step, None, None]:
        """Say something and get the answer step by step, as `Pipeline.stream` gives it.

        Args:
            turns: what is new: a text of the user, turns or messages, as `Pipeline.stream` takes them.
            files: the videos and images that are new, in order.
            request: limits, reduction and sampling of tokens for this turn; None takes the session's.
            logits: give those of each token, too, a copy.
            reading: has taken these very files behind those of earlier turns, for whoever decodes them by itself.

        Raises:
            PromptError: the conversation is longer than the bundle takes, or needs more cache than `max_cache_bytes`,
                or the turn before is not over.
            VideoError, BudgetError: see `framefusion.errors`.
        """
        return self._stages.runner.steps(self._steps(turns, files, request, logits, reading))

    async def aask(
        self,
        turns: Conversation,
        files: Sequence[Source] = (),
        request: Request | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """`ask` for asyncio; see `Pipeline.astream`.

        Raises:
            VideoError, PromptError, BudgetError: see `stream`; the conversation is as before.
        """
        return await gather_answer(self.astream(turns, files, request), on_text)

    def astream(
        self,
        turns: Conversation,
        files: Sequence[Source] = (),
        request: Request | None = None,
        *,
        logits: bool = False,
    ) -> AsyncGenerator[Step, None]:
        """`stream` for asyncio; see `Pipeline.astream`.

        Raises:
            VideoError, PromptError, BudgetError: see `stream`.
        """
        return self._stages.runner.async_steps(self._steps(turns, files, request, logits))

    def _steps(
        self,
        turns: Conversation,
        files: Sequence[Source],
        request: Request | None,
        logits: bool,
        reading: VisualReading | None = None,
    ) -> Generator[Step, None, None]:
        """A turn, while no other one is taken; only one thread at a time is in here."""
        if self._running:
            raise PromptError("a turn of this session is not over: take its steps to the end, or close it")
        self._running = True
        try:
            yield from self._take_turn(turns, files, request or self.request, logits, reading)
        finally:
            self._running = False

    def _take_turn(
        self,
        turns: Conversation,
        files: Sequence[Source],
        request: Request,
        logits: bool,
        reading: VisualReading | None,
    ) -> Generator[Step, None, None]:
        """The steps of `stream`."""
        stages = self._stages
        stopwatch = Stopwatch()
        # 1. Lay out the whole conversation and find what of it is in the caches; refuse what does not fit.
        following = self._prepare(turns, files, stopwatch, reading)
        prompt = following.prompt
        tail = prompt.tail(following.start)
        cached = len(following.visuals) - len(following.rows)
        new = visuals_of(following.turns)[cached:]
        request = stages.with_default_cost(stages.clamp_new_tokens(request, prompt), new)
        self._check_bytes(following.start, tail.token_ids.size, request.max_new_tokens)
        # 2. Embed what is new: films of earlier turns are in the caches and pass the tower no more.
        with stopwatch.stage("vision"):
            visual_rows = stages.encode_rest(following.visuals[cached:], following.rows)
        with stopwatch.stage("embed"):
            rows = stages.embed(tail, visual_rows)
            rows = replace(rows, origin=rows.origin + following.start)
        following = following.without_pixels()  # they are large, and spent
        del visual_rows
        # 3. Prefill it behind the caches, which end where both prompts part.
        self._cut_back(following.start)
        lengths = [cache.lengths.copy() for cache in self._caches]
        kept = False
        try:
            prefilled = stages.prefill(tail, rows, request, stopwatch, past=self._caches or None)
            del rows
            report = prefill_report(prompt, prefilled, following.videos, following.shown)
            report = replace(report, reused_tokens=following.start, restart=following.restart)
            # 4. Decode; the turn is part of the conversation once its last step is there.
            token_ids: list[int] = []
            text = ""
            decoding = stages.decode(
                prompt, prefilled, request, stopwatch, report=report, logits=logits, batch=self._batch
            )
            with closing(decoding):  # the caches are the session's again when lengths are set back
                for step in decoding:
                    text += step.text
                    if step.token_id is not None:
                        token_ids.append(step.token_id)
                    if step.kind == "end":
                        self._keep(following, prefilled, token_ids, text, report)
                        kept = True
                    yield step
        finally:
            if not kept:  # what the turn wrote lies behind the lengths, and will be overwritten
                for cache, before in zip(self._caches, lengths, strict=True):
                    cache.lengths[:] = before

    def _prepare(
        self, turns: Conversation, files: Sequence[Source], stopwatch: Stopwatch, reading: VisualReading | None
    ) -> _NextTurn:
        """Media, prompt and what of it can be reused."""
        stages = self._stages
        first = not self.turns
        new, files = read_conversation(turns, (*self._attached, *listed_files(files)) if first else files)
        added = (*self._system, *new) if first else tuple(new)
        conversation = (*self.turns, *added)
        earlier = visuals_of(self.turns)
        shown = visuals_of(added)
        if reading is None:
            read = stages.read_media(added, files, self._sampling, stopwatch, before=earlier)
        else:
            read = reading.result()
            for stage, seconds in reading.seconds.items():
                stopwatch.add(stage, seconds)
        visuals = read.visuals
        rows = read.rows
        start = 0
        restart = self._restart_reason(earlier, shown)
        if restart is None:
            visuals = (*self._visuals, *read.visuals)
            prompt = stages.prompt(conversation, visuals, TOO_LONG)
            start, restart = self._reusable(prompt)
        if restart is not None:
            again = stages.read_media(self.turns, self.files, self._sampling, stopwatch, after=shown)
            visuals = (*again.visuals, *read.visuals)
            rows = (*again.rows, *read.rows)
            prompt = stages.prompt(conversation, visuals, TOO_LONG)
        return _NextTurn(
            conversation, (*self.files, *files), visuals, rows, prompt, start, restart, read.videos, read.thumbnails
        )

    def _restart_reason(self, earlier: Sequence[Visual], shown: Sequence[Visual]) -> str | None:
        """Why nothing can be reused, whatever the prompt says; None in the first turn, too."""
        if not self.turns:
            return None
        if self._stages.restart_reason is not None:
            return self._stages.restart_reason
        if self._cached is None:
            return "an earlier turn was given up while everything was prefilled afresh"
        images = earlier.count(Visual.IMAGE)
        rule = self._stages.manifest.preprocessing
        if images and rule.for_images(images) != rule.for_images(images + shown.count(Visual.IMAGE)):
            return "this family shows images in another way once there are more of them"
        return None

    def _reusable(self, prompt: Prompt) -> tuple[int, str | None]:
        """How many tokens of a prompt are in the caches, or 0 and why."""
        cached = self._cached
        if cached is None:
            return 0, None
        start = min(cached.common_length(prompt), prompt.token_ids.size - 1)
        if tracks.count_visual(cached.labels[start:]):  # which of them are in which cache, the reduction knows
            return (
                0,
                f"the conversation differs from its {cached.token_ids.size} cached tokens at {start}, before a film",
            )
        return start, None

    def _cut_back(self, start: int) -> None:
        """Forget what is cached behind `start`, text that no reduction drops: every layer holds it at its end."""
        if self._cached is None:
            return
        surplus = self._cached.token_ids.size - start
        for cache in self._caches:
            cache.lengths -= surplus
        self._cached = self._cached.head(start)
        if start == 0:
            self._cached = None
            self._caches = []

    def _check_bytes(self, start: int, count: int, max_new_tokens: int) -> None:
        """Refuse a turn that may need more memory than allowed, if nothing of it were dropped."""
        if self.max_cache_bytes is None:
            return
        manifest = self._stages.manifest
        held = 0
        if self._cached is not None and start:
            surplus = self._cached.token_ids.size - start
            held = slot_bytes(manifest) * sum(int((cache.lengths - surplus).sum()) for cache in self._caches)
        new = sum(cache_bytes(manifest, index, count, max_new_tokens) for index in range(len(manifest.segments)))
        if held + new > self.max_cache_bytes:
            raise PromptError(
                f"the turn may need {held + new} bytes of KV cache, {held} of them for earlier turns, max_cache_bytes "
                f"is {self.max_cache_bytes}: {TOO_LONG} or ask for fewer new tokens"
            )

    def _keep(
        self, following: _NextTurn, prefilled: Prefilled, token_ids: Sequence[int], text: str, report: PrefillReport
    ) -> None:
        """Make a turn and its answer part of the conversation."""
        self.turns = (*following.turns, Turn("assistant", text))
        self.files = following.files
        self.records.append(replace(report, shown=None))  # thumbnails are the answer's
        self._visuals = following.visuals
        if self._stages.restart_reason is None:
            self._caches = prefilled.caches
            self._cached = following.prompt.followed_by(token_ids[:-1])  # the last one was not fed back
