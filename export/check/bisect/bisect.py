"""Where do two ways of running a bundle differ? `ff-export check --bisect`.

    eager torch in fp32, its calls recorded (boundaries.py)
    -> ONNX Runtime on the bundle's graphs, and each kind of engine that the bundle holds and this machine runs:
       every graph with the recorded inputs, its outputs compared
    -> in the first graph that is off in ONNX Runtime, a search over its values (nodes.py)
    -> a table, sentences and plain values

An engine cannot be looked into: where it is off and ONNX Runtime is not, the engine itself is the place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from framefusion.console import messages as console
from framefusion.errors import BackendError, FrameFusionError
from framefusion.export.check.bisect.boundaries import Boundary, RecordedCall, compare, limit_of, record, segment_of
from framefusion.export.check.bisect.nodes import Suspect, first_difference
from framefusion.export.check.verify import memory_of_check
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.pipeline import eager_loaders
from framefusion.export.machine import available_memory
from framefusion.export.plan.build_plan import BuildPlan, replan
from framefusion.runtime.backends.base import Backend
from framefusion.runtime.backends.choice import Choice, options
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.machine.machine import Machine

ONNXRUNTIME = OnnxRuntimeBackend.name


@dataclass(frozen=True)
class Divergence:
    """The first graph in which a way of running is off, and where inside, if that can be looked into.

    Attributes:
        boundary: the output that is off.
        place: "segment rest, layer 5 mlp", "segment rest" or "vision tower".
        suspect: the node; None in an engine, or where no value inside is off.
    """

    boundary: Boundary
    place: str
    suspect: Suspect | None

    def describe(self) -> str:
        """A paragraph for a terminal: graph, output and error, then the node and what is wrong with it."""
        row = self.boundary
        suspect = self.suspect
        text = (
            f"{row.way}: {row.graph} is the first graph that is off, {row.output} of the {row.kind} by {row.error:.3g} "
            f"(limit {row.limit:.3g}), with inputs of eager torch"
        )
        if suspect is None:
            inside = (
                "no value inside is off when it is looked at, so an optimisation of the whole graph is"
                if row.way == ONNXRUNTIME
                else "an engine cannot be looked into: compile it again, and compare with another backend"
            )
            return f"{text}; {inside}."
        many = "s" if len(suspect.nodes) > 1 else ""
        why = f"; {'; '.join(suspect.causes)}" if suspect.causes else ""
        return (
            f"{text}. It begins in {self.place}: node{many} {', '.join(suspect.nodes)}, {suspect.value} off by "
            f"{suspect.error:.3g}, what goes in by at most {suspect.inputs:.3g}{why}."
        )


def bisect_bundle(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Compare all ways of running a bundle with eager torch, and look for the place where one begins to differ.

    Args:
        folder: the bundle.
        checkpoint: what it was built from.

    Returns:
        passed; ways: what was run; notes: what was not, and why; boundaries: every output compared; found: a
        divergence for each way that has one; words: a paragraph for each of them. Plain values, as JSON has them.

    Raises:
        BundleError, CheckpointError: see `replan`.
        BackendError: nothing can run the bundle here, or the memory does not hold the eager model.
    """
    # 1. what the bundle was built by, and whether the eager model fits into memory
    bundle = Bundle(folder)
    plan = replan(folder, bundle.manifest, checkpoint)
    needed = memory_of_check(plan)
    free = available_memory()
    if needed > free:
        raise BackendError(
            f"--bisect runs the eager model in fp32, which needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
            "bisect a bundle of the first layers, built with --num-decoder-layer"
        )
    # 2. who can run the bundle here
    backends, notes = ways(bundle)
    if not backends:
        raise BackendError(f"nothing can run {bundle.folder} here: {'; '.join(notes)}")
    traced_by = bundle.manifest.tools.get("torch")
    here = torch.__version__
    if traced_by != here:
        notes.append(f"the graphs were traced by torch {traced_by} and this is {here}: names of nodes may differ")
    # 3. every call of a graph in eager torch, then the same inputs in each of them; the first that is off is searched
    calls = record(bundle, plan, max(backend.decode_width for backend in backends))
    rows = list[Boundary]()
    found = list[Divergence]()
    for backend in backends:
        ours = [(call, row) for call in calls for row in compare(call, backend, bundle.manifest)]
        rows += [row for _, row in ours]
        off = next(((call, row) for call, row in ours if not row.agrees), None)
        if off is not None:
            found.append(_explained(bundle, plan, backend, *off))
    # 4. the report
    names = [backend.name for backend in backends]
    sentences = [divergence.describe() for divergence in found]
    return {
        "passed": not found,
        "ways": names,
        "notes": notes,
        "boundaries": [_plain(asdict(row)) for row in rows],
        "found": [_plain(asdict(divergence) | {"words": divergence.describe()}) for divergence in found],
        "words": sentences or [f"{' and '.join(names)}: every graph agrees with eager torch"],
    }


