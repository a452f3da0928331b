"""The static sizes of a bundle: longest prompt and answer, sizes of a prefill, and what the fixed mode is built for."""

from __future__ import annotations

import math

from framefusion.errors import BudgetError, CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.families.reading import configs as reading
from framefusion.export.families.reading import language
from framefusion.export.graphs.tracing.dialects import Dialect
from framefusion.export.options import DEFAULT_INPUT, DEFAULT_NEW_TOKENS, BuildOptions
from framefusion.reducers import load_reducer
from framefusion.reduction.budget import FixedSchedule, drop_counts, kept_by_prune
from framefusion.runtime.format.manifest import FixedRecord, Limits, ReductionRecord

BUCKET_RATIO = 0.8  # of neighbouring buckets: at most a quarter of a bucket is padding, an eighth on average
BUCKET_MULTIPLE = 16


def limits_of(checkpoint: Checkpoint, options: BuildOptions, video_tokens: int) -> Limits:
    """Longest input and cache, in tokens: the options', else room for a video within what the LLM was trained for.

    Args:
        checkpoint: its configuration says where the LLM's attention or RoPE ends.
        options: of the build.
        video_tokens: tokens of the longest video that is sampled.

    Raises:
        CheckpointError: a limit of the options is beyond one of the checkpoint.
        BudgetError: the cache has no room for an answer.
    """
    config = reading.text_config(checkpoint)
    trained = config.get("max_position_embeddings")
    # 1. where the checkpoint's attention is another one: behind a sliding window, or where dynamic RoPE changes
    window = language.attention_window(config)
    dynamic = language.rope_type(config) == "dynamic"
    ends = [end for end in (window, trained if dynamic else None) if end is not None]
    end = min(ends, default=None)
    # 2. the input: the default must leave room for new tokens before that end
    usual = max(DEFAULT_INPUT, video_tokens + options.max_text_len)
    room = usual if end is None else max(end - DEFAULT_NEW_TOKENS, end // 2)
    longest = options.max_input_len or min(usual, room, int(trained or usual))
    if trained is not None and longest > trained:
        raise CheckpointError(
            f"--max-input-len {longest} is beyond max_position_embeddings {trained} of the checkpoint"
        )
    # 3. the cache: input and answer
    capacity = options.max_kv_cache_capacity or longest + DEFAULT_NEW_TOKENS
    if options.max_kv_cache_capacity is None and end is not None and longest < end:
        capacity = min(capacity, end)
    if capacity <= longest:
        raise BudgetError(
            f"--max-kv-cache-capacity {capacity} leaves no room for new tokens after --max-input-len {longest}"
        )
    if window is not None and capacity > window:
        raise CheckpointError(
            f"--max-kv-cache-capacity {capacity} is beyond sliding_window {window}, from where on the checkpoint's "
            f"attention forgets and this package's does not: give {window} or less"
        )
    if trained is not None and capacity > trained and dynamic:
        raise CheckpointError(
            f"--max-kv-cache-capacity {capacity} is beyond max_position_embeddings {trained}, where dynamic RoPE "
            f"changes: give {trained} or less"
        )
    return Limits(longest, capacity)


def buckets_of(
    options: BuildOptions, dialect: Dialect, longest: int, record: ReductionRecord
) -> tuple[int, ...] | None:
    """Sizes of a prefill, in tokens, ascending.

    Returns:
        those of the options; None where the dialect runs every length; else a ladder down to the cost.

    Raises:
        BudgetError: those of the options do not reach the longest input.
    """
    chosen = options.buckets
    if chosen is None:
        return None if dialect.exact_shapes else _default_buckets(options, longest, record)
    if min(chosen) < 1 or max(chosen) < longest:
        raise BudgetError(
            f"--buckets {','.join(map(str, chosen))} do not reach --max-input-len {longest}: add {longest} to them"
        )
    return tuple(sorted(set(chosen)))


def _default_buckets(options: BuildOptions, longest: int, record: ReductionRecord) -> tuple[int, ...]:
    """A ladder; a reducer that is done before the LLM with an exact count adds the size that it leaves of a video."""
    sizes = set(bucket_ladder(longest, record.cost))
    if record.mode == "adaptive" and record.depth is None and load_reducer(record.reducer).static:
        visual = max(longest - options.max_text_len, 0)
        sizes.add(longest - visual + kept_by_prune(visual, 1 - record.cost))
    return tuple(sorted(sizes))


def bucket_ladder(longest: int, cost: float) -> tuple[int, ...]:
    """Sizes from the longest input down to its share `cost`, each BUCKET_RATIO of the next."""
    sizes = [longest]
    size = longest
    while size > max(cost * longest, BUCKET_MULTIPLE):
        size = max(math.ceil(size * BUCKET_RATIO / BUCKET_MULTIPLE) * BUCKET_MULTIPLE, 1)
        if size >= sizes[-1]:
            break
        sizes.append(size)
    return tuple(sorted(sizes))


def fixed_record(
    options: BuildOptions, schedule: FixedSchedule, longest: int, longest_track: int, num_layers: int
) -> FixedRecord:
    """Static sizes: text and visual tokens have a maximum each, because only the latter are dropped.

    Args:
        options: of the build.
        schedule: what each call drops.
        longest: longest input, in tokens.
        longest_track: temporal grids of the longest video that is sampled.
        num_layers: of the decoder.

    Raises:
        BudgetError: the text leaves no room for a video.
    """
    text = options.max_text_len
    visual = longest - text
    if visual < 1:
        raise BudgetError(f"--max-text-len {text} leaves no room for video in --max-input-len {longest}")
    drops = drop_counts(schedule, visual, num_tracks=0)
    lengths = schedule.lengths(text + visual, drops, num_layers)
    return FixedRecord(text, visual, min(longest_track, visual), tuple(lengths), tuple(drops))
