"""Prefill through the segments with reduction between them, and decode over the caches they leave.

    hidden --call 0--> segment 0 --call 1--> segment 1 ... --call D+1--> last segment -> logits
                          |                     |                            |
                       cache 0               cache 1                      cache last     (lengths differ)

The decisions are the policy's (framefusion/reduction); here its plans are applied to the rows of hidden states and
rotary tables, which lie on the backend's device: scores come to the host, plans go back. Knows no prompt, no
tokenizer and no video.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BudgetError, PromptError, ReducerError
from framefusion.reducers.reducer import Reducer
from framefusion.reduction import tracks
from framefusion.reduction.budget import drop_counts
from framefusion.reduction.policy import CallRecord, ReductionSettings, ReductionState
from framefusion.runtime.backends.base import Backend, BoundSegment, Mirror
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.format.manifest import Manifest, SegmentRecord
from framefusion.runtime.generation.token_rows import TokenRows

Rows = NDArray[np.floating[Any]]  # in the bundle's type, scores and logits always fp32
Scores = NDArray[np.float32]


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
class Prefilled:
    """A request after its prefill."""

    logits: Rows  # [V]
    caches: list[SegmentCache]
    history: list[CallRecord]
    kept: list[NDArray[np.int64]]  # per segment: places in the prompt of the tokens that entered it


class Stitcher:
    """The segments of one bundle over one backend; holds no state of a request."""

    def __init__(self, manifest: Manifest, backend: Backend) -> None:
        self.manifest = manifest
        self.backend = backend
        self.device = backend.device
        self._float_type = manifest.model.float_type

    def prefill(
        self, rows: TokenRows, reduction: ReductionState | None, max_new_tokens: int, stopwatch: Stopwatch
    ) -> Prefilled:
        """Run the segments over a prompt of S tokens.

        Args:
            rows: of the whole prompt, unreduced.
            reduction: the policy's state for this request; None keeps all tokens.
            max_new_tokens: cache slots to leave behind the prompt.
            stopwatch: gets the stages "prefill" (segments) and "reduction" (scores of the embeddings, plans,
                compaction, binding).
        """
        with stopwatch.stage("reduction"):
            rows = _reduce_embeddings(rows.on(self.device), reduction)
            rows = rows.typed(self._float_type)  # on the CPU sums are in fp32 and rounded once
        caches: list[SegmentCache] = []
        kept: list[NDArray[np.int64]] = []
        outputs: Outputs | None = None
        for record in self.manifest.segments:
            if reduction is not None and not (record.head or reduction.finished):
                reduction.pass_over(record.call)
            with stopwatch.stage("reduction"):
                chunks, cache, outputs = self._bind_prefill(record, rows, reduction, max_new_tokens)
            with stopwatch.stage("prefill"):
                for chunk in chunks:
                    chunk.run()
                scores = outputs.scores(reduction)
            cache.lengths[:] = rows.length
            caches.append(cache)
            kept.append(rows.origin)
            if not record.head:
                with stopwatch.stage("reduction"):
                    rows = _reduce(rows.after(outputs.hidden[0], record.deepstack), reduction, scores)
        assert outputs is not None  # a decoder has a segment
        with stopwatch.stage("prefill"):
            logits = outputs.small["logits"].pull()[0]
        return Prefilled(logits, caches, reduction.history if reduction else [], kept)

    def _bind_prefill(
        self, record: SegmentRecord, rows: TokenRows, reduction: ReductionState | None, max_new_tokens: int
    ) -> tuple[list[BoundSegment], SegmentCache, Outputs]:
        """The runs that make up a segment's prefill: one, or chunks of which only the last gives an output."""
        length = rows.length
        layers = len(record.attention_layers)
        device = self.device
        size = bucket_for(record, length)
        cache = self._cache(record, [max(size, self._room(length, max_new_tokens))] * layers)
        rows = rows.padded(size)
        previous = {"previous": device.upload(_previous(reduction, size))} if record.scores else {}
        outputs = self.outputs(record, size)
        chunks = []
        parts = chunks_of(record, size, self.backend.chunk)
        for start, end in parts:
            part = rows if len(parts) == 1 else rows.part(start, end)
            inputs = part.inputs(record.deepstack) | previous
            inputs["kv_len"] = device.upload(np.full(layers, end, np.int64))
            inputs["last"] = device.upload(np.array([min(length, end) - start - 1], np.int64))
            chunks.append(self.backend.bind(record.prefill, inputs, outputs.bound if end == size else {}, cache))
        return chunks, cache, outputs

    def prefill_fixed(
        self, rows: TokenRows, labels: NDArray[np.int64], max_new_tokens: int, stopwatch: Stopwatch
    ) -> Prefilled:
        """Run the one static graph of the fixed mode, which reduces inside.

        Raises:
            PromptError: text, visual tokens or tracks exceed what the graph was built for.
            BudgetError: the schedule would merge tokens that have nothing to merge into, and the rest does not fit.
        """
        (record,) = self.manifest.segments
        fixed = self.manifest.fixed
        model = self.manifest.model
        schedule = self.manifest.reduction.schedule
        device = self.device
        assert fixed is not None  # a manifest of the fixed mode has both
        assert schedule is not None
        with stopwatch.stage("reduction"):
            labels = tracks.request_labels(labels)
            drops = _fixed_drops(self.manifest, labels)
            calls = [*range(len(schedule.merge_shares)), schedule.prune_layer + 1]
            lengths = _lengths_by_layer(len(labels), dict(zip(calls, drops, strict=True)), model.num_layers)
            room = (self._room(length, max_new_tokens) for length in lengths)
            cache = self._cache(record, list(map(max, fixed.lengths, room)))
            size = fixed.max_text + fixed.max_visual
            padded_labels = np.pad(labels, (0, size - len(labels)), constant_values=tracks.TEXT)
            told = {
                "kv_len": np.array(fixed.lengths, np.int64),
                "last": np.array([len(labels) - 1], np.int64),
                "label": padded_labels,
                "order": tracks.track_order(padded_labels),
                "drops": np.array(drops, np.int64),
            }
            inputs = rows.on(device).typed(self._float_type).padded(size).inputs(record.deepstack)
            inputs |= {name: device.upload(vector) for name, vector in told.items()}
            logits = device.mirror((1, model.vocab_size), np.float32)
            origin = device.mirror((size - sum(fixed.drops),), np.int64)
            outputs = {"logits": logits.there, "origin": origin.there}
            bound = self.backend.bind(record.prefill, inputs, outputs, cache)
        with stopwatch.stage("prefill"):
            bound.run()
            last = logits.pull()[0]
            places = origin.pull()
        cache.lengths[:] = lengths
        return Prefilled(last, [cache], _fixed_history(labels, calls, drops), [places[: lengths[-1]]])

    def decoder(self, prefilled: Prefilled) -> Decoder:
        """A decode loop over the caches of a prefill."""
        return Decoder(self, prefilled.caches)

    def outputs(self, record: SegmentRecord, size: int) -> Outputs:
        """Buffers for what a segment gives for `size` tokens."""
        model = self.manifest.model
        mirror = self.device.mirror
        if record.head:
            return Outputs(None, {"logits": mirror((1, model.vocab_size), np.float32)})
        hidden = self.device.empty((1, size, model.hidden_size), self._float_type)
        names = ("similarity", "importance") if record.scores else ()
        return Outputs(hidden, {name: mirror((size,), np.float32) for name in names})

    def _cache(self, record: SegmentRecord, capacities: Sequence[int]) -> SegmentCache:
        model = self.manifest.model
        shapes = [(1, model.num_kv_heads, capacity, model.head_dim) for capacity in capacities]
        return self.backend.cache(record, shapes, self._float_type)

    def _room(self, length: int, max_new_tokens: int) -> int:
        """Slots for a prompt and its answer; padding of the last step is written, too."""
        return length + max_new_tokens + self.backend.decode_width - 1


