"""A bundle and a conversation in, text out: the main path of the runtime, readable in one sitting.

turns, files -> frames -> patches -> vision graph -> rows of visual tokens
             -> token ids -> rows of the embedding table, visual rows put in their places
             -> prefill through the segments -> decode -> sampling -> text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError, PromptError
from framefusion.reducers import load_reducer
from framefusion.reducers.reducer import ReductionRequest
from framefusion.reduction.policy import CallRecord, Observer, ReductionSettings, ReductionState
from framefusion.runtime.backends.base import Backend
from framefusion.runtime.backends.choice import Choice, choose
from framefusion.runtime.backends.host import HOST
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.bundle_files import place
from framefusion.runtime.format.manifest import ReductionRecord
from framefusion.runtime.format.manifest_checks import TOKENIZER
from framefusion.runtime.generation.sampling import GenerationConfig, Sampler
from framefusion.runtime.generation.stitching import Prefilled, Stitcher, Stopwatch, check_cuts
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.preprocess import Preprocessing
from framefusion.runtime.media.sources import Source, as_image, as_video
from framefusion.runtime.media.video.frames import Video, VideoFacts, facts_of_films
from framefusion.runtime.media.vision import TowerCall, tower_call
from framefusion.runtime.media.visual_input import RowMap, Tiles, VisualInput
from framefusion.runtime.text.embedding import Embedding
from framefusion.runtime.text.positions import decode_positions, rope_tables
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
from framefusion.runtime.text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 128
PATCHES_AT_ONCE = 4096  # of the vision graph: bounds its activations, large enough to keep the processor busy


Seen = Video | NDArray[np.uint8]
"""A video as it was sampled, or an image [H, W, 3]."""


@dataclass(frozen=True)
class Request:
    """What may differ from one generation to the next; None takes the bundle's own value.

    `generation` as well: what it leaves None, such as the tokens that end an answer, is as the bundle says.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    cost: float | None = None
    similarity_lower_bound: float | None = None
    ratio_lower_bound: float | None = None
    generation: GenerationConfig | None = None
    seed: int | None = None
    reducer: str | None = None  # a name of framefusion.reducers


