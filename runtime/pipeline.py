"""A bundle and a conversation in, text out: the main path of the runtime, readable in one sitting.

turns, files -> frames -> patches -> vision graph -> rows of visual tokens
             -> token ids -> rows of the embedding table, visual rows put in their places
             -> prefill through the segments -> decode -> sampling -> text
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from framefusion.errors import ClosedError
from framefusion.runtime.backends.base import Backend
from framefusion.runtime.backends.choice import Choice
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.concurrency.step_runner import gather_answer
from framefusion.runtime.format.manifest import Manifest, ReductionRecord
from framefusion.runtime.generation.batching.decode_batch import DecodeBatch
from framefusion.runtime.generation.stages import Stages, prefill_report
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.generation.visuals.visual_stages import Media as Media
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.sources import Source
from framefusion.runtime.proof.opening import open_proven
from framefusion.runtime.request import Generation as Generation
from framefusion.runtime.request import Request as Request
from framefusion.runtime.request import Step as Step
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.session import Session
from framefusion.runtime.text.messages import Conversation, read_conversation
from framefusion.runtime.text.prompt import Prompt, visuals_of

_HELD = ("backend", "embedder", "embedding", "segments", "tokenizer")
"""What a pipeline frees when it is closed: graphs with their weights, buffers, tables."""


class Pipeline(Stages):
    """One bundle, ready to answer. Holds no state of a request, so one object serves many.

        with Pipeline("bundle") as pipeline:  # closed at the end: frees graphs and the memory of the device
            answer = pipeline.generate("What happens?", ["clip.mp4"])
            print(answer, answer.cost, answer.kept(-1))

    `generate` gives the whole answer and `stream` its steps, `agenerate` and `astream` the same to asyncio; `chat`
    begins a conversation that reads its films once. Threads and tasks may use one pipeline: a step, which is a prefill
    or a token, is computed for one of them at a time, in turns.

    Args:
        bundle: read and verified, or its folder, which is opened as `Bundle` does.
        backend: what executes the graphs; None opens what `choice` says.
        threads: of one operator on the CPU; 0 takes the physical cores it has.
        choice: among the backends; None takes the best that is right on this device: see runtime/proof.
        limits: of the files that are read; None takes `MediaLimits()`.
        overlap: decode the next film of a request while the tower has the one before it; None does where graphs run on
            a device, or `threads` leaves cores free. Answers are the same.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        backend: Backend | None = None,
        threads: int = 0,
        choice: Choice | None = None,
        limits: MediaLimits | None = None,
        overlap: bool | None = None,
    ) -> None:
        if not isinstance(bundle, Bundle):
            bundle = Bundle(bundle)
        if backend is None and choice is None:
            choice, backend = open_proven(bundle, threads=threads)
        self.choice = choice
        if backend is None and choice is not None:
            backend = choice.open(bundle, threads)
        assert backend is not None  # it was given, or there is a choice
        super().__init__(bundle, backend, limits or MediaLimits(), overlap)

    def __repr__(self) -> str:
        state = f"on {self.backend.name}" if "backend" in vars(self) else "closed"
        return f"<Pipeline {state}: {self.bundle!r}>"

    def close(self) -> None:
        """Free what was opened for the bundle. A backend that the caller gave lives as long as others hold it.

        Whoever uses the pipeline or one of its sessions afterwards gets a `ClosedError`; closing again does nothing. A
        step that another thread computes is waited for.
        The keys and values of a session are freed with the session.
        """
        with self.runner.turn():  # no thread is within a step
            for name in _HELD:
                vars(self).pop(name, None)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    if not TYPE_CHECKING:  # else every attribute would be known to a type checker

        def __getattr__(self, name: str) -> object:
            if name in _HELD:
                raise ClosedError(f"the pipeline of {self.bundle.folder} was closed: open another one to answer more")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def read(
        self, turns: Conversation, files: Sequence[Source] = (), *, sampling: FrameSampling | None = None
    ) -> tuple[Prompt, TokenRows]:
        """A conversation up to the prefill, a prompt of S tokens and their rows [S, D], for `answer`.

        A film is read and encoded once, whatever costs and reducers are tried on it.

        Raises:
            VideoError, PromptError: see `framefusion.errors`.
        """
        turns, files = read_conversation(turns, files)
        with self.runner.turn():
            read = self.read_media(turns, files, sampling or self.manifest.sampling, Stopwatch())
            prompt = self.prompt(turns, read.visuals)
            return prompt, self.embed(prompt, self.encode_rest(read.visuals, read.rows))

    def stream(
        self,
        turns: Conversation,
        files: Sequence[Source] = (),
        request: Request | None = None,
        *,
        sampling: FrameSampling | None = None,
        logits: bool = False,
    ) -> Generator[Step, None, None]:
        """Answer a conversation step by step: one step behind the prefill, one for each token, one at the end.

        Nothing happens before the first step is asked for. Whoever has enough closes the generator (or drops it):
        caches are freed, and the pipeline is as before.

        Args:
            turns: what was said, the last one the user's: a text, turns, or messages as Hugging Face's chat templates
                take them; see `framefusion.runtime.text.messages`.
            files: the videos and images that are shown, in order: see `framefusion.runtime.media.sources`.
            request: limits, reduction and sampling of tokens.
            sampling: of frames; None takes the bundle's.
            logits: give those of each token, too, a copy.

        Raises:
            VideoError, PromptError, BudgetError: see `framefusion.errors`.
        """
        return self.runner.steps(self._steps(turns, files, request, sampling, logits))

    def _steps(
        self,
        turns: Conversation,
        files: Sequence[Source],
        request: Request | None,
        sampling: FrameSampling | None,
        logits: bool,
    ) -> Generator[Step, None, None]:
        """The steps of `stream`."""
        stopwatch = Stopwatch()
        request = request or Request()
        turns, files = read_conversation(turns, files)
        # 1. File after file to frames, patches and pieces of the prompt: pixels are large, and spent before the next.
        read = self.read_media(turns, files, sampling or self.manifest.sampling, stopwatch)
        # 2. Turns to token ids, labels and positions; refuse what is too long before the tower has had the last film.
        prompt = self.prompt(turns, read.visuals)
        request = self.with_default_cost(self.clamp_new_tokens(request, prompt), visuals_of(turns))
        videos = read.videos
        shown = read.thumbnails
        # 3. Patches to visual tokens, and all tokens to rows on the device; features are large, and spent.
        with stopwatch.stage("vision"):
            visual_rows = self.encode_rest(read.visuals, read.rows)
        del read
        with stopwatch.stage("embed"):
            rows = self.embed(prompt, visual_rows)
        del visual_rows
        # 4. Rows through the segments, reduced between them: what stays is in the caches.
        prefilled = self.prefill(prompt, rows, request, stopwatch)
        del rows
        # 5. Logits to tokens and text, one step each.
        report = prefill_report(prompt, prefilled, videos, shown)
        yield from self.decode(prompt, prefilled, request, stopwatch, report=report, logits=logits)

    def generate(
        self,
        turns: Conversation,
        files: Sequence[Source] = (),
        request: Request | None = None,
        *,
        sampling: FrameSampling | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Answer a conversation: `stream`, run to its end.

        Args:
            turns: what was said, the last one the user's: a text, turns, or messages as Hugging Face's chat templates
                take them; see `framefusion.runtime.text.messages`.
            files: the videos and images that are shown, in order: see `framefusion.runtime.media.sources`.
            request: limits, reduction and sampling of tokens, such as Request(max_new_tokens=64, cost=0.3).
            sampling: of frames; None takes the bundle's, `manifest.sampling.spread(16)` shows 16 of them.
            on_text: called with each new piece of text.

        Raises:
            VideoError, PromptError, BudgetError: see `framefusion.errors`.
        """
        return Generation.from_steps(self.stream(turns, files, request, sampling=sampling), on_text)

    def astream(
        self,
        turns: Conversation,
        files: Sequence[Source] = (),
        request: Request | None = None,
        *,
        sampling: FrameSampling | None = None,
        logits: bool = False,
    ) -> AsyncGenerator[Step, None]:
        """`stream` for asyncio: `async for step in pipeline.astream(...)`, while the event loop runs on.

        A worker thread computes the steps, those of several tasks in turns. A task that is cancelled, or that closes
        the generator (`aclose`), returns at once; the step that is being computed is the last one, and caches are freed
        behind it.

        Args:
            turns: see `stream`, as all that follows.
            files: the videos and images that are shown, in order.
            request: limits, reduction and sampling of tokens.
            sampling: of frames; None takes the bundle's.
            logits: give those of each token, too, a copy.

        Raises:
            VideoError, PromptError, BudgetError: see `framefusion.errors`.
        """
        return self.runner.async_steps(self._steps(turns, files, request, sampling, logits))

    async def agenerate(
        self,
        turns: Conversation,
        files: Sequence[Source] = (),
        request: Request | None = None,
        *,
        sampling: FrameSampling | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """`generate` for asyncio: `await pipeline.agenerate(...)`; see `astream`.

        Args:
            turns: see `generate`, as all that follows.
            files: the videos and images that are shown, in order.
            request: limits, reduction and sampling of tokens.
            sampling: of frames; None takes the bundle's.
            on_text: called on the loop's thread with each new piece of text.

        Raises:
            VideoError, PromptError, BudgetError: see `framefusion.errors`.
        """
        return await gather_answer(self.astream(turns, files, request, sampling=sampling), on_text)

    def session(
        self,
        *,
        sampling: FrameSampling | None = None,
        max_cache_bytes: int | None = None,
        batch: DecodeBatch | None = None,
    ) -> Session:
        """A conversation of several turns, whose caches stay: see `Session`."""
        return Session(self, sampling=sampling, max_cache_bytes=max_cache_bytes, batch=batch)

    def chat(
        self,
        *files: Source,
        request: Request | None = None,
        system: str | None = None,
        sampling: FrameSampling | None = None,
        max_cache_bytes: int | None = None,
    ) -> Session:
        """A conversation about films and pictures: `pipeline.chat("clip.mp4").ask("What happens?")`.

        Args:
            files: shown with the first message, read and encoded once.
            request: how every message is answered that brings no request along.
            system: what the system says; None leaves it to the bundle.
            sampling: of frames; None takes the bundle's.
            max_cache_bytes: see `Session`.
        """
        return Session(
            self, sampling=sampling, max_cache_bytes=max_cache_bytes, files=files, request=request, system=system
        )

    def answer(
        self, prompt: Prompt, rows: TokenRows, request: Request, stopwatch: Stopwatch | None = None
    ) -> Generation:
        """Answer a prompt whose rows are at hand, from `read`: `generate` without files and vision.

        Raises:
            PromptError, BudgetError: see `framefusion.errors`.
        """
        stopwatch = stopwatch or Stopwatch()
        request = self.clamp_new_tokens(request, prompt)
        with self.runner.turn():
            prefilled = self.prefill(prompt, rows, request, stopwatch)
        return Generation.from_steps(self.runner.steps(self.decode(prompt, prefilled, request, stopwatch)))


def requested_cost(manifest: Manifest, request: Request) -> float:
    """The share of the computation over visual tokens that a request wants kept."""
    return manifest.reduction.cost if request.cost is None else request.cost


def dense_pipeline(pipeline: Pipeline) -> Pipeline:
    """In the fixed mode the decoding graphs, which take any length and reduce nothing; else the pipeline itself."""
    manifest = pipeline.manifest
    if manifest.reduction.mode != "fixed":
        return pipeline
    segments = tuple(replace(s, graph=s.decode, decode_graph=None) for s in manifest.segments)
    plain = pipeline.bundle.with_manifest(segments=segments, fixed=None, reduction=ReductionRecord("none"))
    return Pipeline(plain, pipeline.backend, choice=pipeline.choice, limits=pipeline.limits)


def dense_request(manifest: Manifest, request: Request) -> Request:
    """The request with nothing dropped, for `dense_pipeline`; what a bundle has built in must not be asked again."""
    if manifest.reduction.mode == "adaptive":
        return replace(request, cost=1.0)
    return replace(request, cost=None, reducer=None)