@dataclass
class Outputs:
    """What a segment gives: hidden states, which stay on the device, or what the host reads."""

    hidden: Any  # [1, S, D], or None
    small: Mapping[str, Mirror]  # logits [1, V], or similarity and importance [S]

    @property
    def bound(self) -> dict[str, Any]:
        """Buffers by the graph's names."""
        rows = {} if self.hidden is None else {"hidden_out": self.hidden}
        return rows | {name: mirror.there for name, mirror in self.small.items()}

    def scores(self, reduction: ReductionState | None) -> tuple[Scores | None, Scores | None]:
        """Similarity and importance, as far as the next call reads them: what it does not, never leaves the device."""
        if reduction is None or "similarity" not in self.small:
            return None, None
        wanted = {"similarity": reduction.wants_similarity, "importance": reduction.wants_importance}
        for name, wants in wanted.items():
            if wants:
                self.small[name].request()
        similarity, importance = (self.small[name].pull() if wants else None for name, wants in wanted.items())
        return similarity, importance


class Decoder:
    """One token at a time through all segments, bound once: a step writes a row, runs, and copies no cache.

    Where graphs take more than one token, those behind the first are padding: the next step overwrites their slots.
    """

    def __init__(self, stitcher: Stitcher, caches: Sequence[SegmentCache]) -> None:
        model = stitcher.manifest.model
        device = stitcher.device
        self._width = stitcher.backend.decode_width
        half = model.head_dim // 2
        widths = {"hidden": model.hidden_size, "cos": half, "sin": half}
        self._caches = caches
        self._rows = {name: device.mirror((1, self._width, n), model.float_type) for name, n in widths.items()}
        self._kv_lens: list[Mirror] = []
        segments: list[BoundSegment] = []
        common = {name: mirror.there for name, mirror in self._rows.items()}
        common["last"] = device.upload(np.zeros(1, np.int64))
        common["previous"] = device.upload(np.full(self._width, -1, np.int64))
        for record, cache in zip(stitcher.manifest.segments, caches, strict=True):
            self._kv_lens.append(device.mirror((len(record.attention_layers),), np.int64))
            inputs = common | {"kv_len": self._kv_lens[-1].there}
            if record.deepstack:  # generated tokens have no visual features
                shape = (record.deepstack, self._width, model.hidden_size)
                inputs["deepstack"] = device.zeros(shape, model.float_type)
            outputs = stitcher.outputs(record, self._width)
            segments.append(stitcher.backend.bind(record.decode, inputs, outputs.bound, cache))
            common["hidden"] = outputs.hidden  # the very buffer that the segment before writes
        self._logits = outputs.small["logits"]
        self._run = stitcher.backend.chain(segments)

    def step(self, hidden: Rows, cos: Rows, sin: Rows) -> Rows:
        """One token's embedding [D] and tables [hd/2] -> logits [V], valid until the next step.

        Raises:
            PromptError: a cache is full.
        """
        for mirror, row in zip(self._rows.values(), (hidden, cos, sin), strict=True):
            mirror.host[0, 0] = row
            mirror.push()
        for cache, kv_len in zip(self._caches, self._kv_lens, strict=True):
            np.add(cache.lengths, self._width, out=kv_len.host)
            for needed, capacity in zip(kv_len.host, cache.capacities, strict=True):
                if needed > capacity:
                    raise PromptError(f"a cache of {capacity} tokens is full: ask for fewer new tokens")
            kv_len.push()
        self._run()
        for cache in self._caches:
            cache.lengths += 1
        logits: Rows = self._logits.pull()[0]
        return logits


