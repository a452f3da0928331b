"""Prefill through the segments with reduction between them, and decode over the caches they leave.

    hidden --call 0--> segment 0 --call 1--> segment 1 ... --call D+1--> last segment -> logits
                          |                     |                            |
                       cache 0               cache 1                      cache last     (lengths differ)

The decisions are framefusion.policy's; here its plans are applied to the rows of hidden states and rotary tables. Knows
no prompt, no tokenizer and no video.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion import tracks
from framefusion.budget import drop_counts
from framefusion.errors import BudgetError, PromptError
from framefusion.policy import CallRecord, Plan, ReductionState, apply_plan
from framefusion.runtime.backends import Array, Backend, BoundSegment
from framefusion.runtime.bundle import Manifest, SegmentRecord
from framefusion.runtime.kv_cache import SegmentCache

Rows = NDArray[np.floating[Any]]  # in the bundle's type, scores and logits always fp32

CHUNK = 512
"""Tokens of the last segment's prefill at a time. An attention kernel that computes the masked half as well pays for
less of it, and the activations of the longest segment stop growing with the prompt."""


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass
class TokenRows:
    """What belongs to each token on its way through the segments."""

    hidden: Rows  # [S, D]
    cos: Rows  # [S, hd/2]
    sin: Rows
    origin: NDArray[np.int64]  # place in the prompt
    deepstack: Rows | None = None  # [K, S, D] visual features that the next K layers add, zeros for text

    def reduced(self, plan: Plan) -> TokenRows:
        """The rows after a plan; kept tokens keep the tables of their original positions."""
        if plan.kind == "none":
            return self
        kept = plan.kept
        features = None if self.deepstack is None else np.stack([apply_plan(rows, plan) for rows in self.deepstack])
        return TokenRows(apply_plan(self.hidden, plan), self.cos[kept], self.sin[kept], self.origin[kept], features)

    def typed(self, float_type: type[np.floating[Any]]) -> TokenRows:
        """The rows in another type; themselves where they have it."""
        hidden, cos, sin = (table.astype(float_type, copy=False) for table in (self.hidden, self.cos, self.sin))
        features = None if self.deepstack is None else self.deepstack.astype(float_type, copy=False)
        return TokenRows(hidden, cos, sin, self.origin, features)

    def part(self, start: int, end: int) -> TokenRows:
        """Some of the rows."""
        tokens = slice(start, end)
        features = None if self.deepstack is None else self.deepstack[:, tokens]
        return TokenRows(self.hidden[tokens], self.cos[tokens], self.sin[tokens], self.origin[tokens], features)

    def padded(self, length: int) -> TokenRows:
        """The rows with zeros behind them."""
        if length == len(self.hidden):
            return self
        extra = ((0, length - len(self.hidden)), (0, 0))
        hidden, cos, sin = (np.pad(table, extra) for table in (self.hidden, self.cos, self.sin))
        features = None if self.deepstack is None else np.pad(self.deepstack, ((0, 0), *extra))
        return TokenRows(hidden, cos, sin, self.origin, features)

    def after(self, hidden: Rows, added: int) -> TokenRows:
        """The rows behind a segment that left `hidden` and added the first `added` of the features."""
        features = None if self.deepstack is None or len(self.deepstack) <= added else self.deepstack[added:]
        return TokenRows(hidden, self.cos, self.sin, self.origin, features)


@dataclass
class Prefilled:
    """A request after its prefill."""

    logits: Rows  # [V]
    caches: list[SegmentCache]
    history: list[CallRecord]
    kept: list[NDArray[np.int64]]  # per segment: places in the prompt of the tokens that entered it


class Stitcher:
    """The segments of one bundle over one backend; holds no state of a request."""

    def __init__(self, manifest: Manifest, backend: Backend) -> None:
        self.manifest, self.backend = manifest, backend
        self._float_type = manifest.model.float_type

    def prefill(
        self, rows: TokenRows, reduction: ReductionState | None, max_new_tokens: int, stopwatch: Stopwatch
    ) -> Prefilled:
        """Run the segments over a prompt of S tokens.

        Args:
            rows: of the whole prompt, unreduced.
            reduction: the policy's state for this request; None keeps all tokens.
            max_new_tokens: cache slots to leave behind the prompt.
            stopwatch: gets the stages "prefill" (segments) and "reduction" (scores, plans, compaction, binding).
        """
        with stopwatch.stage("reduction"):
            rows = _reduce_embeddings(rows, reduction).typed(self._float_type)  # sums in fp32, rounded once
        caches: list[SegmentCache] = []
        kept: list[NDArray[np.int64]] = []
        outputs: Mapping[str, Array] = {}
        for record in self.manifest.segments:
            length = len(rows.hidden)
            with stopwatch.stage("reduction"):
                chunks, cache = self._bind_prefill(record, rows, reduction, max_new_tokens)
            with stopwatch.stage("prefill"):
                for chunk in chunks:
                    chunk.run()
            cache.lengths[:] = length
            caches.append(cache)
            kept.append(rows.origin)
            outputs = chunks[-1].outputs
            if not record.head:
                with stopwatch.stage("reduction"):
                    rows = rows.after(outputs["hidden_out"][0, :length], record.deepstack)
                    rows = _reduce(rows, reduction, outputs)
        return Prefilled(outputs["logits"][0], caches, reduction.history if reduction else [], kept)

    def _bind_prefill(
        self, record: SegmentRecord, rows: TokenRows, reduction: ReductionState | None, max_new_tokens: int
    ) -> tuple[list[BoundSegment], SegmentCache]:
        """The runs that make up a segment's prefill: one, or chunks of which only the last gives an output."""
        length = len(rows.hidden)
        size = bucket_for(record, length)
        model, layers = self.manifest.model, len(record.attention_layers)
        capacity = max(size, length + max_new_tokens)
        cache = SegmentCache.empty(model.num_kv_heads, model.head_dim, [capacity] * layers, self._float_type)
        rows = rows.padded(size)
        chunks = []
        for start, end in chunks_of(record, size):
            inputs = _row_inputs(rows.part(start, end), record) | {
                "kv_len": np.full(layers, end, np.int64),
                "last": np.array([min(length, end) - start - 1], np.int64),
            }
            if record.scores:
                inputs["previous"] = _previous(reduction, size)
            outputs = self._outputs(record, end - start) if end == size else {}
            chunks.append(self.backend.bind(record.graph, inputs, outputs, cache))
        return chunks, cache

    def prefill_fixed(
        self, rows: TokenRows, labels: NDArray[np.int64], max_new_tokens: int, stopwatch: Stopwatch
    ) -> Prefilled:
        """Run the one static graph of the fixed mode, which reduces inside.

        Raises:
            PromptError: text, visual tokens or tracks exceed what the graph was built for.
            BudgetError: the schedule would merge tokens that have nothing to merge into, and the rest does not fit.
        """
        (record,), fixed, model = self.manifest.segments, self.manifest.fixed, self.manifest.model
        schedule = self.manifest.reduction.schedule
        assert fixed is not None  # a manifest of the fixed mode has both
        assert schedule is not None
        with stopwatch.stage("reduction"):
            labels = tracks.request_labels(labels)
            drops = _fixed_drops(self.manifest, labels)
            calls = [*range(len(schedule.merge_shares)), schedule.prune_layer + 1]
            lengths = _lengths_by_layer(len(labels), dict(zip(calls, drops, strict=True)), model.num_layers)
            capacities = [max(size, n + max_new_tokens) for size, n in zip(fixed.lengths, lengths, strict=True)]
            cache = SegmentCache.empty(model.num_kv_heads, model.head_dim, capacities, self._float_type)
            size = fixed.max_text + fixed.max_visual
            padded_labels = np.pad(labels, (0, size - len(labels)), constant_values=tracks.TEXT)
            inputs = _row_inputs(rows.typed(self._float_type).padded(size), record) | {
                "kv_len": np.array(fixed.lengths, np.int64),
                "last": np.array([len(labels) - 1], np.int64),
                "label": padded_labels,
                "order": tracks.track_order(padded_labels),
                "drops": np.array(drops, np.int64),
            }
            outputs: dict[str, Array] = {
                "logits": _floats(1, model.vocab_size),
                "origin": np.empty(size - sum(fixed.drops), np.int64),
            }
            bound = self.backend.bind(record.graph, inputs, outputs, cache)
        with stopwatch.stage("prefill"):
            bound.run()
        cache.lengths[:] = lengths
        kept = [outputs["origin"][: lengths[-1]]]
        return Prefilled(outputs["logits"][0], [cache], _fixed_history(labels, calls, drops), kept)

    def decoder(self, prefilled: Prefilled) -> Decoder:
        """A decode loop over the caches of a prefill."""
        return Decoder(self, prefilled.caches)

    def _outputs(self, record: SegmentRecord, size: int) -> dict[str, Array]:
        if record.head:
            return {"logits": _floats(1, self.manifest.model.vocab_size)}
        scores = {"similarity": _floats(size), "importance": _floats(size)} if record.scores else {}
        return {"hidden_out": np.empty((1, size, self.manifest.model.hidden_size), self._float_type)} | scores


