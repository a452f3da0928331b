"""The main path of the toolchain: a checkpoint to a checked bundle.

    checkpoint -> plan -> [weights, graph] for each segment, vision, embedding, tokenizer -> manifest -> check -> rename

Each part is written, hashed and journaled before the next, one tensor in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

import framefusion
from framefusion.errors import CheckFailedError, CheckpointError, InterruptedBuildError
from framefusion.export import check, signatures, staging
from framefusion.export.checkpoint import Checkpoint
from framefusion.export.families import reading
from framefusion.export.options import BuildOptions
from framefusion.export.plan import (
    DECODE_GRAPH,
    GRAPH,
    VISION_GRAPH,
    WEIGHTS,
    BuildPlan,
    identity_of,
)
from framefusion.export.segments import SegmentPlan
from framefusion.export.staging import Staging
from framefusion.export.trace import save_graph
from framefusion.export.weights import (
    STORED,
    OnBytes,
    Placement,
    Source,
    ignore,
    parameter_bytes,
    write_parameters,
    write_rows,
)
from framefusion.runtime.bundle import MANIFEST, SCHEMA_VERSION, EmbeddingRecord, Manifest, write_manifest
from framefusion.runtime.records import to_json
from framefusion.runtime.tokenizer import Tokenizer

EMBEDDING_FILE, TOKENIZER_FILE = "embedding.bin", "tokenizer.json"
CONVERTED_TOKENIZER = 1 << 22  # bytes set aside for a tokenizer that is made from vocabulary files
TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")

Progress = Callable[[str, int, int], None]
"""Told the part that is written, bytes done so far, and bytes of all parts; `check` is the last part."""


@dataclass(frozen=True)
class Built:
    """A published bundle."""

    folder: Path
    manifest: Manifest


class Builder:
    """Carries out one plan; tells `on_bytes` of what it writes."""

    def __init__(self, plan: BuildPlan, on_bytes: OnBytes = ignore) -> None:
        self.plan, self._on_bytes = plan, on_bytes
        self._graphs: dict[Any, ir.Model] = {}  # traced once for each structure

    def sizes(self) -> dict[str, int]:
        """Bytes of each part, graphs left out."""
        plan = self.plan
        parts = {f"segments/{segment.name}": plan.segment_record(segment).weight_bytes for segment in plan.segments}
        rows, width = plan.checkpoint.shape(self._embedding_key())
        parts["vision"] = parameter_bytes(plan.tower, plan.dtype)
        parts["embedding"] = rows * width * (4 if self._embedding_dtype() == "float32" else 2)
        source = plan.checkpoint.folder / TOKENIZER_FILE
        parts["tokenizer"] = source.stat().st_size if source.is_file() else CONVERTED_TOKENIZER
        return parts

    def producers(self) -> dict[str, Callable[[Path], list[str]]]:
        """What writes each part; each returns the names of its files. What may be refused comes first."""
        first = {"tokenizer": self._write_tokenizer, "embedding": self._write_embedding, "vision": self._write_vision}
        return first | {f"segments/{s.name}": self._segment_producer(s) for s in self.plan.segments}

    def manifest(self, staged: Staging) -> Manifest:
        """The manifest of the parts staged."""
        plan = self.plan
        rows, width = plan.checkpoint.shape(self._embedding_key())
        return Manifest(
            schema_version=SCHEMA_VERSION,
            tools={"framefusion-aot": framefusion.__version__} | {tool: version(tool) for tool in TOOLS},
            model=plan.model_record(),
            limits=plan.limits,
            dialect=plan.dialect.name,
            reduction=plan.reduction,
            segments=tuple(plan.segment_record(segment) for segment in plan.segments),
            vision=plan.vision_record(),
            embedding=EmbeddingRecord(EMBEDDING_FILE, self._embedding_dtype(), rows, width),  # type: ignore[arg-type]
            prompt=plan.family.prompt_template(plan.checkpoint),
            preprocessing=plan.preprocessing,
            sampling=plan.sampling,
            generation=reading.generation(plan.checkpoint),
            files=staged.files,
            fixed=plan.fixed,
            options=to_json(plan.options),
        )

    def _segment_producer(self, segment: SegmentPlan) -> Callable[[Path], list[str]]:
        return lambda folder: self._write_segment(folder, segment)

    def _write_segment(self, folder: Path, segment: SegmentPlan) -> list[str]:
        plan, target = self.plan, folder / "segments" / segment.name
        target.mkdir(parents=True, exist_ok=True)
        module = signatures.segment_module(plan.config, segment)
        places = self._write_weights(module, plan.sources(segment), target / WEIGHTS)
        graph = self._traced(segment.structure, lambda: signatures.trace_segment(plan.config, segment, plan.dialect))
        names = [WEIGHTS, GRAPH]
        if plan.fixed is not None:  # the reductions are in the prefill graph; decoding runs the plain one
            save_graph(graph, target / DECODE_GRAPH, WEIGHTS, places)
            graph = signatures.trace_fixed_prefill(plan.fixed_module(), plan.dialect)
            names.append(DECODE_GRAPH)
        save_graph(graph, target / GRAPH, WEIGHTS, places)
        return [f"segments/{segment.name}/{name}" for name in names]

    def _write_weights(self, module: nn.Module, sources: Mapping[str, Source], path: Path) -> dict[str, Placement]:
        return write_parameters(module, self.plan.checkpoint, sources, self.plan.dtype, path, self._on_bytes)

    def _traced(self, structure: Any, trace: Callable[[], ir.Model]) -> ir.Model:
        if structure not in self._graphs:
            self._graphs[structure] = trace()
        return self._graphs[structure]

    def _write_vision(self, folder: Path) -> list[str]:
        plan, path = self.plan, folder / VISION_GRAPH
        path.parent.mkdir(exist_ok=True)
        places = self._write_weights(plan.tower, plan.tower_sources, path.parent / WEIGHTS)
        save_graph(signatures.trace_tower(plan.tower, plan.dialect), path, WEIGHTS, places)  # type: ignore[arg-type]
        return [VISION_GRAPH, f"{Path(VISION_GRAPH).parent}/{WEIGHTS}"]

    def _write_embedding(self, folder: Path) -> list[str]:
        write_rows(self.plan.checkpoint, self._embedding_key(), folder / EMBEDDING_FILE, self._on_bytes)
        return [EMBEDDING_FILE]

    def _write_tokenizer(self, folder: Path) -> list[str]:
        source = self.plan.checkpoint.folder
        if (source / TOKENIZER_FILE).is_file():
            shutil.copyfile(source / TOKENIZER_FILE, folder / TOKENIZER_FILE)
        else:
            _convert_tokenizer(source, folder / TOKENIZER_FILE)
        tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE)
        self.plan.family.prompt_template(self.plan.checkpoint).check(tokenizer)
        return [TOKENIZER_FILE]

    def _embedding_key(self) -> str:
        return reading.llm_prefix(self.plan.checkpoint, self.plan.family) + reading.EMBEDDING

    def _embedding_dtype(self) -> str:
        stored = self.plan.checkpoint.dtype(self._embedding_key())
        if stored not in STORED:
            raise CheckpointError(f"the embedding table is stored as {stored}; known are {', '.join(STORED)}")
        return STORED[stored]


class Meter:
    """What was written so far, passed on as `Progress`."""

    def __init__(self, progress: Progress | None, sizes: Mapping[str, int]) -> None:
        self._progress, self._sizes, self._total = progress, sizes, sum(sizes.values())
        self._part, self._before, self._written = "", 0, 0

    def begin(self, part: str) -> None:
        """All of the part before it is there, written now or taken over."""
        self._before += self._sizes.get(self._part, 0)
        self._part, self._written = part, 0
        self.add(0)

    def add(self, size: int) -> None:
        """Some more of the part is written."""
        self._written += size
        if self._progress is not None:
            self._progress(self._part, self._before + self._written, self._total)


def build(
    checkpoint: Checkpoint,
    output: Path,
    options: BuildOptions,
    *,
    force: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> Built:
    """Build a bundle, check it against the eager model, and give it its name.

    Args:
        checkpoint: what to read.
        output: folder of the bundle; must not exist unless `force`.
        options: see `BuildOptions`.
        force: replace an output that exists.
        verify: run the check; without it the manifest says so.
        progress: told of each part.

    Raises:
        CheckFailedError: the bundle does not reproduce the eager model; its parts stay in NAME.partial.
        FrameFusionError: see `framefusion.errors`; nothing half-written has the output's name.
    """
    try:
        plan = BuildPlan(checkpoint, options)
        key = staging.identity(options, identity_of(checkpoint), framefusion.__version__, SCHEMA_VERSION)
        with Staging(output, key, force=force) as staged:
            manifest = _write_parts(plan, staged, progress)
            if verify:
                manifest = replace(manifest, check=_check(staged.folder, plan))
                with staged.writing(MANIFEST):
                    write_manifest(staged.folder, manifest)
            staged.publish()
    except KeyboardInterrupt:
        raise InterruptedBuildError("interrupted before anything was written: run the same command again") from None
    return Built(output, manifest)


def _write_parts(plan: BuildPlan, staged: Staging, progress: Progress | None) -> Manifest:
    """Write what is not complete yet, then the manifest."""
    sizes = Builder(plan).sizes()
    staged.check_space(sizes)
    meter = Meter(progress, sizes)
    builder = Builder(plan, meter.add)
    for part, produce in builder.producers().items():
        meter.begin(part)
        staged.write(part, produce)
    meter.begin("check")
    manifest = builder.manifest(staged)
    with staged.writing(MANIFEST):
        write_manifest(staged.folder, manifest)
    return manifest


def _check(folder: Path, plan: BuildPlan) -> Mapping[str, Any]:
    report = check.check_bundle(folder, plan)
    if not report["passed"]:
        failed = ", ".join(f"{line['what']}: {line['value']:.3g} > {line['limit']:.3g}" for line in report["failures"])
        raise CheckFailedError(f"{folder} does not reproduce the eager model ({failed}); it was not published")
    return report


def _convert_tokenizer(source: Path, target: Path) -> None:
    """Make tokenizer.json of a checkpoint that has only vocabulary files."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source).backend_tokenizer.save(str(target))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{source} has no {TOKENIZER_FILE} and none can be made of it ({error})") from None
