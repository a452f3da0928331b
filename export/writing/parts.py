"""The parts of a bundle, each written by itself: segments, vision tower, embedding table, tokenizer; and the manifest.

Carries out a plan with one tensor in memory at a time. Knows nothing of staging, resuming and checks (build.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

import framefusion
from framefusion.console.progress import Meter
from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.origin.source import source_record
from framefusion.export.checkpoints.tensors.hashed_file import HashedFile
from framefusion.export.checkpoints.tensors.weights import (
    STORED,
    AnySource,
    Placement,
    parameter_bytes,
    write_parameters,
    write_rows,
)
from framefusion.export.checkpoints.text.tokenizer_file import TOKENIZER, added_tokens, write_tokenizer
from framefusion.export.families.reading import configs as reading
from framefusion.export.graphs.segments import SegmentPlan
from framefusion.export.graphs.tracing import signatures
from framefusion.export.graphs.tracing.trace import save_graph
from framefusion.export.plan.build_plan import DECODE_GRAPH, GRAPH, VISION_GRAPH, WEIGHTS, BuildPlan
from framefusion.export.writing.staging import Produced
from framefusion.runtime.bundle import file_record
from framefusion.runtime.format.manifest import FLOAT_BYTES, SCHEMA_VERSION, EmbeddingRecord, FileRecord, Manifest
from framefusion.storage.records import to_json

EMBEDDING_FILE = "embedding.bin"
TOKENIZER_FILE = TOKENIZER
CONVERTED_TOKENIZER = 1 << 22  # bytes set aside for a tokenizer that is made from vocabulary files
TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")


class Builder:
    """Carries out one plan; tells `meter` of what it writes."""

    def __init__(self, plan: BuildPlan, meter: Meter | None = None) -> None:
        self.plan = plan
        self._meter = meter or Meter()
        self._graphs: dict[Any, ir.Model] = {}  # traced once for each structure

    def sizes(self) -> dict[str, int]:
        """Bytes of each part, graphs left out."""
        plan = self.plan
        parts = {f"segments/{segment.name}": plan.segment_record(segment).weight_bytes for segment in plan.segments}
        rows, width = plan.checkpoint.shape(plan.embedding_key)
        parts["vision"] = parameter_bytes(plan.tower.module, plan.dtype)
        parts["embedding"] = (rows + len(plan.tower.extra_rows)) * width * FLOAT_BYTES[self._embedding_dtype()]
        source = plan.checkpoint.find(TOKENIZER_FILE)
        parts["tokenizer"] = CONVERTED_TOKENIZER if source is None else source.stat().st_size
        return parts

    def producers(self) -> dict[str, Callable[[Path], Produced]]:
        """What writes each part; each returns the names of its files. What may be refused comes first."""
        first: dict[str, Callable[[Path], Produced]] = {
            "tokenizer": self._write_tokenizer,
            "embedding": self._write_embedding,
            "vision": self._write_vision,
        }
        return first | {f"segments/{s.name}": self._segment_producer(s) for s in self.plan.segments}

    def manifest(self, files: Mapping[str, FileRecord], tokenizer: Path | None) -> Manifest:
        """The manifest of the parts written; `tokenizer` is the folder of tokenizer.json, None before there is one."""
        plan = self.plan
        known = {} if tokenizer is None else added_tokens(plan.checkpoint)
        terminators = [known[token] for token in plan.family.terminators if token in known]
        rows, width = plan.checkpoint.shape(plan.embedding_key)
        extra = tuple(plan.tower.extra_rows)
        return Manifest(
            schema_version=SCHEMA_VERSION,
            tools={"framefusion-aot": framefusion.__version__} | {tool: version(tool) for tool in TOOLS},
            model=plan.model_record(),
            limits=plan.limits,
            dialect=plan.dialect.name,
            reduction=plan.reduction,
            segments=tuple(plan.segment_record(segment) for segment in plan.segments),
            vision=plan.vision_record(),
            embedding=EmbeddingRecord(EMBEDDING_FILE, self._embedding_dtype(), rows, width, extra),  # type: ignore[arg-type]
            prompt=plan.template,
            preprocessing=plan.preprocessing,
            sampling=plan.sampling,
            generation=reading.generation(plan.checkpoint, terminators),
            files=files,
            fixed=plan.fixed,
            options=to_json(plan.options),
            source=source_record(plan.checkpoint.origin),
        )

    def _segment_producer(self, segment: SegmentPlan) -> Callable[[Path], Produced]:
        return lambda folder: self._write_segment(folder, segment)

    def _write_segment(self, folder: Path, segment: SegmentPlan) -> dict[str, FileRecord]:
        plan = self.plan
        target = folder / "segments" / segment.name
        target.mkdir(parents=True, exist_ok=True)
        module = signatures.segment_module(plan.config, segment)
        places, weights = self._write_weights(module, plan.sources(segment), target / WEIGHTS)
        graph = self._traced(
            segment.structure, lambda: signatures.trace_segment(plan.config, segment, plan.dialect, plan.dtype)
        )
        names = [GRAPH]
        if plan.fixed is not None:  # the reductions are in the prefill graph; decoding runs the plain one
            save_graph(graph, target / DECODE_GRAPH, WEIGHTS, places)
            self._meter.doing("tracing the prefill")
            graph = signatures.trace_fixed_prefill(plan.fixed_module(), plan.dialect, plan.dtype)
            names.append(DECODE_GRAPH)
        save_graph(graph, target / GRAPH, WEIGHTS, places)
        files = {WEIGHTS: weights} | {name: file_record(target / name) for name in names}
        return {f"segments/{segment.name}/{name}": record for name, record in files.items()}

    def _write_weights(
        self, module: nn.Module, sources: Mapping[str, AnySource], path: Path
    ) -> tuple[dict[str, Placement], FileRecord]:
        plan = self.plan
        self._meter.doing(path.name)
        with HashedFile(path) as file:
            places = write_parameters(module, plan.checkpoint, sources, plan.dtype, file, self._meter.add)
        self._meter.doing("tracing")
        return places, file.record

    def _traced(self, structure: Any, trace: Callable[[], ir.Model]) -> ir.Model:
        if structure not in self._graphs:
            self._graphs[structure] = trace()
        return self._graphs[structure]

    def _write_vision(self, folder: Path) -> dict[str, FileRecord]:
        plan = self.plan
        path = folder / VISION_GRAPH
        path.parent.mkdir(exist_ok=True)
        places, weights = self._write_weights(plan.tower.module, plan.tower.sources, path.parent / WEIGHTS)
        save_graph(signatures.trace_tower(plan.tower.module, plan.dialect, plan.dtype), path, WEIGHTS, places)
        return {VISION_GRAPH: file_record(path), f"{Path(VISION_GRAPH).parent}/{WEIGHTS}": weights}

    def _write_embedding(self, folder: Path) -> dict[str, FileRecord]:
        plan = self.plan
        keys = (plan.embedding_key, *plan.tower.extra_rows.values())
        with HashedFile(folder / EMBEDDING_FILE) as file:
            write_rows(plan.checkpoint, keys, file, self._meter.add)
        return {EMBEDDING_FILE: file.record}

    def _write_tokenizer(self, folder: Path) -> list[str]:
        checkpoint = self.plan.checkpoint
        reading.check_tokens(checkpoint, self.plan.family.terminators)
        reading.check_pads(checkpoint, self.plan.template)
        reading.check_rows(checkpoint, self.plan.prompt_texts(), checkpoint.shape(self.plan.embedding_key)[0])
        write_tokenizer(checkpoint, folder / TOKENIZER_FILE)
        self._meter.add((folder / TOKENIZER_FILE).stat().st_size)
        return [TOKENIZER_FILE]

    def _embedding_dtype(self) -> str:
        stored = self.plan.checkpoint.dtype(self.plan.embedding_key)
        if stored not in STORED:
            raise CheckpointError(f"the embedding table is stored as {stored}; known are {', '.join(STORED)}")
        return STORED[stored]