class Decoder:
    """One token at a time through all segments, bound once: a step writes a row, runs, and copies no cache."""

    def __init__(self, stitcher: Stitcher, caches: Sequence[SegmentCache]) -> None:
        model = stitcher.manifest.model
        half = model.head_dim // 2
        self._caches = caches
        widths = (model.hidden_size, half, half)
        hidden, cos, sin = (np.zeros((1, width), model.float_type) for width in widths)
        self._rows = TokenRows(hidden, cos, sin, np.zeros(1, np.int64))
        self._kv_lens: list[NDArray[np.int64]] = []
        self._segments: list[BoundSegment] = []
        chained: dict[str, Array] = {}  # the very array that the segment before writes
        for record, cache in zip(stitcher.manifest.segments, caches, strict=True):
            self._kv_lens.append(np.zeros(len(record.attention_layers), np.int64))
            inputs = _row_inputs(self._rows, record) | chained
            inputs |= {"kv_len": self._kv_lens[-1], "last": np.zeros(1, np.int64), "previous": np.full(1, -1, np.int64)}
            graph = record.decode_graph or record.graph
            bound = stitcher.backend.bind(graph, inputs, stitcher._outputs(record, 1), cache)
            self._segments.append(bound)
            if not record.head:
                chained = {"hidden": bound.outputs["hidden_out"]}

    def step(self, hidden: Rows, cos: Rows, sin: Rows) -> Rows:
        """One token's embedding [D] and tables [hd/2] -> logits [V], valid until the next step.

        Raises:
            PromptError: a cache is full.
        """
        self._rows.hidden[0], self._rows.cos[0], self._rows.sin[0] = hidden, cos, sin
        for segment, cache, kv_len in zip(self._segments, self._caches, self._kv_lens, strict=True):
            np.add(cache.lengths, 1, out=kv_len)
            for needed, capacity in zip(kv_len, cache.capacities, strict=True):
                if needed > capacity:
                    raise PromptError(f"a cache of {capacity} tokens is full: ask for fewer new tokens")
            segment.run()
            cache.lengths[:] = kv_len
        logits: Rows = self._segments[-1].outputs["logits"][0]
        return logits


