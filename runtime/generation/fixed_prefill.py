"""Prefill of the fixed mode: one static graph of padded sizes, which merges and prunes inside.

The host works out how many tokens each reduction drops; which ones they are is decided in the graph. Knows no prompt,
no tokenizer and no video.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BudgetError, PromptError
from framefusion.reduction import tracks
from framefusion.reduction.budget import drop_counts
from framefusion.reduction.policy import CallRecord
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.generation.prefill import Prefilled
from framefusion.runtime.generation.segments import Segments
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.request import Stopwatch


def prefill_fixed(
    segments: Segments, rows: TokenRows, labels: NDArray[np.int64], max_new_tokens: int, stopwatch: Stopwatch
) -> Prefilled:
    """Run the one static graph of the fixed mode over a prompt of S tokens.

    Args:
        segments: of a bundle of the fixed mode.
        rows: of the whole prompt, unreduced.
        labels: of its tokens.  [S]
        max_new_tokens: cache slots to leave behind the prompt.
        stopwatch: gets the stages "reduction" (counts, binding) and "prefill" (the graph).

    Raises:
        PromptError: text, visual tokens or tracks exceed what the graph was built for.
        BudgetError: the schedule would merge tokens that have nothing to merge into, and the rest does not fit.
    """
    (record,) = segments.manifest.segments
    fixed = segments.manifest.fixed
    model = segments.manifest.model
    schedule = segments.manifest.reduction.schedule
    device = segments.device
    assert fixed is not None  # a manifest of the fixed mode has both
    assert schedule is not None
    with stopwatch.stage("reduction"):
        # 1. Count what each reduction drops: the tracks of this prompt may allow less than the schedule's shares.
        labels = tracks.request_labels(labels)
        call = fixed_call(segments.manifest, labels)
        # 2. Pad to the size that the graph was built for, and bind it: nothing of its shapes depends on the prompt.
        slots = (segments.slots(length, max_new_tokens) for length in call.lengths)
        cache = segments.cache(record, list(map(max, fixed.lengths, slots)))
        size = call.vectors["label"].size
        inputs = rows.on(device).typed(segments.float_type).padded(size).inputs(record.deepstack)
        inputs |= {name: device.upload(vector) for name, vector in call.vectors.items()}
        logits = device.mirror((1, model.vocab_size), np.float32)
        origin = device.mirror((size - sum(fixed.drops),), np.int64)
        outputs = {"logits": logits.buffer, "origin": origin.buffer}
        bound = segments.backend.bind(record.prefill, inputs, outputs, cache)
    # 3. Run it; the places of the tokens that are left come out beside the logits.
    with stopwatch.stage("prefill"):
        bound.run()
        last = logits.pull()[0]
        places = origin.pull()
    cache.lengths[:] = call.lengths
    return Prefilled(last, [cache], _history(labels, schedule.calls, call.drops), [places[: call.lengths[-1]]])


class FixedCall(NamedTuple):
    """What the static graph is given for one prompt beside its rows.

    Attributes:
        drops: tokens that each reduction drops.
        lengths: tokens that each layer's cache holds behind the prefill.
        vectors: the graph's inputs of whole numbers, by name; "label" is as long as the graph's rows.
    """

    drops: list[int]
    lengths: list[int]
    vectors: dict[str, NDArray[np.int64]]


def fixed_call(manifest: Manifest, labels: NDArray[np.int64]) -> FixedCall:
    """How the static graph is called for a prompt of these labels [S].

    Raises:
        PromptError, BudgetError: see `drops_of_prompt`.
    """
    fixed = manifest.fixed
    schedule = manifest.reduction.schedule
    assert fixed is not None
    assert schedule is not None
    drops = drops_of_prompt(manifest, labels)
    size = fixed.max_text + fixed.max_visual
    padded_labels = np.pad(labels, (0, size - len(labels)), constant_values=tracks.TEXT)
    vectors = {
        "kv_len": np.array(fixed.lengths, np.int64),
        "last": np.array([len(labels) - 1], np.int64),
        "label": padded_labels,
        "order": tracks.track_order(padded_labels),
        "drops": np.array(drops, np.int64),
    }
    return FixedCall(drops, schedule.lengths(len(labels), drops, manifest.model.num_layers), vectors)


def drops_of_prompt(manifest: Manifest, labels: NDArray[np.int64]) -> list[int]:
    """How many tokens each reduction of the static graph drops for a prompt of these labels [S].

    Raises:
        PromptError: text, visual tokens or tracks exceed what the graph was built for.
        BudgetError: too few tokens can merge, and the rest does not fit.
    """
    fixed = manifest.fixed
    schedule = manifest.reduction.schedule
    assert fixed is not None
    assert schedule is not None
    visual = tracks.count_visual(labels)
    for what, count, limit, flag in (
        ("text tokens", labels.size - visual, fixed.max_text, "--max-text-len"),
        ("visual tokens", visual, fixed.max_visual, "--max-input-len"),
        ("temporal grids in a track", tracks.longest_track(labels), fixed.max_track, "--max-frames"),
    ):
        if count > limit:
            raise PromptError(
                f"the prompt has {count} {what}, the bundle takes {limit}: sample less, or rebuild: {flag}"
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


def _history(labels: NDArray[np.int64], calls: Sequence[int], drops: Sequence[int]) -> list[CallRecord]:
    """A record of each reduction, by its counts."""
    total = labels.size
    visual = tracks.count_visual(labels)
    history = []
    for position, (call, drop) in enumerate(zip(calls, drops, strict=True)):
        kind = "prune" if position == len(calls) - 1 else "merge"
        history.append(CallRecord(call, kind if drop else "none", total, total - drop, visual, visual - drop))  # type: ignore[arg-type]
        total = total - drop
        visual = visual - drop
    return history
