"""Prefill through the segments, with reduction between them.

    hidden --call 0--> segment 0 --call 1--> segment 1 ... --call D+1--> last segment -> logits
                          |                     |                            |
                       cache 0               cache 1                      cache last     (lengths differ)

The decisions are the policy's (framefusion/reduction); here its plans are applied to the rows of hidden states and
rotary tables, which lie on the backend's device: scores come to the host, plans go back. Knows no prompt, no
tokenizer and no video; the static graph of the fixed mode is in fixed_prefill.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import PromptError
from framefusion.reducers import load_reducer
from framefusion.reducers.reducer import ReductionRequest, check_cuts
from framefusion.reduction import tracks
from framefusion.reduction.policy import CallRecord, ReductionSettings, ReductionState
from framefusion.runtime.backends.base import BoundSegment
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.format.manifest import Manifest, SegmentRecord
from framefusion.runtime.generation.segments import Outputs, Rows, Scores, Segments, bucket_for, chunks_of
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.request import Request, Stopwatch


@dataclass
class Prefilled:
    """A request after its prefill."""

    logits: Rows  # [V]
    caches: list[SegmentCache]
    history: list[CallRecord]
    kept: list[NDArray[np.int64]]  # per segment: places in the prompt of the tokens that entered it


def start_reduction(manifest: Manifest, labels: NDArray[np.int64], request: Request) -> ReductionState | None:
    """The reducer's state for a request; None where the bundle does not reduce between segments.

    Args:
        manifest: of the bundle.
        labels: of the tokens that may go.  [S]
        request: cost, thresholds, reducer and seed; the rest is as the bundle says.

    Raises:
        PromptError: the request wants another reduction than the one that is built in.
        ReducerError: the reducer is unknown, or acts where this bundle is not cut.
    """
    record = manifest.reduction
    if record.mode != "adaptive":
        for value, built_in in ((request.reducer, record.reducer), (request.cost, record.cost)):
            if value not in (None, built_in):
                raise PromptError(
                    f"this bundle's reduction is {record.mode}, its reducer {record.reducer} and its cost "
                    f"{record.cost} are built in, {value} was asked: build with --reduction adaptive to choose at run "
                    "time"
                )
        return None
    similarity = request.similarity_lower_bound
    ratio = request.ratio_lower_bound
    settings = ReductionSettings(
        record.cost if request.cost is None else request.cost,
        record.similarity_lower_bound if similarity is None else similarity,
        record.ratio_lower_bound if ratio is None else ratio,
        manifest.model.num_layers,
        record.depth or 0,
    )
    reducer = load_reducer(request.reducer or record.reducer)
    check_cuts(reducer, settings, manifest.calls, record.reducer)
    if settings.cost == 1.0:
        return None
    return reducer.start(ReductionRequest(settings, labels, request.seed or 0))


def check_reduction(manifest: Manifest, request: Request) -> None:
    """Refuse before the first prompt what every prompt would be refused for.

    Args:
        manifest: of the bundle.
        request: cost, thresholds and reducer; the rest is not looked at.

    Raises:
        PromptError, ReducerError: as `start_reduction`.
    """
    start_reduction(manifest, np.zeros(1, np.int64), request)


def prefill(
    segments: Segments,
    rows: TokenRows,
    reduction: ReductionState | None,
    max_new_tokens: int,
    stopwatch: Stopwatch,
    past: Sequence[SegmentCache] | None = None,
) -> Prefilled:
    """Run the segments over S tokens: a prompt, or what follows the tokens that are in caches already.

    Args:
        segments: of the bundle.
        rows: of these tokens, unreduced.
        reduction: the policy's state for this request; None keeps all tokens.
        max_new_tokens: cache slots to leave behind the prompt.
        stopwatch: gets the stages "prefill" (segments) and "reduction" (scores of the embeddings, plans,
            compaction, binding).
        past: caches of an earlier prefill, whose tokens these attend to. They are continued, and grow where they are
            too small; the tokens in them stay where they are, whatever is dropped of the new ones.

    Raises:
        PromptError: no bucket of a segment is large enough.
        BackendError: the backend refuses or fails.
    """
    # 1. Reduce what was embedded: tokens that go here are in no layer's cache.
    with stopwatch.stage("reduction"):
        rows = _reduce_embeddings(rows.on(segments.device), reduction)
        rows = rows.typed(segments.float_type)  # on the CPU sums are in fp32 and rounded once
    caches: list[SegmentCache] = []
    kept: list[NDArray[np.int64]] = []
    outputs: Outputs | None = None
    for index, record in enumerate(segments.manifest.segments):
        if reduction is not None and not (record.head or reduction.finished):
            reduction.pass_over(record.call)
        # 2. Bind the segment for as many tokens as are left: its cache grows by that, not by the prompt.
        with stopwatch.stage("reduction"):
            earlier = None if past is None else past[index]
            cache = _cache(segments, record, rows.length, max_new_tokens, earlier)
            chunks, outputs = _bind(segments, record, rows, reduction, cache)
        # 3. Run it, and bring to the host only the scores that the next decision reads.
        with stopwatch.stage("prefill"):
            for chunk in chunks:
                chunk.run()
            scores = outputs.scores(reduction)
        cache.lengths += rows.length
        caches.append(cache)
        kept.append(rows.origin)
        # 4. Decide, and compact the rows on the device: the next segment gets what stays.
        if outputs.hidden is not None:
            with stopwatch.stage("reduction"):
                rows = _reduce(rows.after(outputs.hidden[0], record.deepstack), reduction, scores)
    assert outputs is not None  # a decoder has a segment
    # 5. Wait for the logits of the last token, the only ones that were computed.
    with stopwatch.stage("prefill"):
        logits = outputs.small["logits"].pull()[0]
    return Prefilled(logits, caches, reduction.history if reduction else [], kept)


def _cache(
    segments: Segments, record: SegmentRecord, length: int, max_new_tokens: int, past: SegmentCache | None
) -> SegmentCache:
    """A segment's cache with room for `length` tokens, padded, and an answer behind what it holds."""
    needed = max(bucket_for(record, length), segments.slots(length, max_new_tokens))
    if past is None:
        return segments.cache(record, [needed] * len(record.attention_layers))
    segments.extend(record, past, [int(held) + needed for held in past.lengths])
    return past


