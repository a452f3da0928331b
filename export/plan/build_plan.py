"""What a build will write, worked out from configuration and headers alone: geometry, segments, sizes, records.

Reads no weight and writes nothing; `build.py` carries a plan out, `check.py` repeats it in eager torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from framefusion.errors import BudgetError, BundleError, CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.origin.source import license_files
from framefusion.export.checkpoints.tensors.leftovers import check_all_read
from framefusion.export.checkpoints.tensors.weights import AnySource, LatestBlocks, Source, check_parameter
from framefusion.export.families import decoders, family_of
from framefusion.export.families.family import Family
from framefusion.export.families.reading import configs as reading
from framefusion.export.families.towers import TowerPlan
from framefusion.export.graphs.decoder import DecoderConfig
from framefusion.export.graphs.graph_plan import GraphPlan
from framefusion.export.graphs.segments import SegmentPlan, segment_module, whole_decoder
from framefusion.export.graphs.tower import Levels
from framefusion.export.graphs.tracing.dialects import DIALECTS, Dialect
from framefusion.export.graphs.tracing.kv_cache import OPSET as KV_CACHE_OPSET
from framefusion.export.options import AS_STORED, DEQUANTIZED, TowerInput
from framefusion.export.options import BuildOptions as BuildOptions  # part of this module's interface
from framefusion.export.plan import sizes
from framefusion.export.plan.graphs import fixed_graphs, segment_graphs, tower_graph
from framefusion.export.plan.kv_cache import KvScales, check_kv_cache
from framefusion.export.plan.reduction import reduction_record, segments_of
from framefusion.export.plan.stored_weights import check_stored
from framefusion.export.plan.weight_plan import WeightPlan, check_quantized, parse_head, parse_weights
from framefusion.export.quantization.code_store import CodeStore
from framefusion.runtime.format.manifest import (
    FixedRecord,
    Manifest,
    ModelRecord,
    QuantizationRecord,
    SegmentRecord,
    VisionRecord,
)
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.preprocess import Preprocessing
from framefusion.storage.records import RecordError, from_json

WEIGHTS = "weights.bin"


class BuildPlan:
    """The plan of one bundle.

    Attributes:
        checkpoint, options: what it is worked out from.
        codes: of its weights that were chosen by films; None where none were, or where nothing is to be written.
        family, tower, config, embedding_key: what the checkpoint's configuration and headers say.
        dialect, template, sampling, preprocessing: how graphs are said, and how prompts and films are read.
        limits, reduction, fixed: the manifest's records; `fixed` is None outside the fixed mode.
        stored_weights: how a checkpoint's weights are quantized, and what is made of them; "" for one of floats.
        segments: where the decoder is cut.
        kv_scales: of KV caches in int8, before they are measured and behind it; None where caches are floats.
        graphs: every graph of the bundle, the segments' first, then the tower's.

    Raises:
        UnknownFamilyError, CheckpointError, BudgetError, ReducerError: before anything is written.
    """

    def __init__(self, checkpoint: Checkpoint, options: BuildOptions, codes: CodeStore | None = None) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.codes = codes
        # 1. whose checkpoint it is, and whether it may be read at all
        self.family: Family = family_of(checkpoint.config)
        checkpoint.check_readable()
        license_files(checkpoint.folder)  # refuses one that leads out of the folder before anything is written
        # 2. geometry, from configuration and headers
        self.tower: TowerPlan = self.family.plan_tower(checkpoint)
        config = decoders.decoder_config(checkpoint, self.family, options.num_decoder_layer)
        cached = options.kv_cache_dtype
        self.config: DecoderConfig = replace(config, deepstack=self.tower.deepstack, kv_cache_dtype=cached)
        self.embedding_key = decoders.embedding_key(checkpoint, self.family)
        self.dialect = _dialect(options.dialect, self.config.head_dim)
        if cached is not None:
            self.dialect = replace(self.dialect, opset=max(self.dialect.opset, KV_CACHE_OPSET))
        # 3. what is read of films, which decides how long an input may be
        self.sampling: FrameSampling = self.family.sampling(checkpoint).overridden(options.fps, options.max_frames)
        self.preprocessing = self._preprocessing()
        self._check_widths()
        self.tower_input = self._tower_input()
        longest_video = self.preprocessing.video_tokens(self.sampling.max_frames)
        self.limits = sizes.limits_of(checkpoint, options, longest_video)
        # 4. the reduction, which decides where the decoder is cut
        self.reduction = reduction_record(self.family, self.config, options)
        self.fixed = self._fixed()
        check_kv_cache(options, self.dialect)
        self.kv_scales = None if cached is None else KvScales(self.config, self.dtype)
        self._weights = WeightPlan(
            checkpoint,
            parse_weights(options.weights),
            parse_head(options.weights),
            self.dtype,
            self.dialect,
            LatestBlocks(),
            keeps_codes=options.weights in (None, AS_STORED),
            rounds=options.weights != AS_STORED,
            calibrated=options.calibrated_by is not None,
            store=codes,
        )
        self.segments = tuple(map(self._formatted, segments_of(self.reduction, self.config)))
        self.stored_weights = check_stored(checkpoint, options, self.dialect, *self._quantized_keys())
        check_quantized(self.segments, options)
        # 5. the prompts
        self.template = self.family.template(checkpoint)
        reading.check_placeholders(checkpoint, self.template, checkpoint.shape(self.embedding_key)[0])
        reading.generation(checkpoint)  # refuses what is malformed before anything is written
        # 6. the graphs: every parameter is in the checkpoint, with its shape, and nothing of the checkpoint is left
        self.graphs = self._graphs()
        for graph in self.graphs:
            for name, shape in graph.shapes.items():
                check_parameter(checkpoint, graph.sources[name], shape)
        check_all_read(checkpoint, self._taken(), self.tower.unused)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights in the bundle."""
        dtype: torch.dtype = getattr(torch, self.options.dtype)
        return dtype

    def graph(self, name: str) -> GraphPlan:
        """The graph of this name; there is one."""
        return next(graph for graph in self.graphs if graph.name == name)

    def model_record(self) -> ModelRecord:
        """The manifest's part on the LLM: its geometry, and the type of its weights."""
        names = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
        names += ("vocab_size", "rope_theta", "mrope_section", "mrope_interleaved", "importance_rows")  # type: ignore[assignment]
        facts = {name: getattr(self.config, name) for name in names}
        model_type = str(self.checkpoint.config.get("model_type"))
        return ModelRecord(self.family.name, model_type, dtype=self.options.dtype, **facts)

    @property
    def quantization(self) -> QuantizationRecord | None:
        """The manifest's part on weights in 4 or 8 bits; None where all are floats."""
        return self._weights.record(self.segments)

    @property
    def rounds_activations(self) -> bool:
        """Whether products with quantized weights round activations to 8 bits, in their kernels or in the graphs."""
        record = self.quantization
        return record is not None and (self.dialect.rounds_activations or any(form.rounds for form in record.formats))

    @cached_property
    def in_floats(self) -> BuildPlan | None:
        """The plan with floats for codes, of weights and of caches; None where this one has no codes."""
        if self.quantization is None and self.kv_scales is None:
            return None
        weights = None if self.checkpoint.quantization is None else DEQUANTIZED
        floats = replace(self.options, weights=weights, calibrated_by=None, kv_cache_dtype=None)
        return BuildPlan(self.checkpoint, floats)

    @cached_property
    def segment_records(self) -> tuple[SegmentRecord, ...]:
        """The manifest's part on each segment."""
        graphs = {(graph.folder, graph.role): graph for graph in self.graphs}
        is_fixed = self.fixed is not None
        records = []
        for plan in self.segments:
            folder = f"segments/{plan.name}"
            prefill = graphs[folder, "prefill" if is_fixed else "both"]
            record = SegmentRecord(
                name=plan.name,
                graph=prefill.name,
                attention_layers=plan.attention_layers,
                num_mlps=sum(block.kind == "mlp" for block in plan.blocks),
                scores=plan.scores,
                head=plan.head,
                weight_bytes=prefill.weight_bytes,
                buckets=None if is_fixed else self.buckets(),
                decode_graph=graphs[folder, "decode"].name if is_fixed else None,
                deepstack=plan.deepstack,
            )
            records.append(record)
        return tuple(records)

    @cached_property
    def vision_record(self) -> VisionRecord:
        """The manifest's part on the vision tower."""
        (graph,) = (graph for graph in self.graphs if graph.role == "vision")
        common = {field.name for field in fields(VisionRecord)} & {field.name for field in fields(TowerPlan)}
        facts: dict[str, Any] = {name: getattr(self.tower, name) for name in common}
        facts["kind"] = self.tower.settings.kind
        facts["input"] = self.tower_input
        return VisionRecord(graph.name, weight_bytes=graph.weight_bytes, **facts)

    def buckets(self) -> tuple[int, ...] | None:
        """Sizes of a prefill, see `sizes.buckets_of`; the fixed mode has none of them."""
        return sizes.buckets_of(self.options, self.dialect, self.limits.max_input_len, self.reduction)

    def prompt_texts(self) -> Iterator[object]:
        """What template and preprocessing put into prompts, among values that are no text."""
        parts: tuple[Any, ...] = (self.template, self.preprocessing, *self.template.turns.values())
        for part in parts:
            yield from (getattr(part, field.name) for field in fields(part))
        yield from self.template.pads

    def stored_types(self) -> set[str]:
        """Types, as safetensors names them, of the tensors that a bundle of all layers reads."""
        return {self.checkpoint.dtype(key) for key in self._taken()}

    def _taken(self) -> Iterator[str]:
        """Keys that a bundle of all layers reads, whatever --num-decoder-layer leaves out of this one."""
        layers = decoders.stored_depth(self.checkpoint, self.family)
        whole = self._formatted(whole_decoder(layers, deepstack=self.config.deepstack)[0])
        parameters = segment_module(replace(self.config, num_layers=layers), whole).named_parameters()
        sources = self.sources(whole)
        yield from (key for name, _ in parameters for key in sources[name].keys)
        yield from (key for name, _ in self.tower.module.named_parameters() for key in self.tower.sources[name].keys)
        yield from (self.embedding_key, *self.tower.extra_rows.values())

    def _check_widths(self) -> None:
        """Refuse rows that would not fit side by side: the embedding table's, the tower's and learned ones."""
        width = self.config.hidden_size
        given = self.tower.out_width
        if given != width:
            raise CheckpointError(
                f"the vision tower gives rows of {given}, hidden_size is {width}: config.json is another one's"
            )
        patch = self.preprocessing.patch_size
        frames = self.preprocessing.frames_per_patch()
        numbers = 3 * frames * patch**2
        if numbers != self.tower.patch_width:
            raise CheckpointError(
                f"patches of {frames} frame(s) and {patch} x {patch} pixels are {numbers} numbers, the vision tower "
                f"takes {self.tower.patch_width}: patch_size or temporal_patch_size is of another model"
            )
        ordered = self.preprocessing.block_side()
        merged = self.tower.settings.block_side()
        if merged not in (None, ordered):
            raise CheckpointError(
                f"{self.checkpoint.folder}: the processor has merge_size {ordered}, vision_config spatial_merge_size "
                f"{merged}: one of the two is of another model"
            )
        for key in self.tower.extra_rows.values():
            check_parameter(self.checkpoint, Source(key), (width,))

    def _preprocessing(self) -> Preprocessing:
        names = (
            "min_pixels", "max_pixels", "max_slice_nums", "max_tiles", "mm_spatial_pool_mode", "frame_label",
            "total_pixels", "resize_rounding",
        )  # fmt: skip
        chosen = {name: getattr(self.options, name) for name in names}
        return self.family.preprocessing(self.checkpoint).with_options(**chosen)

    def _tower_input(self) -> TowerInput:
        """Bytes where the family's pictures are bytes and its tower takes them; its graph then normalises them."""
        if self.options.tower_input == "float" or not self.preprocessing.byte_patches:
            return "float"
        tower = self.tower.module
        tower.levels = levels_of(self.preprocessing)
        if tower.takes_bytes:
            return "uint8"
        tower.levels = None  # floats are normalised before: its graph would do it once more
        return "float"

    def _fixed(self) -> FixedRecord | None:
        schedule = self.reduction.schedule
        if schedule is None:
            return None
        track = self.preprocessing.longest_track(self.sampling.max_frames)
        return sizes.fixed_record(self.options, schedule, self.limits.max_input_len, track, self.config.num_layers)

    def _graphs(self) -> tuple[GraphPlan, ...]:
        segments = {plan: self.sources(plan) for plan in self.segments}
        tower = tower_graph(self.tower, self.dtype)
        if self.fixed is None:
            return (*segment_graphs(self.config, segments, self.dtype), tower)
        assert self.reduction.schedule is not None  # a bundle of the fixed mode has both
        ((plan, sources),) = segments.items()  # and one segment
        schedule = self.reduction.schedule
        return (*fixed_graphs(self.config, plan, sources, self.dtype, schedule, self.fixed), tower)

    def sources(self, plan: SegmentPlan) -> dict[str, AnySource]:
        """Where the parameters of a segment are in the checkpoint."""
        found = self._weights.sources(plan, decoders.decoder_sources(self.checkpoint, self.family, plan))
        return found if self.kv_scales is None else found | dict(self.kv_scales.sources(plan.blocks))

    def _quantized_keys(self) -> tuple[set[str], set[str]]:
        """Keys of the decoder's quantized matrices, over all layers: see `WeightPlan.quantized_keys`."""
        layers = decoders.stored_depth(self.checkpoint, self.family)
        whole = whole_decoder(layers, deepstack=self.config.deepstack)[0]
        return self._weights.quantized_keys(whole, decoders.decoder_sources(self.checkpoint, self.family, whole))

    def _formatted(self, plan: SegmentPlan) -> SegmentPlan:
        """A segment with the formats of its weights."""
        return self._weights.formatted(plan, decoders.decoder_sources(self.checkpoint, self.family, plan))