@dataclass(frozen=True)
class Generation:
    """An answer and how it came about."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop" or "length"
    prompt_tokens: int
    visual_tokens: int
    reduction: tuple[CallRecord, ...]
    kv_lengths: tuple[int, ...]  # tokens in each layer's cache after the prefill
    seconds: dict[str, float]
    videos: tuple[VideoFacts, ...] = ()  # the films shown, in order

    @property
    def cost(self) -> float:
        """The share of the computation over visual tokens that was kept; 1 where there was nothing to drop."""
        text = self.prompt_tokens - self.visual_tokens
        kept = sum(length - text for length in self.kv_lengths)
        return kept / (self.visual_tokens * len(self.kv_lengths)) if self.visual_tokens else 1.0


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
        self.stitcher = Stitcher(self.manifest, self.backend)
        self.backend.open(bundle.graphs)

    def read_visuals(
        self, turns: Sequence[Turn], files: Sequence[Source], sampling: FrameSampling, stopwatch: Stopwatch
    ) -> list[VisualInput]:
        """What the turns show, in their order, preprocessed."""
        return self.preprocess(self.see(turns, files, sampling, stopwatch, whole=False), stopwatch)

    def see(
        self,
        turns: Sequence[Turn],
        files: Sequence[Source],
        sampling: FrameSampling,
        stopwatch: Stopwatch,
        whole: bool = True,
    ) -> list[Seen]:
        """What the turns show, in their order, as it is read from files.

        Frames of films are kept `whole`, or only as small as the family shows them.
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
        rule = self.manifest.preprocessing.for_images(kinds.count(Visual.IMAGE))
        seen: list[Seen] = []
        for kind, file in zip(kinds, files, strict=True):
            with stopwatch.stage("video"):
                if kind is Visual.VIDEO:
                    seen.append(as_video(file, sampling, self.limits, None if whole else rule.shrink))
                else:
                    seen.append(as_image(file, self.limits))
        return seen

    def rule(self, seen: Sequence[Seen]) -> Preprocessing:
        """What makes patches of videos and images of one conversation."""
        return self.manifest.preprocessing.for_images(sum(not isinstance(one, Video) for one in seen))

    def preprocess(self, seen: Sequence[Seen], stopwatch: Stopwatch) -> list[VisualInput]:
        """Patches and pieces of the prompt for videos and images of one conversation."""
        visuals = list[VisualInput]()
        counts = {True: 0, False: 0}
        rule = self.rule(seen)
        for one in seen:
            film = isinstance(one, Video)
            index = counts[film]
            counts[film] = counts[film] + 1
            with stopwatch.stage("preprocess"):
                visuals.append(rule.video(one, index) if isinstance(one, Video) else rule.image(one, index))
        return visuals

    def encode_visual(self, visual: VisualInput) -> Any:
        """Rows [1+K, n, D] of one video or image: what the prompt shows, then what the first K layers add to it."""
        vision = self.manifest.vision
        device = self.backend.device
        calls = [tower_call(vision, tiles) for tiles in visual.tiles]
        counts = [call.rows * len(tiles.values) for call, tiles in zip(calls, visual.tiles, strict=True)]
        shape = (1 + vision.deepstack, sum(counts), self.manifest.model.hidden_size)
        rows = device.empty(shape, device.row_type)
        ends = np.cumsum(counts)
        for call, tiles, end, count in zip(calls, visual.tiles, ends, counts, strict=True):
            self._encode(call, tiles, rows, int(end - count))
        return rows if visual.rows is None else self._mapped(rows, visual.rows)

    def _encode(self, call: TowerCall, tiles: Tiles, rows: Any, place: int) -> None:
        """Write the rows of pictures of one size from `place` on, some pictures at once."""
        vision = self.manifest.vision
        model = self.manifest.model
        device = self.backend.device
        count, patches, _ = tiles.values.shape
        at_once = max(1, PATCHES_AT_ONCE // patches)
        shared = {name: device.upload(array) for name, array in _typed(call.inputs, model.float_type).items()}
        for start in range(0, count, at_once):
            values = np.ascontiguousarray(tiles.values[start : start + at_once], model.float_type)
            size = len(values) * call.rows
            made = device.empty((1 + vision.deepstack, size, model.hidden_size), model.float_type)
            outputs = {"tokens": made[0]} | ({"deepstack": made[1:]} if vision.deepstack else {})
            inputs = {"patches": device.upload(values), **shared}
            self.backend.bind(vision.graph, inputs, outputs, cache=None).run()
            for index in range(1 + vision.deepstack):
                device.copy(rows[index][place : place + size], made[index])
            place += size

    def _mapped(self, rows: Any, mapping: RowMap) -> Any:
        """Rows of the prompt from rows of the tower."""
        device = self.backend.device
        index = mapping.index
        weight = mapping.weight
        mapped = device.empty((rows.shape[0], len(index), rows.shape[2]), device.row_type)
        for k in range(rows.shape[0]):
            own = device.take(rows[k], index[:, 0]) if weight is None else device.mix(rows[k], index, weight)
            device.copy(mapped[k], own[: len(index)])
        return mapped

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

    def embed(self, prompt: Prompt, visual_rows: Sequence[Any]) -> TokenRows:
        """Rows of all tokens of a prompt, and their rotary tables, on the backend's device."""
        device = self.backend.device
        ids = prompt.token_ids
        places = prompt.row_places
        hidden = device.zeros((ids.size, self.manifest.model.hidden_size), device.row_type)
        added = visual_rows[0].shape[0] - 1 if visual_rows else 0
        deepstack: Any = device.zeros((added, *hidden.shape), device.row_type) if added else None
        given = sum(rows.shape[1] for rows in visual_rows)
        if given != places.size:
            raise BundleError(
                f"the prompt shows {places.size} rows of the vision tower, it gives {given}: the bundle's rule "
                "for pictures and its tower do not belong together, rebuild it"
            )
        start = 0
        for rows in visual_rows:
            own = places[start : start + rows.shape[1]]
            start += own.size
            device.put(hidden, own, rows[0])
            for k in range(added):
                device.put(deepstack[k], own, rows[1 + k])
        text = np.delete(np.arange(ids.size), places)
        device.put(hidden, text, device.upload(HOST.typed(self.embedding(ids[text]), device.row_type)))
        cos, sin = (device.upload(HOST.typed(table, device.row_type)) for table in self.rope(prompt.positions))
        return TokenRows(hidden, cos, sin, np.arange(ids.size), deepstack, device)

    def rope(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin [S, hd/2] of positions [3, S]."""
        model = self.manifest.model
        places = positions if model.mrope_section else positions[0]
        cos, sin = rope_tables(places, model.head_dim, model.rope_theta, model.mrope_section, model.mrope_interleaved)
        half = model.head_dim // 2
        return np.ascontiguousarray(cos[:, :half]), np.ascontiguousarray(sin[:, :half])

    def reduction(self, prompt: Prompt, request: Request) -> ReductionState | None:
        """The reducer's state for a request; None where the bundle does not reduce between segments.

        Raises:
            ReducerError: the reducer asked is unknown, or acts where this bundle is not cut.
        """
        record = self.manifest.reduction
        if record.mode != "adaptive":
            if request.cost not in (None, record.cost) or request.reducer not in (None, record.reducer):
                asked = request.reducer or request.cost
                raise PromptError(
                    f"this bundle's reduction is {record.mode}, its reducer {record.reducer} and its cost "
                    f"{record.cost} are built in, {asked} was asked: build with --reduction adaptive to choose at run "
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
        check_cuts(reducer, settings, self.manifest)
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
            return self.stitcher.prefill_fixed(rows, prompt.labels, request.max_new_tokens, stopwatch)
        return self.stitcher.prefill(rows, reduction, request.max_new_tokens, stopwatch)

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
        seen = self.see(turns, files, sampling or self.manifest.sampling, stopwatch, whole=False)
        videos = facts_of_films(seen)
        visuals = self.preprocess(seen, stopwatch)
        del seen  # pixels are large, and spent
        prompt = self.prompt(turns, visuals)
        self.bounded(request, prompt)  # refuse before the vision tower has worked
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
        request = self.bounded(request, prompt)
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

    def bounded(self, request: Request, prompt: Prompt) -> Request:
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
        decoder = self.stitcher.decoder(prefilled)
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


def _typed(inputs: Mapping[str, NDArray[Any]], float_type: type[np.floating[Any]]) -> dict[str, NDArray[Any]]:
    """Inputs of a graph with all that is fp32 in the bundle's type."""
    return {
        name: array.astype(float_type, copy=False) if array.dtype == np.float32 else array
        for name, array in inputs.items()
    }


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
