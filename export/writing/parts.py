"""The parts of a bundle, each written by itself: segments, vision tower, embedding table, tokenizer; and the manifest.

Carries out a plan with one tensor in memory at a time. Knows nothing of staging, resuming and checks (build.py).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

import framefusion
from framefusion.console.progress import Meter
from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.origin.source import source_record
from framefusion.export.checkpoints.tensors.hashed_file import HashedFile
from framefusion.export.checkpoints.tensors.weights import (
    STORED,
    Placement,
    write_parameters,
    write_rows,
)
from framefusion.export.checkpoints.text.tokenizer_file import TOKENIZER, added_tokens, write_tokenizer
from framefusion.export.families.reading import configs as reading
from framefusion.export.graphs.graph_plan import GraphPlan
from framefusion.export.graphs.tracing.trace import save_graph, trace_graph
from framefusion.export.plan.build_plan import WEIGHTS, BuildPlan
from framefusion.export.writing.staging import Produced
from framefusion.runtime.bundle import file_record
from framefusion.runtime.format.manifest import FLOAT_BYTES, SCHEMA_VERSION, EmbeddingRecord, FileRecord, Manifest
from framefusion.storage.records import to_json

EMBEDDING_FILE = "embedding.bin"
TOKENIZER_FILE = TOKENIZER
CONVERTED_TOKENIZER = 1 << 22  # bytes set aside for a tokenizer that is made from vocabulary files
TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")


class Builder:
    """Carries out one plan; `meter` counts what it writes."""

    def __init__(self, plan: BuildPlan, meter: Meter | None = None) -> None:
        self.plan = plan
        self._meter = meter or Meter()
        self._traced: dict[Hashable, ir.Model] = {}  # by structure

    def sizes(self) -> dict[str, int]:
        """Part -> bytes of its weights, rows or vocabulary; graphs are left out, some hundred kilobytes each.

        Raises:
            CheckpointError: the embedding table is stored in a type that no bundle has.
        """
        plan = self.plan
        parts = {graph.folder: graph.weight_bytes for graph in plan.graphs}
        rows, width = plan.checkpoint.shape(plan.embedding_key)
        parts["embedding"] = (rows + len(plan.tower.extra_rows)) * width * FLOAT_BYTES[self._embedding_dtype()]
        source = plan.checkpoint.find(TOKENIZER_FILE)
        parts["tokenizer"] = CONVERTED_TOKENIZER if source is None else source.stat().st_size
        return parts

    def producers(self) -> dict[str, Callable[[Path], Produced]]:
        """Part -> what writes it to a folder and returns its files; what may be refused comes first."""
        first: dict[str, Callable[[Path], Produced]] = {
            "tokenizer": self._write_tokenizer,
            "embedding": self._write_embedding,
        }
        tower_first = sorted(self.plan.graphs, key=lambda graph: graph.role != "vision")
        return first | {graph.folder: partial(self._write_graphs, graph.folder) for graph in tower_first}

    def manifest(self, files: Mapping[str, FileRecord], tokenizer: Path | None) -> Manifest:
        """The manifest of the parts written.

        Args:
            files: all of them, by their paths in the bundle.
            tokenizer: the folder of tokenizer.json; None before there is one, and so no terminator is known by its id.
        """
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
            segments=plan.segment_records,
            vision=plan.vision_record,
            embedding=EmbeddingRecord(EMBEDDING_FILE, self._embedding_dtype(), rows, width, extra),  # type: ignore[arg-type]
            prompt=plan.template,
            preprocessing=plan.preprocessing,
            sampling=plan.sampling,
            generation=reading.generation(plan.checkpoint, terminators),
            files=files,
            fixed=plan.fixed,
            options=to_json(plan.options),
            source=source_record(plan.checkpoint.origin, plan.stored_weights),
            quantization=plan.quantization,
            kv_cache=None if plan.kv_scales is None else plan.kv_scales.record,
        )

    def _write_graphs(self, part: str, folder: Path) -> dict[str, FileRecord]:
        """Write the graphs of one folder of the bundle, and the file of weights that they share."""
        graphs = [graph for graph in self.plan.graphs if graph.folder == part]
        target = folder / part
        target.mkdir(parents=True, exist_ok=True)
        # 1. the weights, a tensor at a time, which is nearly all of the work
        places, weights = self._write_weights(graphs[0], target / WEIGHTS)
        files = {f"{part}/{WEIGHTS}": weights}
        # 2. the graphs, whose initializers name offsets in that file
        for graph in graphs:
            self._meter.doing("tracing the prefill" if graph.role == "prefill" else "tracing")
            save_graph(self._model(graph), folder / graph.name, WEIGHTS, places)
            files[graph.name] = file_record(folder / graph.name)
        return files

    def _write_weights(self, graph: GraphPlan, path: Path) -> tuple[dict[str, Placement], FileRecord]:
        plan = self.plan
        self._meter.doing(path.name)
        with HashedFile(path) as file:
            places = write_parameters(graph.module(), plan.checkpoint, graph.sources, plan.dtype, file, self._meter.add)
        return places, file.record

    def _model(self, graph: GraphPlan) -> ir.Model:
        """The traced graph; segments of one structure share it, and `save_graph` points it to their weights."""
        if graph.structure not in self._traced:
            self._traced[graph.structure] = trace_graph(graph, self.plan.dialect)
        return self._traced[graph.structure]

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
