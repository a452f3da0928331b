"""A bundle and a conversation in, text out: the main path of the runtime, readable in one sitting.

turns, files -> frames -> patches -> vision graph -> rows of visual tokens
             -> token ids -> rows of the embedding table, visual rows put in their places
             -> prefill through the segments -> decode -> sampling -> text
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import PromptError
from framefusion.reducers import load_reducer
from framefusion.reducers.reducer import ReductionRequest, check_cuts
from framefusion.reduction.policy import Observer, ReductionSettings, ReductionState
from framefusion.runtime.backends.base import Backend
from framefusion.runtime.backends.choice import Choice, choose
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.bundle_files import place
from framefusion.runtime.format.manifest import ReductionRecord
from framefusion.runtime.format.manifest_checks import TOKENIZER
from framefusion.runtime.generation.decode import Decoder
from framefusion.runtime.generation.embedder import Embedder
from framefusion.runtime.generation.embedding import Embedding
from framefusion.runtime.generation.fixed_prefill import prefill_fixed
from framefusion.runtime.generation.prefill import Prefilled, prefill
from framefusion.runtime.generation.segments import Segments
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.preprocess import Preprocessing
from framefusion.runtime.media.sources import Source, as_image, as_video
from framefusion.runtime.media.video.frames import Video, facts_of_films
from framefusion.runtime.media.visual_input import VisualInput
from framefusion.runtime.request import Generation as Generation
from framefusion.runtime.request import Request as Request
from framefusion.runtime.request import Stopwatch
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
from framefusion.runtime.text.sampling import GenerationConfig, Sampler
from framefusion.runtime.text.tokenizer import Tokenizer

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
        record = self.manifest.reduction
        if record.mode != "adaptive":
            if request.cost not in (None, record.cost) or request.reducer not in (None, record.reducer):
                value = request.reducer or request.cost
                raise PromptError(
                    f"this bundle's reduction is {record.mode}, its reducer {record.reducer} and its cost "
                    f"{record.cost} are built in, {value} was asked: build with --reduction adaptive to choose at run "
                    "time"
                )
            return None
        settings = ReductionSettings(
            record.cost if request.cost is None else request.cost,
            _given(request.similarity_lower_bound, record.similarity_lower_bound),
            _given(request.ratio_lower_bound, record.ratio_lower_bound),
            self.manifest.model.num_layers,
            record.depth or 0,
        )
        reducer = load_reducer(request.reducer or record.reducer)
        check_cuts(reducer, settings, self.manifest.calls, record.reducer)
        if settings.cost == 1.0:
            return None
        return reducer.start(ReductionRequest(settings, prompt.labels, request.seed or 0))

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

    def generate(
        self,
        turns: Sequence[Turn],
        files: Sequence[Source] = (),
        request: Request | None = None,
        *,
        sampling: FrameSampling | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Answer a conversation.

        Args:
            turns: what was said, the last one the user's.
            files: the videos and images that the turns show, in order: see `framefusion.runtime.media.sources`.
            request: limits, reduction and sampling of tokens.
            sampling: of frames; None takes the bundle's.
            on_text: called with each new piece of text.

        Raises:
            VideoError, PromptError, BudgetError: see `framefusion.errors`.
        """
        stopwatch = Stopwatch()
        request = request or Request()
        turns = as_turns(turns)
        media = self.decode_media(turns, files, sampling or self.manifest.sampling, stopwatch, whole=False)
        videos = facts_of_films(media)
        visuals = self.preprocess(media, stopwatch)
        del media  # pixels are large, and spent
        prompt = self.prompt(turns, visuals)
        self.clamp_new_tokens(request, prompt)  # refuse before the vision tower has worked
        with stopwatch.stage("vision"):
            visual_rows = [self.encode_visual(visual) for visual in visuals]
        with stopwatch.stage("embed"):
            rows = self.embed(prompt, visual_rows)
        del visuals, visual_rows  # pixels and features are large, and spent
        return replace(self.answer(prompt, rows, request, stopwatch, on_text), videos=videos)

    def answer(
        self,
        prompt: Prompt,
        rows: TokenRows,
        request: Request,
        stopwatch: Stopwatch | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Answer a prompt whose rows are at hand: `generate` without files and vision."""
        stopwatch = stopwatch or Stopwatch()
        request = self.clamp_new_tokens(request, prompt)
        return self.complete(prompt, self.prefill(prompt, rows, request, stopwatch), request, stopwatch, on_text)

    def complete(
        self,
        prompt: Prompt,
        prefilled: Prefilled,
        request: Request,
        stopwatch: Stopwatch,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Decode behind a prefill of the same bounded request."""
        kv_lengths = tuple(int(length) for cache in prefilled.caches for length in cache.lengths)
        with stopwatch.stage("decode"):
            token_ids, text = self._decode(prompt, prefilled, request, on_text)
        stopped = bool(token_ids) and token_ids[-1] in (self._config(request).eos_token_ids or ())
        return Generation(
            text, tuple(token_ids), "stop" if stopped else "length", prompt.token_ids.size, prompt.num_visual,
            tuple(prefilled.history), kv_lengths, stopwatch.seconds,
        )  # fmt: skip

    def _config(self, request: Request) -> GenerationConfig:
        own = self.manifest.generation
        return own if request.generation is None else request.generation.over(own)

    def clamp_new_tokens(self, request: Request, prompt: Prompt) -> Request:
        """The request with no more new tokens than the bundle's caches hold."""
        room = self.manifest.limits.max_kv_cache_capacity - prompt.token_ids.size
        if request.max_new_tokens < 1 or room < 1:
            raise PromptError(
                f"{request.max_new_tokens} new tokens after {prompt.token_ids.size} of prompt, the bundle holds "
                f"{self.manifest.limits.max_kv_cache_capacity}: ask for 1 to {max(room, 1)}"
            )
        return replace(request, max_new_tokens=min(request.max_new_tokens, room))

    def _decode(
        self, prompt: Prompt, prefilled: Prefilled, request: Request, on_text: Callable[[str], None] | None
    ) -> tuple[list[int], str]:
        config = self._config(request)
        # a table may have more rows than the tokenizer has tokens: nothing was ever trained to say those
        limit = min(self.manifest.model.vocab_size, self.tokenizer.vocab_size)
        sampler = Sampler(config, request.seed, limit, prompt.token_ids.size)
        stream = self.tokenizer.stream()
        pieces = [""]
        seen = np.concatenate([prompt.token_ids, np.zeros(request.max_new_tokens, np.int64)])
        length = prompt.token_ids.size
        cos, sin = self.rope(decode_positions(length, prompt.rope_delta, request.max_new_tokens))
        logits = prefilled.logits
        decoder = Decoder(self.segments, prefilled.caches)
        token_ids: list[int] = []
        while True:
            index = len(token_ids)
            token_ids.append(sampler.next_token(logits, seen[: length + index]))
            seen[length + index] = token_ids[-1]
            if token_ids[-1] in (config.eos_token_ids or ()):
                break
            pieces.append(stream.push(token_ids[-1]))
            if on_text is not None and pieces[-1]:
                on_text(pieces[-1])
            if len(token_ids) == request.max_new_tokens:
                break
            logits = decoder.step(self.embedding(np.array(token_ids[-1:]))[0], cos[index], sin[index])
        pieces.append(stream.flush())
        if on_text is not None and pieces[-1]:
            on_text(pieces[-1])
        return token_ids, "".join(pieces)


def dense_pipeline(pipeline: Pipeline) -> Pipeline:
    """In the fixed mode the decoding graphs, which take any length and reduce nothing; else the pipeline itself."""
    manifest = pipeline.manifest
    if manifest.reduction.mode != "fixed":
        return pipeline
    segments = tuple(replace(s, graph=s.decode, decode_graph=None) for s in manifest.segments)
    plain = pipeline.bundle.seen_as(segments=segments, fixed=None, reduction=ReductionRecord("none"))
    return Pipeline(plain, pipeline.backend)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
