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

import framefusion
from framefusion.errors import CheckFailedError, CheckpointError
from framefusion.export import check, signatures, staging
from framefusion.export.checkpoint import Checkpoint
from framefusion.export.families import reading
from framefusion.export.plan import (
    DECODE_GRAPH,
    GRAPH,
    VISION_GRAPH,
    WEIGHTS,
    BuildOptions,
    BuildPlan,
    identity_of,
)
from framefusion.export.segments import SegmentPlan
from framefusion.export.staging import Staging
from framefusion.export.trace import save_graph
from framefusion.export.weights import parameter_bytes, write_parameters, write_rows
from framefusion.runtime.bundle import SCHEMA_VERSION, EmbeddingRecord, Manifest, write_manifest
from framefusion.runtime.tokenizer import Tokenizer

EMBEDDING_FILE, TOKENIZER_FILE = "embedding.bin", "tokenizer.json"
TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Progress = Callable[[str, int, int], None]
"""Told the part that begins, bytes done before it, and bytes of all parts."""


@dataclass(frozen=True)
class Built:
    """A published bundle."""

    folder: Path
    manifest: Manifest


class Builder:
    """Carries out one plan."""

    def __init__(self, plan: BuildPlan) -> None:
        self.plan = plan
        self._graphs: dict[Any, ir.Model] = {}  # traced once for each structure

    def sizes(self) -> dict[str, int]:
        """Bytes of each part, graphs left out."""
        plan = self.plan
        parts = {f"segments/{segment.name}": plan.segment_record(segment).weight_bytes for segment in plan.segments}
        rows, width = plan.checkpoint.shape(self._embedding_key())
        parts["vision"] = parameter_bytes(plan.tower, plan.dtype)
        parts["embedding"] = rows * width * (4 if self._embedding_dtype() == "float32" else 2)
        parts["tokenizer"] = 1 << 22
        return parts

    def producers(self) -> dict[str, Callable[[Path], list[str]]]:
        """What writes each part; each returns the names of its files."""
        producers = {f"segments/{s.name}": self._segment_producer(s) for s in self.plan.segments}
        others = {"vision": self._write_vision, "embedding": self._write_embedding, "tokenizer": self._write_tokenizer}
        return producers | others

    def manifest(self, staged: Staging) -> Manifest:
        """The manifest of the parts staged."""
        plan = self.plan
        tokenizer = Tokenizer.from_file(staged.folder / TOKENIZER_FILE)
        prompt = plan.family.prompt_template(plan.checkpoint)
        prompt.check(tokenizer)
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
            prompt=prompt,
            preprocessing=plan.preprocessing,
            sampling=plan.sampling,
            generation=reading.generation(plan.checkpoint),
            files=staged.files,
            fixed=plan.fixed,
        )

    def _segment_producer(self, segment: SegmentPlan) -> Callable[[Path], list[str]]:
        return lambda folder: self._write_segment(folder, segment)

    def _write_segment(self, folder: Path, segment: SegmentPlan) -> list[str]:
        plan, target = self.plan, folder / "segments" / segment.name
        target.mkdir(parents=True, exist_ok=True)
        module = signatures.segment_module(plan.config, segment)
        places = write_parameters(module, plan.checkpoint, plan.sources(segment), plan.dtype, target / WEIGHTS)
        graph = self._traced(segment.structure, lambda: signatures.trace_segment(plan.config, segment, plan.dialect))
        names = [WEIGHTS, GRAPH]
        if plan.fixed is not None:  # the reductions are in the prefill graph; decoding runs the plain one
            save_graph(graph, target / DECODE_GRAPH, WEIGHTS, places)
            graph = signatures.trace_fixed_prefill(plan.fixed_module(), plan.dialect)
            names.append(DECODE_GRAPH)
        save_graph(graph, target / GRAPH, WEIGHTS, places)
        return [f"segments/{segment.name}/{name}" for name in names]

    def _traced(self, structure: Any, trace: Callable[[], ir.Model]) -> ir.Model:
        if structure not in self._graphs:
            self._graphs[structure] = trace()
        return self._graphs[structure]

    def _write_vision(self, folder: Path) -> list[str]:
        plan, path = self.plan, folder / VISION_GRAPH
        path.parent.mkdir(exist_ok=True)
        places = write_parameters(plan.tower, plan.checkpoint, plan.tower_sources, plan.dtype, path.parent / WEIGHTS)
        save_graph(signatures.trace_tower(plan.tower, plan.dialect), path, WEIGHTS, places)  # type: ignore[arg-type]
        return [VISION_GRAPH, f"{Path(VISION_GRAPH).parent}/{WEIGHTS}"]

    def _write_embedding(self, folder: Path) -> list[str]:
        write_rows(self.plan.checkpoint, self._embedding_key(), folder / EMBEDDING_FILE)
        return [EMBEDDING_FILE]

    def _write_tokenizer(self, folder: Path) -> list[str]:
        source = self.plan.checkpoint.folder
        if (source / TOKENIZER_FILE).is_file():
            shutil.copyfile(source / TOKENIZER_FILE, folder / TOKENIZER_FILE)
        else:
            _convert_tokenizer(source, folder / TOKENIZER_FILE)
        return [TOKENIZER_FILE]

    def _embedding_key(self) -> str:
        return reading.llm_prefix(self.plan.checkpoint, self.plan.family) + reading.EMBEDDING

    def _embedding_dtype(self) -> str:
        stored = self.plan.checkpoint.dtype(self._embedding_key())
        if stored not in _STORED:
            raise CheckpointError(f"the embedding table is stored as {stored}; known are {', '.join(_STORED)}")
        return _STORED[stored]


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
        CheckFailedError: the bundle does not reproduce the eager model; it stays in NAME.partial.
        FrameFusionError: see `framefusion.errors`; nothing half-written has the output's name.
    """
    plan = BuildPlan(checkpoint, options)
    builder = Builder(plan)
    key = staging.identity(options, identity_of(checkpoint), framefusion.__version__, SCHEMA_VERSION)
    staged = Staging(output, key, force=force)
    sizes, done = builder.sizes(), 0
    staged.check_space(sizes)
    for part, produce in builder.producers().items():
        if progress is not None:
            progress(part, done, sum(sizes.values()))
        staged.write(part, produce)
        done += sizes[part]
    manifest = builder.manifest(staged)
    write_manifest(staged.folder, manifest)
    if verify:
        if progress is not None:
            progress("check", done, sum(sizes.values()))
        manifest = replace(manifest, check=_check(staged.folder, plan))
        write_manifest(staged.folder, manifest)
    staged.publish()
    return Built(output, manifest)


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
