"""Which check a build gets, and the checks that need no whole model in memory.

    full        the bundle and the eager model (check.py), where memory holds them
    streamed    else: the same with a shorter clip and answer, and weights that are read from the disk as they are used
    truncated   where that cannot be (a static graph computes its whole length): a bundle of the first layers, built
                with the same options in a scratch folder
    in float32  where the runtime has no kernels for the type (bfloat16): the same graphs, built and checked in float32

Where it was not the bundle itself that was checked, tensors of each of its files are read back and compared with the
checkpoint byte by byte, and the torch graphs of all layers are compared with transformers' class all the same
(agreement.py). What was done, and why, is in the manifest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from framefusion.export.check import check
from framefusion.export.check.agreement import Agreement, not_compared
from framefusion.export.check.observation import SPARING, WHOLE, Doing, Effort, ignore, observe
from framefusion.export.checkpoints.tensors.streaming import streamed_bytes
from framefusion.export.checkpoints.tensors.weights import AnySource, QuantizedPart, blocks_of, stored_type
from framefusion.export.eager.written import written_sources
from framefusion.export.graphs.decoder import Segment
from framefusion.export.graphs.graph_plan import GraphPlan
from framefusion.export.machine import CHECKING_PROCESS
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import WEIGHTS, BuildPlan
from framefusion.export.quantization.blocks import Packed, unpack
from framefusion.export.quantization.code_store import Calibrated
from framefusion.reducers import load_reducer
from framefusion.reduction.budget import cost_of_shares
from framefusion.runtime.bundle import Bundle

FEWEST_LAYERS = 4  # a segment of each kind: first, middle and last
SAMPLES = 8  # tensors of a file that are read back
MOST_MOVED = 0.5  # of a matrix by error feedback, as a share of its norm: 0.1 to 0.2 in 4 bits, 1.4 is another matrix
FLOAT = 4  # bytes: the eager model is in fp32, and ONNX Runtime's CPU kernels multiply fp16 in fp32


@dataclass(frozen=True)
class Scope:
    """What a build will check.

    Attributes:
        method: "full", "streamed", "truncated", "in float32", or "weights": the bundle's graphs are not run.
        why: a sentence for the manifest and for whoever reads the output.
        substitute: plan of the bundle that is checked in its place; None for itself, and where nothing is run.
        effort: of the run, and of the comparison with transformers.
        uncompared: why transformers' class cannot be run; "": it is.
        memory: bytes that the check takes.
    """

    method: str
    why: str = ""
    substitute: BuildPlan | None = None
    effort: Effort = WHOLE
    uncompared: str = ""
    memory: int = 0


def scope_of(plan: BuildPlan) -> Scope:
    """Decide from the plan and the memory that is free now.

    Raises:
        CheckpointError, BudgetError, ReducerError: see `BuildPlan`, of the bundle that stands for the one planned.
    """
    # 1. what can be run at all: a check compiles no engine, and no CPU kernel computes bfloat16
    runs = plan.options.dtype != "bfloat16"
    options = replace(plan.options, backend=None, target_sm=None, engines_only=False)
    options = options if runs else replace(options, dtype="float32")
    untried = "" if runs else "onnxruntime's CPU kernels do not compute bfloat16: the same graphs in float32 were run"
    # 2. everything, where memory holds it
    heaviest = plan.in_floats or plan  # whose weights are floats, with which transformers' class is compared
    needed = memory_of_check(heaviest)
    free = check.available_memory()
    if needed <= free:
        if runs:
            return Scope("full", memory=needed)
        return Scope("in float32", untried, BuildPlan(plan.checkpoint, options, plan.codes), memory=needed)
    # 3. else with the weights on the disk; a static graph computes its whole length, which takes too long that way
    least = memory_of_streamed(heaviest)
    uncompared = "" if least <= free else f"it needs {least / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    if runs and plan.fixed is None and not uncompared:
        return Scope("streamed", effort=SPARING, memory=least)
    # 4. else the first layers, built as a bundle of their own; else the weights are read back and nothing is run
    short = f"the full check needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    smaller = truncated(plan, options)
    substitute = None if smaller is None else BuildPlan(plan.checkpoint, smaller, plan.codes)
    part = 0 if substitute is None else memory_of_check(substitute)
    if substitute is None or part > free:
        return Scope("weights", f"the graphs were not run: {short}", None, SPARING, uncompared, least)
    layers = f"truncated to {substitute.config.num_layers} of {plan.config.num_layers} layers: {short}"
    why = "; ".join(filter(None, (layers, untried)))
    return Scope("truncated", why, substitute, SPARING, uncompared, max(part, 0 if uncompared else least))


def report(
    folder: Path,
    plan: BuildPlan,
    scope: Scope,
    tolerance: float | None,
    scratch: Callable[[BuildPlan], AbstractContextManager[Path]],
    doing: Doing = ignore,
) -> dict[str, Any]:
    """Carry a scope out.

    Args:
        folder: the bundle.
        plan: what it was built from.
        scope: of this plan.
        tolerance: see `check.check_bundle`.
        scratch: builds the bundle of another plan, and removes it when it was checked.
        doing: called with what runs now.

    Returns:
        as `check.check_bundle`, with the method and why it was chosen.
    """
    done = {"method": scope.method, "why": scope.why}
    whole = scope.method == "full"
    if whole or scope.method == "streamed":
        found = check.check_bundle(folder, plan, tolerance, scope.effort, doing) | done
        return found if plan.quantization is None else _with_weights(found, folder, plan, all_codes=whole)
    found = {"tolerance": tolerance, "lines": [], "notes": []}
    # 1. the bundle that stands for this one, in ONNX Runtime
    if scope.substitute is not None:
        with scratch(scope.substitute) as other:
            found = check.check_bundle(other, scope.substitute, tolerance, WHOLE, doing, transformers=False)
    # 2. the weights that it does not have
    found = _with_weights(found | done, folder, plan)
    # 3. all layers in eager torch against transformers' class
    return check.with_agreement(found, _agreement(folder, plan, scope, doing))


def _with_weights(found: dict[str, Any], folder: Path, plan: BuildPlan, *, all_codes: bool = False) -> dict[str, Any]:
    """A report with what was read back of the files of weights."""
    weights = weight_report(folder, plan, all_codes=all_codes)
    line = {"what": "tensors written that are not the checkpoint's", "value": len(weights["differing"]), "limit": 0.0}
    note = f"{weights['tensors']} tensors of all files of weights, {weights['bytes'] / 1e9:.2f} GB, were read back"
    failures = [*found.get("failures", ()), *([line] if weights["differing"] else [])]
    judged = {"failures": failures, "passed": not failures} if "failures" in found else {}
    return found | judged | {
        "lines": [*found["lines"], line], "notes": [*found["notes"], note, *weights["differing"]],
    }  # fmt: skip


def _agreement(folder: Path, plan: BuildPlan, scope: Scope, doing: Doing) -> Agreement:
    """The torch graphs of all layers against transformers' class, which needs no graph of the bundle."""
    if scope.uncompared:
        return not_compared(scope.uncompared)
    ours = observe(Bundle(folder), plan.in_floats or plan, replace(scope.effort, reduced=False), doing)
    return check.agreement_in_floats(plan, ours, doing, check.scratch_place(folder))