def levels_of(preprocessing: Preprocessing) -> Levels:
    """(level * rescale - mean) / std, as one product and one sum."""
    scale = tuple(preprocessing.rescale / std for std in preprocessing.image_std)
    shift = tuple(-mean / std for mean, std in zip(preprocessing.image_mean, preprocessing.image_std, strict=True))
    return Levels(scale, shift)


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


def identity_of(checkpoint: Checkpoint) -> Mapping[str, object]:
    """What tells one checkpoint from another without reading its weights: its files' names, sizes and times."""
    files: set[Path] = checkpoint.tensor_files
    for folder in (checkpoint.folder, *checkpoint.parts.values()):  # a chat template decides what is built, too
        files |= {path for pattern in ("*.json", "*.jinja") for path in folder.glob(pattern)}
    stats = {path.relative_to(checkpoint.folder).as_posix(): path.stat() for path in sorted(files) if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def identities(films: Sequence[Path]) -> list[list[object]]:
    """The same for films: their names, sizes and times, in order."""
    return [[film.name, film.stat().st_size, film.stat().st_mtime_ns] for film in films]


def replan(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> BuildPlan:
    """The plan that a bundle was built by.

    Raises:
        BundleError: the manifest does not say how it was built.
        CheckpointError: the checkpoint is not the one that the bundle was built from.
    """
    try:
        options = from_json(BuildOptions, manifest.options)
    except RecordError as error:
        raise BundleError(f"{folder} does not say how it was built ({error}): rebuild it") from None
    plan = BuildPlan(checkpoint, replace(options, tower_input=manifest.vision.input))
    ours = asdict(manifest.model)
    theirs = asdict(plan.model_record())
    for name, value in ours.items():
        if theirs[name] != value:
            raise CheckpointError(
                f"{checkpoint.folder} has {name} {theirs[name]}, the bundle was built from one with {value}: "
                "give the checkpoint that it was built from"
            )
    if plan.kv_scales is not None and manifest.kv_cache is not None:  # not measured again: those that it computes with
        plan.kv_scales.record = manifest.kv_cache
        for segment, record in zip(plan.segments, plan.segment_records, strict=True):
            plan.kv_scales.read(folder, plan.graph(record.prefill), segment.blocks)
    return plan
