"""Which reduction a bundle has, and so where its decoder is cut: the options, held to what the model can do."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from framefusion.errors import BudgetError, ReducerError
from framefusion.export.families.family import Family
from framefusion.export.graphs.decoder import DecoderConfig
from framefusion.export.graphs.segments import SegmentPlan, cut_after, whole_decoder
from framefusion.export.options import DEFAULT_DEPTH, BuildOptions
from framefusion.reducers import DEFAULT, load_reducer, reducer_names
from framefusion.reduction.budget import (
    FixedSchedule,
    check_cost,
    scale_schedule,
    schedule_for_cost,
    smallest_cost,
)
from framefusion.reduction.policy import ReductionSettings
from framefusion.runtime.format.manifest import Mode, ReductionRecord


def reduction_record(family: Family, config: DecoderConfig, options: BuildOptions) -> ReductionRecord:
    """The manifest's part on the reduction.

    Args:
        family: gives the threshold of similarity that options leave open.
        config: of the decoder that is built.
        options: of the build.

    Raises:
        BudgetError: the mode is unknown, options of another mode were given, or the cost cannot be reached.
        ReducerError: the reducer is unknown, or belongs to another mode.
    """
    # 1. options of one mode alone
    if options.reduction not in get_args(Mode):
        raise BudgetError(f"reduction {options.reduction!r} is unknown; known are {', '.join(get_args(Mode))}")
    if options.reduction != "fixed" and (options.merge_shares, options.prune_layer) != (None, None):
        raise BudgetError(f"--merge-shares and --prune-layer belong to --reduction fixed, not {options.reduction}")
    if options.reducer not in {"none": (DEFAULT, "none"), "fixed": (DEFAULT,)}.get(options.reduction, reducer_names()):
        load_reducer(options.reducer)  # refuses a name that nobody knows
        raise ReducerError(
            f"--reducer {options.reducer} belongs to --reduction adaptive, not {options.reduction}: leave one out"
        )
    if "none" in (options.reduction, options.reducer):
        return ReductionRecord("none", reducer="none")
    # 2. the thresholds, which a run may change
    check_cost(options.cost, smallest_cost(config.num_layers))
    similarity = options.similarity_lower_bound
    similarity = family.similarity_lower_bound if similarity is None else similarity
    # 3. where it may act, which is built in
    if options.reduction == "adaptive":
        depth = min(DEFAULT_DEPTH, config.num_layers - 2) if options.depth is None else options.depth
        settings = ReductionSettings(options.cost, similarity, options.ratio_lower_bound, config.num_layers, depth)
        last = max(load_reducer(options.reducer).calls(settings), default=0)
        record = ReductionRecord("adaptive", options.cost, similarity, options.ratio_lower_bound)
        return replace(record, depth=last - 1 if last else None, reducer=options.reducer)
    schedule = _schedule(options, config.num_layers)
    return ReductionRecord("fixed", options.cost, similarity, options.ratio_lower_bound, schedule=schedule)


def segments_of(record: ReductionRecord, config: DecoderConfig) -> tuple[SegmentPlan, ...]:
    """The decoder, cut behind the attentions where the reducer acts; whole where it acts nowhere inside.

    Raises:
        ReducerError: see `reduced_layers`.
    """
    layers = reduced_layers(record, config.num_layers)
    if not layers:
        return whole_decoder(config.num_layers, deepstack=config.deepstack, one_length=record.mode != "fixed")
    return cut_after(config.num_layers, layers, config.deepstack)


def reduced_layers(record: ReductionRecord, num_layers: int) -> tuple[int, ...]:
    """Layers behind whose attention the reducer of a bundle acts, ascending; none where it is done before the LLM.

    Raises:
        ReducerError: the method acts where this model has no layer left to save on.
    """
    if record.mode != "adaptive" or record.depth is None:
        return ()
    settings = ReductionSettings(
        record.cost, record.similarity_lower_bound, record.ratio_lower_bound, num_layers, record.depth
    )
    calls = load_reducer(record.reducer).calls(settings)
    if max(calls, default=0) != record.depth + 1 or sorted(set(calls)) != list(calls):
        raise ReducerError(
            f"reducer {record.reducer} acts at calls {calls} of {num_layers} layers at depth {record.depth}, ascending "
            f"ones up to {record.depth + 1} were expected: the method is at fault, take another with --reducer"
        )
    return tuple(call - 1 for call in calls if call > 0)


def _schedule(options: BuildOptions, num_layers: int) -> FixedSchedule:
    if options.merge_shares is None or options.prune_layer is None:
        raise BudgetError("the fixed mode needs its schedule: give --merge-shares and --prune-layer, or --calibrate")
    try:
        return schedule_for_cost(options.cost, options.merge_shares, options.prune_layer, num_layers)
    except BudgetError:
        # merges that alone reach less than the cost are scaled down; a cost out of reach is refused there as well
        return scale_schedule(options.merge_shares, options.prune_layer, options.cost, num_layers)