def memory_of_check(plan: BuildPlan) -> int:
    """Bytes at the peak: the eager model and the bundle are there one after the other, both with fp32 weights.

    A second graph over the same weights has a copy of its own, and while ONNX Runtime packs a tensor it has it twice.
    """
    weights = sum(sum(graph.eager_bytes) for graph in plan.graphs)
    largest = max(size for graph in plan.graphs for size in graph.eager_bytes)
    return weights + largest + CHECKING_PROCESS


def memory_of_streamed(plan: BuildPlan) -> int:
    """Bytes at the peak where weights stay on the disk: the largest unit in fp32, twice, since kernels pack it.

    A layer of transformers' is two of this project's units. Pages of files that are mapped are not counted: the system
    takes them back when memory is wanted. A checkpoint of several types is converted as a whole by transformers.
    """
    modules = [graph.module() for graph in plan.graphs]
    halves: dict[str, int] = {}
    for module in modules:
        if isinstance(module, Segment):
            for block, part in zip(module.plan, module.blocks, strict=True):
                size = FLOAT * sum(parameter.numel() for parameter in part.parameters())
                halves[block.kind] = max(size, halves.get(block.kind, 0))
    layer = sum(halves.values())
    largest = max(layer, *map(streamed_bytes, modules))
    tensors = (math.prod(plan.checkpoint.shape(key)) for key in plan.checkpoint.files)
    several = len(plan.stored_types()) > 1 and plan.checkpoint.quantization is None  # dequantized ones have one type
    converted = FLOAT * sum(tensors) if several else 0
    return 2 * largest + converted + CHECKING_PROCESS


