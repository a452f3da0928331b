"""What a build will write, worked out from configuration and headers alone: geometry, segments, sizes, records.

Reads no weight and writes nothing; `build.py` carries a plan out, `check.py` repeats it in eager torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from framefusion.errors import BudgetError, CheckpointError, ReducerError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.origin.source import license_files
from framefusion.export.checkpoints.tensors.leftovers import check_all_read
from framefusion.export.checkpoints.tensors.streaming import stream
from framefusion.export.checkpoints.tensors.weights import (
    AnySource,
    Source,
    check_parameter,
    check_parameters,
    load_parameters,
    parameter_bytes,
)
from framefusion.export.families import decoders, family_of
from framefusion.export.families.family import Family
from framefusion.export.families.reading import configs as reading
from framefusion.export.families.reading import language
from framefusion.export.families.towers import TowerPlan
from framefusion.export.graphs.decoder import DecoderConfig
from framefusion.export.graphs.fixed import FixedPrefill
from framefusion.export.graphs.segments import SegmentPlan, cut_after, whole_decoder
from framefusion.export.graphs.tracing.dialects import DIALECTS, Dialect
from framefusion.export.graphs.tracing.signatures import segment_module
from framefusion.export.options import BuildOptions as BuildOptions  # part of this module's interface
from framefusion.reducers import DEFAULT, load_reducer, reducer_names
from framefusion.reduction.budget import (
    FixedSchedule,
    check_cost,
    drop_counts,
    kept_by_prune,
    scale_schedule,
    schedule_for_cost,
    smallest_cost,
)
from framefusion.reduction.policy import ReductionSettings
from framefusion.runtime.format.manifest import (
    FixedRecord,
    Limits,
    Mode,
    ModelRecord,
    ReductionRecord,
    SegmentRecord,
    VisionRecord,
)
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.preprocess import Preprocessing

DEFAULT_DEPTH = 7  # merging of the published models ends within the first handful of layers
DEFAULT_INPUT = 8192
DEFAULT_NEW_TOKENS = 1024
BUCKET_RATIO = 0.8  # of neighbouring buckets: at most a quarter of a bucket is padding, an eighth on average
BUCKET_MULTIPLE = 16
VISION_GRAPH = "vision/graph.onnx"
GRAPH = "graph.onnx"
DECODE_GRAPH = "decode.onnx"
WEIGHTS = "weights.bin"


class BuildPlan:
    """The plan of one bundle.

    Raises:
        UnknownFamilyError, CheckpointError, BudgetError: before anything is written.
    """

    def __init__(self, checkpoint: Checkpoint, options: BuildOptions) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.family: Family = family_of(checkpoint.config)
        checkpoint.check_plain()
        license_files(checkpoint.folder)  # refuses one that leads out of the folder before anything is written
        self.tower: TowerPlan = self.family.plan_tower(checkpoint)
        config = decoders.decoder_config(checkpoint, self.family, options.num_decoder_layer)
        self.config: DecoderConfig = replace(config, deepstack=self.tower.deepstack)
        self.embedding_key = decoders.embedding_key(checkpoint, self.family)
        self.dialect = _dialect(options.dialect, self.config.head_dim)
        self.sampling = self._sampling()
        self.preprocessing = self._preprocessing()
        self._check_widths()
        self.limits = self._limits()
        self.reduction = _reduction(self.family, self.config, options)
        self.template = self.family.template(checkpoint)
        reading.check_placeholders(checkpoint, self.template, checkpoint.shape(self.embedding_key)[0])
        reading.generation(checkpoint)  # refuses what is malformed before anything is written
        self.fixed = self._fixed()
        self.segments: tuple[SegmentPlan, ...] = (
            cut_after(self.config.num_layers, looked_at, self.config.deepstack)
            if (looked_at := layers_looked_at(self.reduction, self.config.num_layers))
            else whole_decoder(self.config.num_layers, deepstack=self.config.deepstack)
        )
        for segment in self.segments:
            check_parameters(segment_module(self.config, segment), checkpoint, self.sources(segment))
        check_parameters(self.tower.module, checkpoint, self.tower.sources)
        check_all_read(checkpoint, self._taken(), self.tower.unused)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights in the bundle."""
        dtype: torch.dtype = getattr(torch, self.options.dtype)
        return dtype

    def sources(self, plan: SegmentPlan) -> dict[str, AnySource]:
        """Where the parameters of a segment are in the checkpoint."""
        return decoders.decoder_sources(self.checkpoint, self.family, plan)

    def model_record(self) -> ModelRecord:
        """The manifest's part on geometry."""
        names = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
        names += ("vocab_size", "rope_theta", "mrope_section", "mrope_interleaved", "importance_rows")  # type: ignore[assignment]
        facts = {name: getattr(self.config, name) for name in names}
        model_type = str(self.checkpoint.config.get("model_type"))
        return ModelRecord(self.family.name, model_type, dtype=self.options.dtype, **facts)

    def segment_record(self, plan: SegmentPlan) -> SegmentRecord:
        """The manifest's part on one segment."""
        folder = f"segments/{plan.name}"
        fixed = self.reduction.mode == "fixed"
        return SegmentRecord(
            name=plan.name,
            graph=f"{folder}/{GRAPH}",
            attention_layers=plan.attention_layers,
            num_mlps=sum(block.kind == "mlp" for block in plan.blocks),
            scores=plan.scores,
            head=plan.head,
            weight_bytes=parameter_bytes(segment_module(self.config, plan), self.dtype),
            buckets=None if fixed else self.buckets(),
            decode_graph=f"{folder}/{DECODE_GRAPH}" if fixed else None,
            deepstack=plan.deepstack,
        )

    def vision_record(self) -> VisionRecord:
        """The manifest's part on the vision tower."""
        told = {field.name for field in fields(VisionRecord)} & {field.name for field in fields(TowerPlan)}
        facts: dict[str, Any] = {name: getattr(self.tower, name) for name in told}
        facts["kind"] = self.tower.settings.kind
        return VisionRecord(VISION_GRAPH, weight_bytes=parameter_bytes(self.tower.module, self.dtype), **facts)

    def buckets(self) -> tuple[int, ...] | None:
        """Sizes of a prefill: as given, none where the dialect runs every length, else a ladder down to the cost."""
        longest = self.limits.max_input_len
        chosen = self.options.buckets
        if chosen is None:
            return None if self.dialect.exact_shapes else self._ladder()
        if min(chosen) < 1 or max(chosen) < longest:
            raise BudgetError(
                f"--buckets {','.join(map(str, chosen))} do not reach --max-input-len {longest}: add {longest} to them"
            )
        return tuple(sorted(set(chosen)))

    def _ladder(self) -> tuple[int, ...]:
        """A reducer that is done before the LLM with an exact count has one size of its own: the longest video's."""
        longest = self.limits.max_input_len
        record = self.reduction
        sizes = set[int]()
        if record.mode == "adaptive" and record.depth is None and load_reducer(record.reducer).static:
            visual = max(longest - self.options.max_text_len, 0)
            sizes = {longest - visual + kept_by_prune(visual, 1 - record.cost)}
        return tuple(sorted(sizes | set(bucket_ladder(longest, record.cost))))

    def fixed_module(self) -> FixedPrefill:
        """The static prefill of the fixed mode, on the meta device."""
        assert self.fixed is not None
        assert self.reduction.schedule is not None
        with torch.device("meta"):
            return FixedPrefill(self.config, self.reduction.schedule, self.fixed)

    def eager_loaders(self, *, streamed: bool = False) -> Mapping[str, Callable[[], nn.Module]]:
        """Graph of the bundle -> the torch module it was made of, with weights.

        The plan's own modules stay without them; what the loaders give is freed with the loaders.

        Args:
            streamed: a layer's weights are read when it runs, each time, and memory holds no other's: see streaming.py.
        """

        def load(module: nn.Module, sources: Mapping[str, AnySource]) -> Callable[[], nn.Module]:
            filled = self._streamed if streamed else self._loaded
            return cache(lambda: filled(copy.deepcopy(module), sources))

        def share(plain: Callable[[], nn.Module], sources: Mapping[str, AnySource]) -> Callable[[], nn.Module]:
            def shared() -> nn.Module:
                module = self.fixed_module()
                if streamed:
                    return self._streamed(module, sources)
                module.load_state_dict(plain().state_dict(), assign=True)
                return module

            return shared

        loaders = {VISION_GRAPH: load(self.tower.module, self.tower.sources)}
        for plan in self.segments:
            record = self.segment_record(plan)
            sources = self.sources(plan)
            loaders[record.decode] = load(segment_module(self.config, plan), sources)
            if record.prefill != record.decode:
                loaders[record.prefill] = share(loaders[record.decode], sources)
        return loaders

    def _loaded(self, module: nn.Module, sources: Mapping[str, AnySource]) -> nn.Module:
        return load_parameters(module, self.checkpoint, sources, torch.float32)

    def _streamed(self, module: nn.Module, sources: Mapping[str, AnySource]) -> nn.Module:
        stream(module, lambda name: sources[name].make(self.checkpoint))
        return module

    def prompt_texts(self) -> Iterator[object]:
        """What template and preprocessing put into prompts, among other values."""
        parts: tuple[Any, ...] = (self.template, self.preprocessing, *self.template.turns.values())
        for part in parts:
            yield from (getattr(part, one.name) for one in fields(part))
        yield from self.template.pads

    def stored_types(self) -> set[str]:
        """Types, as safetensors names them, of the tensors that a bundle of all layers reads."""
        return {self.checkpoint.dtype(key) for key in self._taken()}

    def _taken(self) -> Iterator[str]:
        """Keys that a bundle of all layers reads, whatever --num-decoder-layer leaves out of this one."""
        layers = decoders.stored_depth(self.checkpoint, self.family)
        whole = whole_decoder(layers, deepstack=self.config.deepstack)[0]
        parameters = segment_module(replace(self.config, num_layers=layers), whole).named_parameters()
        sources = self.sources(whole)
        yield from (key for name, _ in parameters for key in sources[name].keys)
        yield from (key for name, _ in self.tower.module.named_parameters() for key in self.tower.sources[name].keys)
        yield from (self.embedding_key, *self.tower.extra_rows.values())

    def _check_widths(self) -> None:
        """Refuse rows that would not fit side by side: the embedding table's, the tower's and learned ones."""
        found = self.tower.out_width
        width = self.config.hidden_size
        if found != width:
            raise CheckpointError(
                f"the vision tower gives rows of {found}, hidden_size is {width}: config.json is another one's"
            )
        patch = self.preprocessing.patch_size
        frames = getattr(self.preprocessing, "temporal_patch_size", 1)
        numbers = 3 * frames * patch**2
        if numbers != self.tower.patch_width:
            raise CheckpointError(
                f"patches of {frames} frame(s) and {patch} x {patch} pixels are {numbers} numbers, the vision tower "
                f"takes {self.tower.patch_width}: patch_size or temporal_patch_size is of another model"
            )
        ordered = getattr(self.preprocessing, "merge_size", 1)
        merged = self.tower.settings.block_side()
        if merged not in (None, ordered):
            raise CheckpointError(
                f"{self.checkpoint.folder}: the processor has merge_size {ordered}, vision_config spatial_merge_size "
                f"{merged}: one of the two is of another model"
            )
        for key in self.tower.extra_rows.values():
            check_parameter(self.checkpoint, Source(key), (width,))

    def _limits(self) -> Limits:
        """As asked; else room for the longest video that is sampled, within what the LLM was trained for."""
        options = self.options
        config = reading.text_config(self.checkpoint)
        trained = config.get("max_position_embeddings")
        usual = max(DEFAULT_INPUT, self.preprocessing.video_tokens(self.sampling.max_frames) + options.max_text_len)
        window = language.attention_window(config)
        dynamic = language.rope_type(config) == "dynamic"
        ends = [end for end in (window, trained if dynamic else None) if end is not None]
        end = min(ends, default=None)  # beyond it the checkpoint's attention is another one
        room = usual if end is None else max(end - DEFAULT_NEW_TOKENS, end // 2)
        longest = options.max_input_len or min(usual, room, int(trained or usual))
        if trained is not None and longest > trained:
            raise CheckpointError(
                f"--max-input-len {longest} is beyond max_position_embeddings {trained} of the checkpoint"
            )
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

    def _sampling(self) -> FrameSampling:
        told = self.family.sampling(self.checkpoint)
        options = self.options
        frames = options.max_frames or told.max_frames
        low = min(told.min_frames, frames)
        force = told.force and options.fps is None
        return replace(told, fps=options.fps or told.fps, max_frames=frames, min_frames=low, force=force)

    def _preprocessing(self) -> Preprocessing:
        told = self.family.preprocessing(self.checkpoint)
        options = self.options
        names = (
            "min_pixels", "max_pixels", "max_slice_nums", "max_tiles", "mm_spatial_pool_mode", "frame_label",
            "total_pixels", "resize_rounding",
        )  # fmt: skip
        return told.with_options(**{name: getattr(options, name) for name in names})

    def _fixed(self) -> FixedRecord | None:
        """Static sizes: text and visual tokens have their own maximum, because only the latter are dropped."""
        schedule = self.reduction.schedule
        text = self.options.max_text_len
        if schedule is None:
            return None
        visual = self.limits.max_input_len - text
        if visual < 1:
            raise BudgetError(
                f"--max-text-len {text} leaves no room for video in --max-input-len {self.limits.max_input_len}"
            )
        track = self.preprocessing.longest_track(self.sampling.max_frames)
        drops = drop_counts(schedule, visual, num_tracks=0)
        lengths = []
        present = text + visual
        calls = dict(zip([*range(len(schedule.merge_shares)), schedule.prune_layer + 1], drops, strict=True))
        for layer in range(self.config.num_layers):
            present -= calls.get(layer, 0)
            lengths.append(present)
        return FixedRecord(text, visual, min(track, visual), tuple(lengths), tuple(drops))


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


def _dialect(name: str, head_dim: int) -> Dialect:
    if name not in DIALECTS:
        raise BudgetError(f"dialect {name!r} is unknown; known are {', '.join(DIALECTS)}")
    dialect = DIALECTS[name]
    if head_dim % dialect.head_dim_multiple:
        fitting = ", ".join(other.name for other in DIALECTS.values() if head_dim % other.head_dim_multiple == 0)
        raise BudgetError(
            f"head_dim {head_dim} is no multiple of {dialect.head_dim_multiple}, as the {name} dialect's kernels want: "
            f"build with --dialect {fitting}"
        )
    return dialect


def _reduction(family: Family, config: DecoderConfig, options: BuildOptions) -> ReductionRecord:
    if options.reduction not in get_args(Mode):
        raise BudgetError(f"reduction {options.reduction!r} is unknown; known are {', '.join(get_args(Mode))}")
    if options.reduction != "fixed" and (options.merge_shares, options.prune_layer) != (None, None):
        raise BudgetError(f"--merge-shares and --prune-layer belong to --reduction fixed, not {options.reduction}")
    if options.reducer not in {"none": (DEFAULT, "none"), "fixed": (DEFAULT,)}.get(options.reduction, reducer_names()):
        load_reducer(options.reducer)  # says it if there is no such one
        raise ReducerError(
            f"--reducer {options.reducer} belongs to --reduction adaptive, not {options.reduction}: leave one out"
        )
    if "none" in (options.reduction, options.reducer):
        return ReductionRecord("none", reducer="none")
    check_cost(options.cost, smallest_cost(config.num_layers))
    similarity = options.similarity_lower_bound
    similarity = family.similarity_lower_bound if similarity is None else similarity
    if options.reduction == "adaptive":
        depth = min(DEFAULT_DEPTH, config.num_layers - 2) if options.depth is None else options.depth
        settings = ReductionSettings(options.cost, similarity, options.ratio_lower_bound, config.num_layers, depth)
        last = max(load_reducer(options.reducer).calls(settings), default=0)
        record = ReductionRecord("adaptive", options.cost, similarity, options.ratio_lower_bound)
        return replace(record, depth=last - 1 if last else None, reducer=options.reducer)
    schedule = _schedule(options, config.num_layers)
    return ReductionRecord("fixed", options.cost, similarity, options.ratio_lower_bound, schedule=schedule)


def layers_looked_at(record: ReductionRecord, num_layers: int) -> tuple[int, ...]:
    """Layers behind whose attention the reducer of a bundle acts, ascending; none where it is done before the LLM.

    Raises:
        ReducerError: the method acts where this model has no layer left to save on.
    """
    if record.mode != "adaptive" or record.depth is None:
        return ()
    thresholds = record.similarity_lower_bound, record.ratio_lower_bound
    calls = load_reducer(record.reducer).calls(ReductionSettings(record.cost, *thresholds, num_layers, record.depth))
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


def identity_of(checkpoint: Checkpoint) -> Mapping[str, object]:
    """What tells one checkpoint from another without reading its weights: its files' names, sizes and times."""
    files: set[Path] = set(checkpoint.files.values())
    for folder in (checkpoint.folder, *checkpoint.parts.values()):  # a chat template decides what is built, too
        files |= {path for pattern in ("*.json", "*.jinja") for path in folder.glob(pattern)}
    stats = {path.relative_to(checkpoint.folder).as_posix(): path.stat() for path in sorted(files) if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
