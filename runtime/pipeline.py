"""A bundle and a conversation in, text out: the main path of the runtime, readable in one sitting.

turns, files -> frames -> patches -> vision graph -> rows of visual tokens
             -> token ids -> rows of the embedding table, visual rows put in their places
             -> prefill through the segments -> decode -> sampling -> text
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import PromptError
from framefusion.reduction.policy import Observer, ReductionState
from framefusion.runtime.backends.base import Backend
from framefusion.runtime.backends.choice import Choice, choose
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.bundle_files import place
from framefusion.runtime.format.manifest import ReductionRecord
from framefusion.runtime.format.manifest_checks import TOKENIZER
from framefusion.runtime.generation.decode import ActiveRequest, Decoder
from framefusion.runtime.generation.embedder import Embedder
from framefusion.runtime.generation.embedding import Embedding
from framefusion.runtime.generation.fixed_prefill import prefill_fixed
from framefusion.runtime.generation.prefill import Prefilled, prefill, start_reduction
from framefusion.runtime.generation.segments import Segments
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.preprocess import Preprocessing
from framefusion.runtime.media.sources import Source, as_image, as_video
from framefusion.runtime.media.video.frames import Video, VideoFacts, facts_of_films
from framefusion.runtime.media.visual_input import VisualInput
from framefusion.runtime.request import Generation as Generation
from framefusion.runtime.request import PrefillReport, Stopwatch
from framefusion.runtime.request import Request as Request
from framefusion.runtime.request import Step as Step
from framefusion.runtime.text.positions import decode_positions
from framefusion.runtime.text.prompt import (
    Prompt,
    Turn,
    Visual,
    as_turns,
    build_prompt,
    check_length,
    check_texts,
    layout_texts,
)
from framefusion.runtime.text.sampling import Sampler
from framefusion.runtime.text.tokenizer import StoppableText, Tokenizer

Media = Video | NDArray[np.uint8]
"""A video as it was sampled, or an image [H, W, 3]."""


class Pipeline:
    """One bundle, ready to answer. Holds no state of a request, so one object serves many.

    Args:
        bundle: read and verified.
        backend: what executes the graphs; None opens what `choice` says.
        threads: of one operator on the CPU; 0 takes the physical cores.
        choice: among the backends; None takes the best for this bundle and machine.
        limits: of the files that are read; None takes `MediaLimits()`.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend | None = None,
        threads: int = 0,
        choice: Choice | None = None,
        limits: MediaLimits | None = None,
    ) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.choice: Choice | None = None
        if backend is None:
            self.choice = choice or choose(bundle)
            backend = self.choice.open(bundle, threads)
        self.backend: Backend = backend
        self.limits = limits or MediaLimits()
        layout = layout_texts(self.manifest.prompt, self.manifest.preprocessing)
        self.tokenizer = Tokenizer.from_file(place(bundle.folder, TOKENIZER), layout)
        self.embedding = Embedding(bundle.folder, self.manifest.embedding)
        self.embedder = Embedder(self.manifest, self.embedding, self.backend)
        self.segments = Segments(self.manifest, self.backend)
        self.backend.open(bundle.graphs)

    def read_visuals(
        self, turns: Sequence[Turn], files: Sequence[Source], sampling: FrameSampling, stopwatch: Stopwatch
    ) -> list[VisualInput]:
        """What the turns show, in their order, preprocessed."""
        return self.preprocess(self.decode_media(turns, files, sampling, stopwatch, whole=False), stopwatch)

    def decode_media(
        self,
        turns: Sequence[Turn],
        files: Sequence[Source],
        sampling: FrameSampling,
        stopwatch: Stopwatch,
        whole: bool = True,
    ) -> list[Media]:
        """Videos and images that the turns show, in their order, as they are in the files.

        Args:
            turns: of the conversation.
            files: one source for each Visual of the turns.
            sampling: of a video's frames.
            stopwatch: gets the stage "video".
            whole: keep frames of films at their size, or only as large as the family shows them.

        Raises:
            PromptError: turns and files disagree.
            VideoError: a file is none of a kind that is read, is damaged or beyond `limits`.
        """
        turns = as_turns(turns)
        kinds = [part for turn in turns for part in turn.parts if isinstance(part, Visual)]
        if isinstance(files, (str, bytes, Path)):
            raise PromptError(f"files is one name, {str(files)[:120]!r}: give a list of what the turns show")
        if len(kinds) != len(files):
            raise PromptError(
                f"the conversation shows {len(kinds)} video(s) and image(s), {len(files)} were given: "
                "give one source for each Visual of the turns"
            )
        shrink = self.manifest.preprocessing.for_images(kinds.count(Visual.IMAGE)).shrink
        media: list[Media] = []
        for kind, file in zip(kinds, files, strict=True):
            with stopwatch.stage("video"):
                if kind is Visual.VIDEO:
                    media.append(as_video(file, sampling, self.limits, None if whole else shrink))
                else:
                    media.append(as_image(file, self.limits))
        return media

    def preprocessor(self, media: Sequence[Media]) -> Preprocessing:
        """What turns the videos and images of one conversation into patches; their number may change how."""
        return self.manifest.preprocessing.for_images(sum(not isinstance(shown, Video) for shown in media))

    def preprocess(self, media: Sequence[Media], stopwatch: Stopwatch) -> list[VisualInput]:
        """Patches and pieces of the prompt for videos and images of one conversation."""
        visuals = list[VisualInput]()
        videos = 0
        images = 0
        preprocessor = self.preprocessor(media)
        for shown in media:
            with stopwatch.stage("preprocess"):
                if isinstance(shown, Video):
                    visuals.append(preprocessor.video(shown, videos))
                    videos += 1
                else:
                    visuals.append(preprocessor.image(shown, images))
                    images += 1
        return visuals

    def read(self, turns: Sequence[Turn], files: Sequence[Source] = ()) -> tuple[Prompt, TokenRows]:
        """A conversation up to the prefill: for asking the same thing in several ways."""
        turns = as_turns(turns)
        visuals = self.read_visuals(turns, files, self.manifest.sampling, Stopwatch())
        prompt = self.prompt(turns, visuals)
        return prompt, self.embed(prompt, [self.encode_visual(visual) for visual in visuals])

    def prompt(self, turns: Sequence[Turn], visuals: Sequence[VisualInput]) -> Prompt:
        """Tokens, labels and positions of a conversation.

        Raises:
            PromptError: it is longer than the bundle takes.
        """
        check_texts(turns, self.tokenizer, self.manifest.limits.max_input_len)
        prompt = build_prompt(self.manifest.prompt, self.tokenizer, turns, visuals, self.manifest.embedding.extra)
        check_length(prompt, self.manifest.limits.max_input_len)
        return prompt

    def encode_visual(self, visual: VisualInput) -> Any:
        """Rows [1+K, n, D] of one video or image: see `Embedder.encode_visual`."""
        return self.embedder.encode_visual(visual)

    def embed(self, prompt: Prompt, visual_rows: Sequence[Any]) -> TokenRows:
        """Rows of all S tokens of a prompt, with their rotary tables: see `Embedder.embed`."""
        return self.embedder.embed(prompt, visual_rows)

    def rope(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin [S, hd/2] of positions [3, S]."""
        return self.embedder.rope(positions)

    def reduction(self, prompt: Prompt, request: Request) -> ReductionState | None:
        """The reducer's state for a request; None where the bundle does not reduce between segments.

        Raises:
            ReducerError: the reducer asked is unknown, or acts where this bundle is not cut.
        """
        return start_reduction(self.manifest, prompt.labels, request)

    def prefill(
        self,
        prompt: Prompt,
        rows: TokenRows,
        request: Request,
        stopwatch: Stopwatch,
        observer: Observer | None = None,
    ) -> Prefilled:
        """Run a prompt through the segments, reduced as the request says.

        `observer` is told each decision; the static graph of the fixed mode decides inside and tells none.
        """
        reduction = self.reduction(prompt, request)
        if reduction is not None:
            reduction.observer = observer
        if self.manifest.reduction.mode == "fixed":
            return prefill_fixed(self.segments, rows, prompt.labels, request.max_new_tokens, stopwatch)
        return prefill(self.segments, rows, reduction, request.max_new_tokens, stopwatch)

    def stream(
        self,
        turns: Sequence[Turn],
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
            turns: what was said, the last one the user's.
            files: the videos and images that the turns show, in order: see `framefusion.runtime.media.sources`.
            request: limits, reduction and sampling of tokens.
            sampling: of frames; None takes the bundle's.
            logits: give those of each token, too, a copy.

        Raises:
            VideoError, PromptError, BudgetError: see `framefusion.errors`.
        """
        stopwatch = Stopwatch()
        request = request or Request()
        turns = as_turns(turns)
        # 1. Files to frames, no larger than the family shows them: a film's own pixels would fill the memory.
        media = self.decode_media(turns, files, sampling or self.manifest.sampling, stopwatch, whole=False)
        videos = facts_of_films(media)
        # 2. Frames to patches and pieces of the prompt; pixels are large, and spent.
        visuals = self.preprocess(media, stopwatch)
        del media
        # 3. Turns to token ids, labels and positions; refuse what is too long before the vision tower has worked.
        prompt = self.prompt(turns, visuals)
        request = self.clamp_new_tokens(request, prompt)
        # 4. Patches to visual tokens, and all tokens to rows on the device; features are large, and spent.
        with stopwatch.stage("vision"):
            visual_rows = [self.encode_visual(visual) for visual in visuals]
        with stopwatch.stage("embed"):
            rows = self.embed(prompt, visual_rows)
        del visuals, visual_rows
        # 5. Rows through the segments, reduced between them: what stays is in the caches.
        prefilled = self.prefill(prompt, rows, request, stopwatch)
        del rows
        # 6. Logits to tokens and text, one step each.
        yield from self.decode(prompt, prefilled, request, stopwatch, videos=videos, logits=logits)

    def generate(
        self,
        turns: Sequence[Turn],
        files: Sequence[Source] = (),
        request: Request | None = None,
        *,
        sampling: FrameSampling | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Answer a conversation: `stream`, run to its end.

        Args:
            turns: what was said, the last one the user's.
            files: the videos and images that the turns show, in order: see `framefusion.runtime.media.sources`.
            request: limits, reduction and sampling of tokens.
            sampling: of frames; None takes the bundle's.
            on_text: called with each new piece of text.

        Raises:
            VideoError, PromptError, BudgetError: see `framefusion.errors`.
        """
        return Generation.from_steps(self.stream(turns, files, request, sampling=sampling), on_text)

    def answer(
        self, prompt: Prompt, rows: TokenRows, request: Request, stopwatch: Stopwatch | None = None
    ) -> Generation:
        """Answer a prompt whose rows are at hand: `generate` without files and vision."""
        stopwatch = stopwatch or Stopwatch()
        request = self.clamp_new_tokens(request, prompt)
        prefilled = self.prefill(prompt, rows, request, stopwatch)
        return Generation.from_steps(self.decode(prompt, prefilled, request, stopwatch))

    def decode(
        self,
        prompt: Prompt,
        prefilled: Prefilled,
        request: Request,
        stopwatch: Stopwatch,
        *,
        videos: tuple[VideoFacts, ...] = (),
        logits: bool = False,
    ) -> Generator[Step, None, None]:
        """The steps behind a prefill of the same request, whose new tokens fit the caches (`clamp_new_tokens`).

        Args:
            prompt: that was prefilled.
            prefilled: its caches, which grow, and the logits of its last token.
            request: as for the prefill.
            stopwatch: gets the stage "decode".
            videos: for the report.
            logits: give those of each token, too.
        """
        # 1. Report the prefill at once: whoever waits for the first token can see what it waited for.
        lengths = tuple(int(length) for cache in prefilled.caches for length in cache.lengths)
        report = PrefillReport(prompt.token_ids.size, prompt.num_visual, tuple(prefilled.history), lengths, videos)
        yield Step("prefilled", prefill=report, seconds=dict(stopwatch.seconds))
        # 2. Bind the segments once; all that belongs to this request is in one object.
        with stopwatch.stage("decode"):
            active = self.activate(prompt, request)
            decoder = Decoder(self.segments, prefilled.caches)
            last = prefilled.logits
        while True:
            # 3. Choose a token and give it away before the next one is computed.
            with stopwatch.stage("decode"):
                text = active.accept(last)
            token_id = active.token_ids[-1]
            scores = last.copy() if logits else None  # the buffer is the next step's
            yield Step("token", text, token_id, scores, seconds=dict(stopwatch.seconds))
            if active.finish_reason is not None:
                break
            # 4. Feed it back.
            with stopwatch.stage("decode"):
                last = decoder.step(self.embedding(np.array([token_id]))[0], *active.rotary)
        # 5. Say what was held back: half a character, or what might have become a stop string.
        rest = active.flush()
        yield Step("end", rest, finish_reason=active.finish_reason, seconds=dict(stopwatch.seconds))

    def activate(self, prompt: Prompt, request: Request) -> ActiveRequest:
        """A request that was prefilled, ready to choose its first token.

        Raises:
            PromptError: a stop string is empty.
        """
        config = (
            self.manifest.generation
            if request.generation is None
            else request.generation.over(self.manifest.generation)
        )
        # a table may have more rows than the tokenizer has tokens: nothing was ever trained to say those
        limit = min(self.manifest.model.vocab_size, self.tokenizer.vocab_size)
        length = prompt.token_ids.size
        rotary = self.rope(decode_positions(length, prompt.rope_delta, request.max_new_tokens))
        sampler = Sampler(config, request.seed, limit, length)
        text = StoppableText(self.tokenizer.stream(), request.stop)
        return ActiveRequest(
            prompt.token_ids, rotary, sampler, text, config.eos_token_ids or (), request.max_new_tokens
        )

    def clamp_new_tokens(self, request: Request, prompt: Prompt) -> Request:
        """The request with no more new tokens than the bundle's caches hold behind a prompt.

        Raises:
            PromptError: not one fits.
        """
        room = self.manifest.limits.max_kv_cache_capacity - prompt.token_ids.size
        if request.max_new_tokens < 1 or room < 1:
            raise PromptError(
                f"{request.max_new_tokens} new tokens after {prompt.token_ids.size} of prompt, the bundle holds "
                f"{self.manifest.limits.max_kv_cache_capacity}: ask for 1 to {max(room, 1)}"
            )
        return replace(request, max_new_tokens=min(request.max_new_tokens, room))


def dense_pipeline(pipeline: Pipeline) -> Pipeline:
    """In the fixed mode the decoding graphs, which take any length and reduce nothing; else the pipeline itself."""
    manifest = pipeline.manifest
    if manifest.reduction.mode != "fixed":
        return pipeline
    segments = tuple(replace(s, graph=s.decode, decode_graph=None) for s in manifest.segments)
    plain = pipeline.bundle.seen_as(segments=segments, fixed=None, reduction=ReductionRecord("none"))
    return Pipeline(plain, pipeline.backend)