def truncated(plan: BuildPlan, options: BuildOptions) -> BuildOptions | None:
    """Options of the first layers with the same segments in kind; None where that would be all layers.

    A schedule keeps its layers and shares, so its cost is what they come to in the smaller model.

    Args:
        plan: of the whole model.
        options: of the smaller one, but for its layers.
    """
    schedule = plan.reduction.schedule
    record = plan.reduction
    layers = max(FEWEST_LAYERS, math.ceil(1 / record.cost), schedule.prune_layer + 2 if schedule else 0)
    if record.depth is not None and load_reducer(record.reducer).static:  # all layers up to its call see all tokens
        layers = max(layers, math.floor((record.depth + 1) / record.cost) + 1)
    if layers >= plan.config.num_layers:
        return None
    smaller = replace(options, num_decoder_layer=layers)
    if schedule is not None:
        return replace(smaller, cost=cost_of_shares(schedule.shares, layers), merge_shares=schedule.merge_shares)
    return smaller if record.depth is None else replace(smaller, depth=min(record.depth, layers - 2))


def weight_report(folder: Path, plan: BuildPlan, *, all_codes: bool = False) -> dict[str, Any]:
    """Compare some tensors of each file of weights with the checkpoint.

    Args:
        folder: the bundle.
        plan: what it was built from.
        all_codes: compare all quantized weights, which are chosen once more for it; else some of them.

    Returns:
        tensors and bytes compared, and the names of those that differ.
    """
    compared = 0
    size = 0
    differing = []
    for graph in plan.graphs:
        if graph.role == "decode":
            continue  # its prefill has the same file of weights
        codes = [name for name in graph.shapes if isinstance(graph.sources[name], QuantizedPart)] if all_codes else []
        for name, tensor in _chosen(folder / graph.name, list(graph.shapes), codes):
            compared += 1
            size += tensor.nbytes
            source = graph.sources[name]
            if isinstance(source, QuantizedPart) and isinstance(source.recipe, Calibrated):
                if source.part == "packed" and not _stands_for(folder, graph, name, source.recipe, plan):
                    differing.append(f"{graph.name}: {name} is another matrix than {', '.join(source.keys)}")
                if source.recipe.store is None:
                    continue  # its codes cannot be chosen once more without the films
            if not _is_written(folder / graph.folder / WEIGHTS, tensor, plan, source):
                differing.append(f"{graph.name}: {name}")
    return {"tensors": compared, "bytes": size, "differing": differing}


def _stands_for(folder: Path, graph: GraphPlan, name: str, recipe: Calibrated, plan: BuildPlan) -> bool:
    """Whether written codes stand for the checkpoint's matrix: error feedback moves it, and not far."""
    prefix = name.removesuffix("packed")
    written = written_sources(graph, folder)
    parts = {part: written[prefix + part].make(plan.checkpoint) for part in recipe.form.parts}
    _, inputs = recipe.shape(plan.checkpoint)
    packed = Packed(parts["packed"], parts["scales"], parts.get("zero_points"))
    ours = unpack(packed, recipe.form, inputs).dequantize()
    theirs = recipe.matrix.source.make(plan.checkpoint).T.float()
    return bool((ours - theirs).norm() <= MOST_MOVED * theirs.norm())


def _chosen(graph: Path, names: Sequence[str], always: Sequence[str]) -> Iterator[tuple[str, ir.ExternalTensor]]:
    """First and last of the parameters, some between and those wanted, as the graph itself says where they are."""
    initializers = ir.load(graph).graph.initializers
    between = random.Random(str(graph.parent.name)).sample(names[1:-1], min(SAMPLES - 2, len(names[1:-1])))
    chosen = {names[0], names[-1], *between, *always}
    for name in (name for name in names if name in chosen):  # in their order: parts of one matrix are made together
        tensor = initializers[name].const_value
        assert isinstance(tensor, ir.ExternalTensor), name
        yield name, tensor


def _is_written(weights: Path, tensor: ir.ExternalTensor, plan: BuildPlan, source: AnySource) -> bool:
    """Whether the file has at the tensor's place what the checkpoint gives for it."""
    with weights.open("rb") as file:
        file.seek(tensor.offset or 0)
        values = source.make(plan.checkpoint)
        for block in blocks_of(values, stored_type(values, plan.dtype)):
            expected = block.contiguous().view(-1).view(torch.uint8).numpy().data
            if file.read(len(expected)) != expected:
                return False
        return file.tell() - (tensor.offset or 0) == tensor.length