def chunks_of(record: SegmentRecord, size: int, chunk: int | None) -> list[tuple[int, int]]:
    """Begin and end of each chunk of a prefill; only a segment that ends in logits and has no buckets has several."""
    step = chunk if chunk is not None and record.head and record.buckets is None else size
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


def check_cuts(reducer: Reducer, settings: ReductionSettings, manifest: Manifest) -> None:
    """Refuse a reducer that acts where the segments of a bundle are not cut.

    Raises:
        ReducerError: with the calls of both.
    """
    calls = reducer.calls(settings)
    if not set(calls) <= set(manifest.calls):
        raise ReducerError(
            f"reducer {reducer.name} acts at calls {_listed(calls)} at cost {settings.cost:g}, this bundle was cut for "
            f"{manifest.reduction.reducer} at calls {_listed(manifest.calls)}: build it with --reducer {reducer.name}"
        )


def _listed(calls: Sequence[int]) -> str:
    return ", ".join(map(str, calls))


def _previous(reduction: ReductionState | None, size: int) -> NDArray[np.int64]:
    previous = np.full(size, -1, np.int64)
    if reduction is not None and reduction.wants_similarity:
        found = tracks.previous_in_track(reduction.labels)
        previous[: found.size] = found
    return previous


def _reduce_embeddings(rows: TokenRows, reduction: ReductionState | None) -> TokenRows:
    if reduction is None:
        return rows
    wanted = reduction.wants_similarity
    similarity = rows.device.similarity(rows.hidden, reduction.labels) if wanted else None
    features = None
    if reduction.wants_features:
        features = rows.device.download(rows.hidden)[: rows.length].astype(np.float32, copy=False)
    return rows.reduced(reduction.step(similarity, None, features))


def _reduce(
    rows: TokenRows, reduction: ReductionState | None, scores: tuple[Scores | None, Scores | None]
) -> TokenRows:
    if reduction is None or reduction.finished:
        return rows
    similarity, importance = (None if vector is None else vector[: rows.length] for vector in scores)
    return rows.reduced(reduction.step(similarity, importance))


def _fixed_drops(manifest: Manifest, labels: NDArray[np.int64]) -> list[int]:
    """How many tokens each reduction of the static graph drops for this prompt."""
    fixed = manifest.fixed
    schedule = manifest.reduction.schedule
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
    left = labels.size
    room = fixed.max_text + fixed.max_visual
    for drop, most in zip(drops, fixed.drops, strict=True):
        left = left - drop
        room = room - most
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
    total = labels.size
    visual = tracks.count_visual(labels)
    history = []
    for position, (call, drop) in enumerate(zip(calls, drops, strict=True)):
        kind = "prune" if position == len(calls) - 1 else "merge"
        history.append(CallRecord(call, kind if drop else "none", total, total - drop, visual, visual - drop))  # type: ignore[arg-type]
        total = total - drop
        visual = visual - drop
    return history
