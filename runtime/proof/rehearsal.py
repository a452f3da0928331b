"""The canned request through a backend: tower, prefill, reduction, decode, by the code that answers users.

The build runs it over torch modules and writes down what comes out; a proof runs it over the backend of a device and
compares. Judges nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.reduction.policy import Decision, ReductionState
from framefusion.runtime.backends.base import Backend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.generation.batching.decode_batch import BatchRow, DecodeBatch
from framefusion.runtime.generation.decode import Decoder, GreedyDecoder
from framefusion.runtime.generation.embedder import Embedder, Embedding
from framefusion.runtime.generation.fixed_prefill import prefill_fixed
from framefusion.runtime.generation.prefill import Prefilled, prefill, start_reduction
from framefusion.runtime.generation.segments import Segments
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.proof.canned import CannedPicture, CannedRequest
from framefusion.runtime.request import Request, Stopwatch
from framefusion.runtime.text.positions import decode_positions

ROWS = 3  # of a batch that is proven
ROWS_OF_FIXED = 2
"""Where a graph reduces: caches are as long as the longest prompt, and a proof keeps within the memory of an answer."""
Array = NDArray[Any]
Following = Callable[[ReductionState], ReductionState]
"""What a reduction's state is replaced with before it begins."""


@dataclass(frozen=True)
class Answer:
    """What a backend made of the request under one cost."""

    kept: list[NDArray[np.int64]]  # for each segment: places in the prompt of the tokens that entered it
    decisions: list[Decision]  # of each call that decided; the static graph of the fixed mode shows none
    logits: list[NDArray[np.float32]]  # [V] behind the prompt, then behind each token of the answer


@dataclass(frozen=True)
class Chosen:
    """What a device chose by itself, and the logits that it had to choose from."""

    tokens: list[int]
    logits: list[NDArray[np.float32]]  # [V] each


