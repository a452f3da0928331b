"""What compiles engines of the backend that exists for the tests alone: a graph and its weights in one ONNX file."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import onnx

from framefusion.export.engines.builder import EngineFacts, EngineSpec, Share
from framefusion.export.options import EngineOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.engine_record import TensorRecord


class SingleFileBuilder:
    """See `EngineBuilder`."""

    suffix = ".onnx"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def check(self, options: EngineOptions) -> None:
        """Every machine will do."""

    def specs(self, bundle: Bundle, options: EngineOptions, plan: BuildPlan | None) -> dict[str, EngineSpec]:
        """One for each graph."""
        target = (f"cpu {platform.machine()}",)
        dtype = bundle.manifest.model.dtype
        return {graph: EngineSpec(bundle.folder / graph, self.kind, target, dtype) for graph in bundle.graphs}

    def estimate_memory(self, spec: EngineSpec) -> int:
        """Twice the weights."""
        return 2 * (spec.graph.parent / "weights.bin").stat().st_size

    def build(self, spec: EngineSpec, target: Path, timing_cache: bytes | None, progress: Share) -> EngineFacts:
        """Write the graph with its weights inside."""
        start = time.monotonic()
        progress(0.0)
        model = onnx.load(spec.graph)
        onnx.save(model, target)
        progress(1.0)
        inputs = tuple(TensorRecord(value.name, "input", spec.dtype, ()) for value in model.graph.input)
        kinds = {
            node.op_type: sum(other.op_type == node.op_type for other in model.graph.node) for node in model.graph.node
        }
        return EngineFacts(target.stat().st_size, None, spec.targets, inputs, kinds, time.monotonic() - start)