def _bind(
    segments: Segments, record: SegmentRecord, rows: TokenRows, reduction: ReductionState | None, cache: SegmentCache
) -> tuple[list[BoundSegment], Outputs]:
    """The runs that make up a segment's prefill: one, or chunks of which only the last binds an output.

    ONNX Runtime runs the head in the others all the same, for a row each: it has no way to leave out what nobody binds
    (1.24 and 1.32 run every node, whatever `only_execute_path_to_fetches` says).
    """
    segments.check_lengths(cache)
    length = rows.length
    device = segments.device
    size = bucket_for(record, length)
    rows = rows.padded(size)
    outputs = segments.outputs(record, size)
    parts = chunks_of(record, size, segments.backend.chunk)
    vectors = {"previous": _previous(reduction, size)} if record.scores else {}
    for start, end in parts:
        vectors[f"kv_len {start}"] = cache.lengths + end
        vectors[f"last {start}"] = np.array([min(length, end) - start - 1], np.int64)
    there = device.upload_together(vectors)
    previous = {"previous": there["previous"]} if record.scores else {}
    chunks = []
    for start, end in parts:
        part = rows if len(parts) == 1 else rows.part(start, end)
        inputs = part.inputs(record.deepstack) | previous
        inputs["kv_len"] = there[f"kv_len {start}"]
        inputs["last"] = there[f"last {start}"]
        chunks.append(segments.backend.bind(record.prefill, inputs, outputs.bound if end == size else {}, cache))
    return chunks, outputs


def _previous(reduction: ReductionState | None, size: int) -> NDArray[np.int64]:
    """Index of the token before each one in its track, -1 for none and for padding.  [size]"""
    previous = np.full(size, -1, np.int64)
    if reduction is not None and reduction.wants_similarity:
        in_track = tracks.previous_in_track(reduction.labels)
        previous[: in_track.size] = in_track
    return previous


def _reduce_embeddings(rows: TokenRows, reduction: ReductionState | None) -> TokenRows:
    """Call 0: the rows that enter the first segment."""
    if reduction is None:
        return rows
    similarity = rows.device.similarity(rows.hidden, reduction.labels) if reduction.wants_similarity else None
    features = None
    if reduction.wants_features:
        features = rows.device.download(rows.hidden)[: rows.length].astype(np.float32, copy=False)
    return rows.reduced(reduction.step(similarity, None, features))


def _reduce(
    rows: TokenRows, reduction: ReductionState | None, scores: tuple[Scores | None, Scores | None]
) -> TokenRows:
    """A call behind a segment: the rows that enter the next one; scores may be of padding, too."""
    if reduction is None or reduction.finished:
        return rows
    similarity, importance = scores
    length = rows.length
    plan = reduction.step(
        None if similarity is None else similarity[:length], None if importance is None else importance[:length]
    )
    return rows.reduced(plan)