def chunks_of(record: SegmentRecord, size: int) -> list[tuple[int, int]]:
    """Begin and end of each chunk of a prefill; only a segment that ends in logits and has no buckets has several."""
    step = CHUNK if record.head and record.buckets is None else size
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def bucket_for(record: SegmentRecord, length: int) -> int:
    """The size a prefill of `length` tokens takes in a segment.

    Raises:
        PromptError: no bucket is large enough.
    """
    if record.buckets is None:
        return length
    for bucket in record.buckets:
        if bucket >= length:
            return bucket
    raise PromptError(
        f"segment {record.name} got {length} tokens, its largest bucket takes {max(record.buckets)}: "
        "sample fewer frames, or rebuild with larger --buckets"
    )


def _floats(*shape: int) -> NDArray[np.float32]:
    return np.empty(shape, np.float32)


def _row_inputs(rows: TokenRows, record: SegmentRecord) -> dict[str, Array]:
    inputs: dict[str, Array] = {"hidden": rows.hidden[None], "cos": rows.cos[None], "sin": rows.sin[None]}
    if record.deepstack:  # generated tokens and prompts of text alone have nothing to add
        added = np.zeros((record.deepstack, *rows.hidden.shape), rows.hidden.dtype)
        if rows.deepstack is not None:
            added[:] = rows.deepstack[: record.deepstack]
        inputs["deepstack"] = added
    return inputs


