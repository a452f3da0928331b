"""The stages of a request over one bundle, one method each; what puts them in order is above.

    visuals/media_stages.py -> prompt -> embed -> prefill -> activate, decode

Holds no state of a request. Knows no conversation of several turns over the same caches (session.py).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BackendError, PromptError
from framefusion.reduction import tracks
from framefusion.reduction.policy import Observer, ReductionState
from framefusion.runtime.backends.base import Backend
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.concurrency.step_runner import runner_of
from framefusion.runtime.format.bundle_files import place
from framefusion.runtime.format.manifest_checks import TOKENIZER
from framefusion.runtime.generation.batching.answer_tokens import tokens_together
from framefusion.runtime.generation.batching.decode_batch import DecodeBatch
from framefusion.runtime.generation.decode import ActiveRequest, Decoder, GreedyDecoder
from framefusion.runtime.generation.embedder import Embedder, Embedding
from framefusion.runtime.generation.fixed_prefill import prefill_fixed
from framefusion.runtime.generation.prefill import Prefilled, prefill, start_reduction
from framefusion.runtime.generation.segments import Rows, Segments
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.generation.visuals.media_stages import MediaStages, leaves_cores_free
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.tiles.thumbnails import Thumbnails
from framefusion.runtime.media.video.frames import VideoFacts
from framefusion.runtime.media.visual_input import VisualInput
from framefusion.runtime.request import KeptTokens, PrefillReport, Request, ShownRows, Step, Stopwatch
from framefusion.runtime.text.positions import decode_positions
from framefusion.runtime.text.prompt import (
    Prompt,
    Turn,
    Visual,
    check_length,
    check_texts,
    layout_texts,
)
from framefusion.runtime.text.prompt_layout import build_prompt
from framefusion.runtime.text.sampling import Sampler
from framefusion.runtime.text.tokenizer import StoppableText, Tokenizer

SAMPLE_LESS = "sample fewer frames, lower max_pixels"


class Stages(MediaStages):
    """What each stage of a request needs of a bundle, opened once.

    Args:
        bundle: read and verified.
        backend: what executes the graphs.
        limits: of the files that are read.
        overlap: decode the next film of a request while the tower has the one before it; None does where
            `leaves_cores_free` says so.
    """

    def __init__(self, bundle: Bundle, backend: Backend, limits: MediaLimits, overlap: bool | None = None) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.backend = backend
        self.limits = limits
        self.overlaps = leaves_cores_free(backend) if overlap is None else overlap
        self.runner = runner_of(backend)
        layout = layout_texts(self.manifest.prompt, self.manifest.preprocessing)
        self.tokenizer = Tokenizer.from_file(place(bundle.folder, TOKENIZER), layout)
        self.embedding = Embedding(bundle.folder, self.manifest.embedding)
        self.embedder = Embedder(self.manifest, self.embedding, backend)
        self.segments = Segments(self.manifest, backend)
        backend.open(bundle.graphs)

    def prompt(self, turns: Sequence[Turn], visuals: Sequence[VisualInput], remedy: str = SAMPLE_LESS) -> Prompt:
        """Tokens, labels and positions of a conversation; a refusal of its length names the remedy.

        Raises:
            PromptError: it is longer than the bundle takes.
        """
        check_texts(turns, self.tokenizer, self.manifest.limits.max_input_len)
        prompt = build_prompt(self.manifest.prompt, self.tokenizer, turns, visuals, self.manifest.embedding.extra)
        check_length(prompt, self.manifest.limits.max_input_len, remedy)
        return prompt

    def embed(self, prompt: Prompt, visual_rows: Sequence[Buffer]) -> TokenRows:
        """Rows of all S tokens of a prompt, with their rotary tables: see `Embedder.embed`."""
        return self.embedder.embed(prompt, visual_rows)

    def rope(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin [S, hd/2] of positions [3, S]."""
        return self.embedder.rope(positions)

    def reduction(self, prompt: Prompt, request: Request) -> ReductionState | None:
        """The reducer's state for a request; None where the bundle does not reduce between segments.

        Raises:
            ReducerError: the reducer is unknown, or acts where this bundle is not cut.
        """
        return start_reduction(self.manifest, prompt.labels, request)

    def with_default_cost(self, request: Request, shown: Sequence[Visual]) -> Request:
        """The request with cost 1 where it shows pictures and no film, and asks for no reduction.

        What a bundle drops by itself is what frames repeat. A picture repeats nothing: there only pruning is left,
        which costs accuracy, so that is for whoever gives a cost, a threshold or a reducer.

        Args:
            request: of the caller.
            shown: the videos and images whose tokens are prefilled.
        """
        chosen = (request.cost, request.reducer, request.similarity_lower_bound, request.ratio_lower_bound)
        stills = bool(shown) and Visual.VIDEO not in shown
        if self.manifest.reduction.mode != "adaptive" or not stills or any(value is not None for value in chosen):
            return request
        return replace(request, cost=1.0)

    @property
    def restart_reason(self) -> str | None:
        """Why no prefill can go on behind tokens that are in the caches; None where one can."""
        if self.manifest.reduction.mode == "fixed":
            return "the prefill graph of a bundle of the fixed mode begins with empty caches"
        if not self.backend.continues:
            return f"prefills of the backend {self.backend.name} begin with empty caches"
        return None

    def prefill(
        self,
        prompt: Prompt,
        rows: TokenRows,
        request: Request,
        stopwatch: Stopwatch,
        observer: Observer | None = None,
        past: Sequence[SegmentCache] | None = None,
    ) -> Prefilled:
        """Run a prompt through the segments, reduced as the request says.

        Args:
            prompt: of S tokens; behind a past its last ones (`Prompt.tail`).
            rows: of these tokens.
            request: reduction and new tokens.
            stopwatch: gets the stages "reduction" and "prefill".
            observer: gets each decision; the static graph of the fixed mode decides inside and gives none.
            past: caches that hold the tokens before, to be continued.

        Raises:
            PromptError, BudgetError, ReducerError: see `prefill`, `prefill_fixed` and `start_reduction`.
            BackendError: there is a past, and the graphs cannot go on behind one: see `restart_reason`.
        """
        if past is not None and (reason := self.restart_reason) is not None:
            raise BackendError(f"{reason}: prefill the whole conversation")
        reduction = self.reduction(prompt, request)
        if reduction is not None:
            reduction.observer = observer
        if self.manifest.reduction.mode == "fixed":
            return prefill_fixed(self.segments, rows, prompt.labels, request.max_new_tokens, stopwatch)
        return prefill(self.segments, rows, reduction, request.max_new_tokens, stopwatch, past)

    def decode(
        self,
        prompt: Prompt,
        prefilled: Prefilled,
        request: Request,
        stopwatch: Stopwatch,
        *,
        report: PrefillReport | None = None,
        logits: bool = False,
        batch: DecodeBatch | None = None,
    ) -> Generator[Step, None, None]:
        """The steps behind a prefill of the same request, whose new tokens fit the caches (`clamp_new_tokens`).

        Args:
            prompt: that was prefilled.
            prefilled: its caches, which grow, and the logits of its last token.
            request: as for the prefill.
            stopwatch: gets the stage "decode".
            report: of the prefill; None makes it.
            logits: give those of each token, too.
            batch: decodes it together with other requests; None by itself.
        """
        # 1. Report the prefill at once: whoever waits for the first token can see what it waited for.
        yield Step("prefilled", prefill=report or prefill_report(prompt, prefilled), seconds=dict(stopwatch.seconds))
        # 2. All that belongs to this request is in one object.
        with stopwatch.stage("decode"):
            active = self.activate(prompt, request)
        # 3. Give each token away before the next one is computed.
        if batch is None:
            tokens = self._tokens_alone(prefilled, active, request, stopwatch, logits)
        else:
            tokens = tokens_together(batch, self.embedding, prefilled, active, stopwatch)
        with closing(tokens):
            for text, scores in tokens:
                copied = scores.copy() if logits and scores is not None else None  # the buffer is the next step's
                yield Step("token", text, active.token_ids[-1], copied, seconds=dict(stopwatch.seconds))
        # 4. Say what was held back: half a character, or what might have become a stop string.
        rest = active.flush()
        yield Step("end", rest, finish_reason=active.finish_reason, seconds=dict(stopwatch.seconds))

    def _tokens_alone(
        self, prefilled: Prefilled, active: ActiveRequest, request: Request, stopwatch: Stopwatch, logits: bool
    ) -> Generator[tuple[str, Rows | None], None, None]:
        """The text of each token, and the logits it was chosen from, which the next step overwrites."""
        # 1. Bind the segments once.
        with stopwatch.stage("decode"):
            decoder = Decoder(self.segments, prefilled.caches)
            greedy = None if logits else self._greedy(decoder, active, request)
            last: Rows | None = prefilled.logits
            text = active.accept(prefilled.logits)
        while True:
            yield text, last
            if active.finish_reason is not None:
                return
            # 2. Feed the token back and choose the next one, on the device where it is the one of the largest logit.
            token_id = active.token_ids[-1]
            with stopwatch.stage("decode"):
                if greedy is not None:
                    last = None
                    text = active.accept_token(greedy.step(token_id))
                    continue
                last = decoder.step(self.embedding(np.array([token_id]))[0], *active.rotary)
                text = active.accept(last)

    def _greedy(self, decoder: Decoder, active: ActiveRequest, request: Request) -> GreedyDecoder | None:
        """What has the device choose the tokens; None where more than the largest logit counts."""
        if not request.generation_over(self.manifest.generation).takes_largest:
            return None
        table = self.embedding.upload(decoder.device, decoder.float_type)
        return GreedyDecoder(decoder, self.embedding, table, active.rotary_tables, self._vocab_limit)

    @property
    def _vocab_limit(self) -> int:
        """Logits of tokens: a table may have more rows than the tokenizer has tokens, which no training ever said."""
        return min(self.manifest.model.vocab_size, self.tokenizer.vocab_size)

    def activate(self, prompt: Prompt, request: Request) -> ActiveRequest:
        """A request that was prefilled, ready to choose its first token."""
        config = request.generation_over(self.manifest.generation)
        length = prompt.token_ids.size
        rotary = self.rope(decode_positions(length, prompt.rope_delta, request.max_new_tokens))
        sampler = Sampler(config, request.seed, self._vocab_limit, length)
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


def prefill_report(
    prompt: Prompt, prefilled: Prefilled, videos: tuple[VideoFacts, ...] = (), shown: Thumbnails | None = None
) -> PrefillReport:
    """What became of a prompt, whose last rows `shown` shows."""
    lengths = tuple(int(length) for cache in prefilled.caches for length in cache.lengths)
    kept = [tuple(places.tolist()) for places in prefilled.kept]  # by segment
    places = tuple(
        held if length == cache.lengths[-1] else None  # a static graph says what its last layer holds
        for cache, held in zip(prefilled.caches, kept, strict=True)
        for length in cache.lengths
    )
    layers = KeptTokens(tuple(np.flatnonzero(prompt.labels != tracks.TEXT).tolist()), places)
    return PrefillReport(
        prompt.token_ids.size, prompt.num_visual, tuple(prefilled.history), lengths, videos, layers=layers,
        shown=None if shown is None else ShownRows(shown, prompt.row_places[prompt.row_places.size - shown.rows :]),
    )  # fmt: skip