class Rehearsal:
    """One bundle, one backend and the canned request.

    Args:
        bundle: whose manifest says what is run.
        backend: that runs it.
        request: canned.
    """

    def __init__(self, bundle: Bundle, backend: Backend, request: CannedRequest) -> None:
        self.manifest = bundle.manifest
        self.request = request
        self.prompt = request.prompt(self.manifest)
        self._backend = backend
        self._table = Embedding(bundle.folder, self.manifest.embedding)
        self._embedder = Embedder(self.manifest, self._table, backend)
        self._alone: dict[tuple[float | None, float | None], Answer] = {}

    def tower(self, picture: CannedPicture) -> Array:
        """Rows of the vision tower.  [1+K, n, D]"""
        visual = picture.visual(self.request.seed, self.manifest)
        rows = self._backend.device.download(self._embedder.encode_visual(visual))
        return rows.astype(np.float32)

    def rows(self, noise: float = 0.0) -> TokenRows:
        """Rows of the prompt, the visual ones with noise of this share."""
        device = self._backend.device
        layers = self.manifest.vision.deepstack
        visual = self.request.visual_rows(layers, self.manifest.model.hidden_size, noise)
        return self._embedder.embed(self.prompt, [device.upload(visual.astype(device.row_type))])

    def reduction(self, cost: float | None, bound: float | None = None) -> ReductionState | None:
        """The state that the bundle's reducer begins with; None for the dense run and where a graph reduces.

        Raises:
            BudgetError: the reducer cannot reach the cost.
        """
        if cost is None or self.manifest.reduction.mode != "adaptive":
            return None
        return start_reduction(self.manifest, self.prompt.labels, Request(cost=cost, similarity_lower_bound=bound))

    def answer(
        self,
        cost: float | None,
        bound: float | None = None,
        *,
        chunk: int | None = None,
        noise: float = 0.0,
        following: Following | None = None,
        decode: bool = True,
    ) -> Answer:
        """Prefill and decode.

        Args:
            cost: of an adaptive bundle; None keeps all. A fixed bundle does what it was built for.
            bound: of similarities, from which on tokens merge; None takes the bundle's.
            chunk: most tokens at a time in the last segment's prefill, in place of the backend's own number.
            noise: see `rows`.
            following: what the reduction's state is replaced with.
            decode: run the answer, too.

        Raises:
            BackendError: the backend refuses or fails.
            BundleError: the request does not fit the bundle.
        """
        backend = self._backend
        if chunk is not None:
            backend = copy.copy(backend)  # graphs and device are shared
            backend.chunk = chunk
        segments = Segments(self.manifest, backend)
        decisions: list[Decision] = []
        # 1. Prefill, reduced as a request of this cost would be.
        reduction = self.reduction(cost, bound)
        if reduction is not None:
            reduction.observer = decisions.append
            reduction = reduction if following is None else following(reduction)
        done = self._prefilled(segments, reduction, noise)
        logits = [done.logits.astype(np.float32)]
        kept = [np.asarray(places).copy() for places in done.kept]
        if not decode:
            return Answer(kept, decisions, logits)
        # 2. Decode over the caches that it left, of another length in each segment.
        new = self.request.answer
        cos, sin = self._rotary()
        hidden = self._table(self.request.answer_ids(self.manifest))
        decoder = Decoder(segments, done.caches)
        steps = (decoder.step(hidden[step], cos[step], sin[step]) for step in range(new))
        logits += [row.astype(np.float32) for row in steps]  # copied: a step overwrites what the last one gave
        return Answer(kept, decisions, logits)

    def alone(self, cost: float | None, bound: float | None) -> Answer:
        """The same as a user gets it, run once; see `answer`."""
        if (cost, bound) not in self._alone:
            self._alone[cost, bound] = self.answer(cost, bound)
        return self._alone[cost, bound]

    @property
    def batch_sizes(self) -> Sequence[int]:
        """Numbers of requests that are decoded together in a proof, ascending: each that the backend has a step for.

        None where the backend takes one at a time.
        """
        segments = Segments(self.manifest, self._backend)
        rows = ROWS_OF_FIXED if self.manifest.reduction.mode == "fixed" else ROWS
        return () if segments.batch_refusal is not None else segments.batch_sizes or range(1, rows + 1)

    def together(self, settings: Sequence[tuple[float | None, float | None]]) -> list[list[NDArray[np.float32]]]:
        """Prefill requests one after the other and decode them in one batch, which is larger by a size with each step.

        Args:
            settings: cost and bound of each, as for `answer`.

        Returns:
            Of each the logits [V] behind each token of the answer.

        Raises:
            BackendError: the backend refuses or fails.
        """
        segments = Segments(self.manifest, self._backend)
        batch = DecodeBatch(segments)
        (cos, sin) = self._rotary()
        hidden = self._table(self.request.answer_ids(self.manifest))
        rows: list[BatchRow] = []
        begun: list[int] = []  # the step in which each joined
        sizes = self.batch_sizes
        logits: list[list[NDArray[np.float32]]] = [[] for _ in settings]
        for number in range(len(sizes) + self.request.answer - 1):
            # 1. Others join those that run.
            for setting in settings[len(rows) : sizes[min(number, len(sizes) - 1)]]:
                done = self._prefilled(segments, self.reduction(*setting))
                rows.append(batch.join(done.caches))
                begun.append(number)
            running = [index for index, first in enumerate(begun) if number - first < self.request.answer]
            # 2. All are fed, then one step has the logits of all.
            for index in running:
                step = number - begun[index]
                rows[index].feed(hidden[step], cos[step], sin[step])
            for index in running:
                logits[index].append(rows[index].logits().astype(np.float32))
            # 3. Who is done leaves, and another takes its place.
            for index in running:
                if number - begun[index] == self.request.answer - 1:
                    rows[index].leave()
        return logits

    def chosen(self) -> Chosen:
        """Prefill with every token, and have the device choose the answer; then the same tokens step by step.

        Raises:
            BackendError: the backend fails, or the device chose otherwise than its own logits say.
        """
        segments = Segments(self.manifest, self._backend)
        rotary = self._rotary()
        device = self._backend.device
        # 1. As an answer of the largest logits is made: the table on the device where there is room, tokens alone here.
        done = self._prefilled(segments, None)
        tokens = [int(done.logits.argmax())]
        table = self._table.upload(device, segments.float_type)
        decoder = Decoder(segments, done.caches)
        greedy = GreedyDecoder(decoder, self._table, table, rotary, self.manifest.model.vocab_size)
        for _ in range(self.request.answer):
            tokens.append(greedy.step(tokens[-1]))
        # 2. The logits behind the very tokens that were chosen.
        decoder = Decoder(segments, self._prefilled(segments, None).caches)
        hidden = self._table(np.array(tokens))
        cos, sin = rotary
        steps = (decoder.step(hidden[step], cos[step], sin[step]) for step in range(self.request.answer))
        return Chosen(tokens[1:], [row.astype(np.float32) for row in steps])

    def _prefilled(self, segments: Segments, reduction: ReductionState | None, noise: float = 0.0) -> Prefilled:
        rows = self.rows(noise)
        new = self.request.answer
        if self.manifest.reduction.mode == "fixed":
            return prefill_fixed(segments, rows, self.prompt.labels, new, Stopwatch())
        return prefill(segments, rows, reduction, new, Stopwatch())

    def _rotary(self) -> tuple[Array, Array]:
        """Tables of the tokens of the answer.  [N, hd/2] twice"""
        prompt = self.prompt
        return self._embedder.rope(decode_positions(prompt.token_ids.size, prompt.rope_delta, self.request.answer))