def _previous(reduction: ReductionState | None, size: int) -> NDArray[np.int64]:
    previous = np.full(size, -1, np.int64)
    if reduction is not None and reduction.wants_similarity:
        found = tracks.previous_in_track(reduction.labels)
        previous[: found.size] = found
    return previous


def _reduce_embeddings(rows: TokenRows, reduction: ReductionState | None) -> TokenRows:
    if reduction is None:
        return rows
    similarity = tracks.track_similarity(rows.hidden, reduction.labels) if reduction.wants_similarity else None
    return rows.reduced(reduction.step(similarity, None))


def _reduce(rows: TokenRows, reduction: ReductionState | None, outputs: Mapping[str, Array]) -> TokenRows:
    if reduction is None or reduction.finished:
        return rows
    length = len(rows.hidden)
    return rows.reduced(reduction.step(outputs["similarity"][:length], outputs["importance"][:length]))


def _fixed_drops(manifest: Manifest, labels: NDArray[np.int64]) -> list[int]:
    """How many tokens each reduction of the static graph drops for this prompt."""
    fixed, schedule = manifest.fixed, manifest.reduction.schedule
    assert fixed is not None
    assert schedule is not None
    visual = tracks.count_visual(labels)
    for what, found, limit, flag in (
        ("text tokens", labels.size - visual, fixed.max_text, "--max-text-len"),
        ("visual tokens", visual, fixed.max_visual, "--max-input-len"),
        ("temporal grids in a track", tracks.longest_track(labels), fixed.max_track, "--max-frames"),
    ):
        if found > limit:
            raise PromptError(
                f"the prompt has {found} {what}, the bundle takes {limit}: sample less, or rebuild: {flag}"
            )
    drops = drop_counts(schedule, visual, tracks.count_tracks(labels))
    left, room = labels.size, fixed.max_text + fixed.max_visual
    for drop, most in zip(drops, fixed.drops, strict=True):
        left, room = left - drop, room - most
        if left > room or drop > most:
            raise BudgetError(
                f"a reduction drops {drop} tokens and leaves {left}, the graph drops up to {most} and has room for "
                f"{room}: too few tokens can merge before it (one frame?); use an adaptive bundle for such input"
            )
    return drops


def _lengths_by_layer(length: int, drop_at_call: Mapping[int, int], num_layers: int) -> list[int]:
    """Tokens in the cache of each layer: call i precedes the attention of layer i."""
    lengths = []
    for layer in range(num_layers):
        length -= drop_at_call.get(layer, 0)
        lengths.append(length)
    return lengths


def _fixed_history(labels: NDArray[np.int64], calls: Sequence[int], drops: Sequence[int]) -> list[CallRecord]:
    total, visual = labels.size, tracks.count_visual(labels)
    history = []
    for position, (call, drop) in enumerate(zip(calls, drops, strict=True)):
        kind = "prune" if position == len(calls) - 1 else "merge"
        history.append(CallRecord(call, kind if drop else "none", total, total - drop, visual, visual - drop))  # type: ignore[arg-type]
        total, visual = total - drop, visual - drop
    return history