def ways(bundle: Bundle) -> tuple[list[Backend], list[str]]:
    """Backends that run this bundle here, ONNX Runtime first and each name once, and why others do not."""
    backends = dict[str, Backend]()
    notes = list[str]()
    held = {ONNXRUNTIME, *(engine.kind for engine in bundle.manifest.engines)}
    for option in sorted(options(bundle, Machine.here()), key=lambda o: o.device != "cpu"):
        if option.backend in backends or option.backend not in held:
            continue
        try:
            if option.problem is not None:
                raise BackendError(option.problem)
            backends[option.backend] = Choice(option, ()).open(bundle, threads=0)
        except FrameFusionError as error:
            notes.append(f"{option.backend} on {option.device} was not run: {error}")
    return sorted(backends.values(), key=lambda backend: backend.name != ONNXRUNTIME), notes


def _explained(bundle: Bundle, plan: BuildPlan, backend: Backend, call: RecordedCall, row: Boundary) -> Divergence:
    """What can be said of a graph that is off."""
    suspect = _suspect(bundle, plan, call) if backend.name == ONNXRUNTIME else None
    place = _place(bundle, plan, row.graph, "" if suspect is None else suspect.block)
    return Divergence(row, place, suspect)


def _suspect(bundle: Bundle, plan: BuildPlan, call: RecordedCall) -> Suspect | None:
    return first_difference(
        bundle.folder / call.graph,
        plan.graph(call.graph),
        plan.dialect,
        eager_loaders(plan, written=bundle.folder)[call.graph](),
        call.inputs | call.past,
        limit_of(bundle.manifest, call.graph),
    )


def _place(bundle: Bundle, plan: BuildPlan, graph: str, block: str) -> str:
    """Where a block of a graph is, as a report names it."""
    record = segment_of(bundle.manifest, graph)
    if record is None:
        return f"vision tower, {block}" if block else "vision tower"
    blocks = next(segment.blocks for segment in plan.segments if segment.name == record.name)
    index = re.match(r"blocks\.(\d+)", block)
    if index is not None:
        half = blocks[int(index[1])]
        return f"segment {record.name}, layer {half.layer} {half.kind}"
    return f"segment {record.name}" + (f", {block.split('.')[0]}" if block else "")


def render(report: Mapping[str, Any]) -> str:
    """The report for a terminal: the worst output of each graph in each way, then notes and sentences."""
    rows = [
        (row["way"], row["graph"], row["kind"], row["output"], _shown(row["error"]), _shown(row["limit"]))
        for row in _worst(report["boundaries"])
    ]
    table = console.table(("way", "graph", "call", "worst output", "error", "limit"), rows)
    return "\n".join([table, *report["notes"], *report["words"]])


def _worst(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    groups: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for row in rows:
        key = (row["way"], row["graph"], row["kind"])
        if key not in groups or _size(row) > _size(groups[key]):
            groups[key] = row
    yield from groups.values()


def _size(row: Mapping[str, Any]) -> float:
    return math.inf if row["error"] is None else float(row["error"])


def _shown(error: float | None) -> str:
    return "no number" if error is None else f"{error:.2g}"


def _plain(value: Any) -> Any:
    """Values that JSON has: None in place of NaN and infinity."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
