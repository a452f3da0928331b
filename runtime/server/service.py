"""One bundle that answers many: from the bytes of a request to the steps of its answer.

    body -> ChatRequest -> media opened -> conversation found -> new media decoded -> engine -> steps

Everything that takes long runs on threads; what waits is bounded. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from framefusion.errors import ClosedError, RequestError
from framefusion.runtime.generation.batching.decode_batch import DecodeBatch
from framefusion.runtime.generation.visuals.reading import VisualReading
from framefusion.runtime.media.sources import Source
from framefusion.runtime.memory import slot_bytes
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.request import Generation, PrefillReport, Request, Step
from framefusion.runtime.server.conversations import Conversation, Conversations, TurnKey, answer_key, turn_keys
from framefusion.runtime.server.engine import Engine, Job
from framefusion.runtime.server.media.ahead import ReadingAhead
from framefusion.runtime.server.media.reader import MediaReader
from framefusion.runtime.server.metrics import Metrics
from framefusion.runtime.server.protocol.parts import MediaPart
from framefusion.runtime.server.protocol.request import NO_DEFAULTS, ChatRequest, ReductionDefaults, read_chat_request
from framefusion.runtime.text.prompt import Turn, Visual

_log = logging.getLogger("framefusion.server")
RETRY_SECONDS = 1
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServiceSettings:
    """How much one server does at once.

    Attributes:
        model: the name under which the bundle answers.
        max_waiting: requests at most that are read or wait for the engine; more are turned away.
        max_running: requests at most that are decoded at once.
        cache_budget: bytes of keys and values, of running requests and of kept conversations together.
        request_seconds: for one request, from its first byte to its last.
        reduction: of requests that do not say.
        metrics_prefix: of the names of metrics.
    """

    model: str
    max_waiting: int = 16
    max_running: int = 8
    cache_budget: int = 2 << 30
    request_seconds: float = 600.0
    reduction: ReductionDefaults = NO_DEFAULTS
    metrics_prefix: str = "framefusion:"


@dataclass(eq=False)
class ChatJob(Job):
    """One request for an answer, once its media are decoded.

    Attributes:
        conversation: that it continues, nobody else's meanwhile; gone once the job is finished.
        turns, files: what is new.
        request: how it is answered.
        keys: of all turns, with which the conversation is found again.
        warnings: about what is shown.
        since: when the request came, on `time.monotonic`'s clock.
        media_seconds: that fetching and decoding took.
        show: keep what a drawing of the answer needs.
        reading: has taken the files, if they were read while others were decoded.
    """

    conversation: Conversation = field(repr=False)
    turns: Sequence[Turn]
    files: Sequence[Source]
    request: Request
    keys: Sequence[TurnKey]
    warnings: Sequence[str]
    since: float
    service: Service
    media_seconds: float = 0.0
    show: bool = False
    reading: VisualReading | None = None
    report: PrefillReport | None = None
    new_tokens: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[Step | BaseException | None] = asyncio.Queue()
        self._text: list[str] = []
        self._taken: list[Step] = []
        self._ended = False
        self._finished = False
        self._call: Callable[[], None] | None = None
        self._queued = time.monotonic()
        self._last = self.since
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """What its prefill left in the caches, with room for its answer."""
        return self._nbytes

    def start(self) -> Generator[Step, None, None]:
        """The answer's steps."""
        return self.conversation.session.stream(self.turns, self.files, self.request, reading=self.reading)

    def give(self, step: Step) -> None:
        """Count a step, and hand it on."""
        now = time.monotonic()
        metrics = self.service.metrics
        if step.prefill is not None:
            self.report = step.prefill
            manifest = self.service.pipeline.manifest
            most = manifest.limits.max_kv_cache_capacity  # clients may ask for more tokens than there is room for
            slots = sum(min(length + self.request.max_new_tokens, most) for length in step.prefill.kv_lengths)
            self._nbytes = slots * slot_bytes(manifest)
            self.files = ()  # pixels are large, and spent
            metrics.prefilled(step.prefill, now - self._queued)
        if step.token_id is not None:
            metrics.token(now - self._last, first=self.new_tokens == 0)
            self._last = now
            self.new_tokens += 1
        self._text.append(step.text)
        if self.show:
            self._taken.append(step)
        if step.finish_reason is not None:
            self._ended = True
            metrics.finished(step.finish_reason, now - self.since, self.seconds(step))
        self._put(step)

    def seconds(self, step: Step) -> dict[str, float]:
        """Seconds by stage until a step: `media` for fetching and decoding apart, `video` is nothing then."""
        stages = {"media": self.media_seconds, **step.seconds}
        stages.pop("video", None)
        return stages

    def drawing(self) -> str | None:
        """What stays of the films as HTML, once the answer has ended; None where nobody wants it."""
        return Generation.from_steps(self._taken).to_html() if self.show else None

    def finish(self, error: BaseException | None) -> None:
        """Give the conversation back, longer by this turn if it came to its end."""
        if self._ended:
            self.conversation.turns = (*self.keys, answer_key("".join(self._text)))
        self.service.conversations.give_back(self.conversation)
        if self.reading is not None:
            self.reading.give_up()
        del self.conversation  # its caches are large, and whoever holds the job still needs none of them
        self._put(error)
        with suppress(RuntimeError):  # the loop is closed: nobody counts any more
            self._loop.call_soon_threadsafe(self._on_finished)

    def _put(self, item: Step | BaseException | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._steps.put_nowait, item)

    def when_finished(self, call: Callable[[], None]) -> None:
        """Call this on the loop once the engine holds nothing of the job any more, at once if that is so."""
        self._call = call
        if self._finished:
            call()

    def _on_finished(self) -> None:
        self._finished = True
        if self._call is not None:
            self._call()

    async def steps(self) -> AsyncIterator[Step]:
        """The steps as they come.

        Raises:
            FrameFusionError: the request failed.
            ClosedError: the server ends before the answer does.
        """
        ended = False
        while (item := await self._steps.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            ended = ended or item.finish_reason is not None
            yield item
        if not ended:
            raise ClosedError("the answer was stopped before its end: ask again")


@dataclass
class Service:
    """One bundle with all that answers requests about it.

    Attributes:
        pipeline: of the bundle.
        reader: of what clients show.
        settings: limits.
        is_draining: whether the server is about to end, and takes no more.
    """

    pipeline: Pipeline
    reader: MediaReader
    settings: ServiceSettings
    admitted: int = 0
    is_draining: Callable[[], bool] = lambda: False
    metrics: Metrics = field(init=False)
    _reported: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        settings = self.settings
        segments = self.pipeline.segments
        self.turns_reason = segments.batch_refusal
        batch = None if self.turns_reason else DecodeBatch(segments, lambda rows: self.metrics.decoded(rows))
        self.conversations = Conversations(self.pipeline, settings.cache_budget, batch)
        most = settings.max_running
        if batch is not None and segments.max_batch_size is not None:
            most = min(most, segments.max_batch_size)
        self.engine = Engine(most, settings.cache_budget, self.conversations.make_room)
        self.ahead = ReadingAhead(self.pipeline, self.reader, self.engine)
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "num_requests_running": ("Requests that are decoded.", lambda: self.engine.running),
            "num_requests_waiting": ("Requests before their prefill.", lambda: self.admitted - self.engine.running),
            "kv_cache_usage_perc": (
                "Share of the cache budget that kept conversations take.",
                lambda: self.conversations.nbytes / settings.cache_budget,
            ),
            "conversations": ("Conversations that are kept.", lambda: len(self.conversations)),
            "evicted_conversations": ("Conversations that went for room.", lambda: self.conversations.evicted),
        }
        self.metrics = Metrics(settings.metrics_prefix, gauges)
        self._threads = ThreadPoolExecutor(settings.max_waiting + settings.max_running, "request")

    def start(self) -> None:
        """Begin to answer; says once where requests are decoded in turns, and what changes that."""
        if self.turns_reason is not None:
            _log.warning("requests decode in turns, not together: %s", self.turns_reason)
        self.engine.start()

    def close(self) -> None:
        """Stop what runs and free what is held."""
        self.engine.close()
        self.reader.close()
        self._threads.shutdown(cancel_futures=True)
        self.conversations.clear()

    def admit(self) -> None:
        """Take a place among the requests that are worked on; `leave` frees it.

        Raises:
            RequestError: there is none: status 429, or 503 where the server is about to end.
        """
        if self.is_draining():
            raise RequestError("the server is about to end: ask another one, or later", status=503)
        most = self.settings.max_waiting + self.settings.max_running
        if self.admitted >= most:
            raise RequestError(f"{most} requests are being answered, no more are taken: ask again later", status=429)
        self.admitted += 1

    def leave(self) -> None:
        """Free the place that `admit` took."""
        self.admitted -= 1

    async def read(self, body: bytes) -> ChatRequest:
        """The request in a body; large ones are read beside the loop.

        Raises:
            RequestError: it is no JSON, malformed, or about another model.
        """
        return await self._apart(self._read, body)

    async def _apart(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run something that takes long on a thread, of which there is one for each request."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    @asynccontextmanager
    async def _folder(self) -> AsyncIterator[Path]:
        """A folder for what one request shows, made and removed beside the loop: films of 256 MiB take their time."""
        folder = await self._apart(partial(TemporaryDirectory, prefix="framefusion-"))
        try:
            yield Path(folder.name)
        finally:
            try:
                await self._apart(folder.cleanup)
            except RuntimeError:  # the threads ended meanwhile
                folder.cleanup()

    def _read(self, body: bytes) -> ChatRequest:
        """The request in a body."""
        try:
            given: Any = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is no JSON ({type(error).__name__}): send an object in UTF-8") from None
        chat = read_chat_request(given, self.settings.reduction)
        if chat.model is not None and chat.model != self.settings.model:
            raise RequestError(
                f"the model {chat.model[:120]!r} is not here: ask for {self.settings.model!r}",
                param="model",
                status=404,
            )
        for name in set(chat.ignored) - self._reported:
            if len(self._reported) < 1000:  # names are the clients': no end of them is kept
                self._reported.add(name)
                _log.warning("the field %.120s of a request is unknown and ignored", name)
        return chat

    async def submit(self, chat: ChatRequest, cancelled: Callable[[], bool], since: float) -> ChatJob:
        """Open and decode what a request shows, and queue it.

        Raises:
            RequestError, VideoError: something cannot be shown.
        """
        begun_at = time.monotonic()
        turns = [Turn(message.role, [_part(part) for part in message.parts]) for message in chat.messages]
        async with self._folder() as folder:
            # 1. Fetch, and know again.
            parts = await self._apart(self.reader.open, chat.media, folder, cancelled)
            keys = turn_keys(turns, [part.key for part in parts], f"{chat.request.cost} {chat.request.reducer}")
            # 2. Continue the conversation that has the most of it in its caches.
            conversation = self.conversations.take(keys, chat.session_id)
            try:
                begun = len(conversation.turns)
                shown = sum(_shows(turn) for turn in turns[:begun])
                images = sum(part.part.kind is Visual.IMAGE for part in parts)
                # 3. Decode what is new; the tower may have what is there while the rest is decoded.
                reading = self.ahead.begin(conversation.session, turns[begun:])
                if reading is None:
                    decoded = await self._apart(self.reader.decode, parts[shown:], images, cancelled)
                else:
                    decoded = await self.ahead.decode(reading, parts[shown:], images, cancelled)
            except BaseException:
                self.conversations.give_back(conversation)
                raise
        warnings = [warning for media in decoded for warning in media.warnings]
        job = ChatJob(
            conversation,
            turns[begun:],
            [media.media for media in decoded],
            chat.request,
            keys,
            warnings,
            since,
            self,
            media_seconds=time.monotonic() - begun_at - (_worked_seconds(reading) if reading else 0.0),
            show=chat.show,
            reading=reading,
        )
        self.engine.submit(job)
        return job


def _worked_seconds(reading: VisualReading) -> float:
    """Of stages that have a name of their own; what the tower waited for frames is time of the media."""
    return sum(seconds for stage, seconds in reading.seconds.items() if stage != "video")


def _part(part: str | MediaPart) -> str | Visual:
    return part if isinstance(part, str) else part.kind


def _shows(turn: Turn) -> int:
    """Films and pictures in a turn."""
    return sum(isinstance(part, Visual) for part in turn.parts)
