"""What a build will write and take, before anything is written: `ff-export plan`. Reads config.json and headers alone.

Bytes of weights, table and tokenizer are exact; graphs are left out, some hundred kilobytes each. Time and memory of
the build follow from constants measured on two cores and a disk of 0.27 GB/s (tools/bench/export_memory.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from framefusion.console.messages import in_bytes, table
from framefusion.console.progress import in_time
from framefusion.errors import BudgetError, CheckpointError
from framefusion.export.build import sizes_of
from framefusion.export.check.agreement import scratch_of_agreement
from framefusion.export.check.golden import GoldenEffort, golden_effort
from framefusion.export.check.verify import Scope, scope_of
from framefusion.export.checkpoints.tensors.weights import QuantizedPart
from framefusion.export.engines.jobs import FOLDER as ENGINES
from framefusion.export.engines.tensorrt.build import build_memory as engine_memory
from framefusion.export.engines.tensorrt.profiles import CODE_BYTES, batch_sizes
from framefusion.export.machine import free_disk
from framefusion.export.options import AS_STORED, DEQUANTIZED, MAX_BATCH_SIZE
from framefusion.export.plan.build_plan import WEIGHTS as WEIGHTS_FILE
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.quantization.recipes import Made
from framefusion.export.report.build_memory import build_memory
from framefusion.export.report.calibration import SEARCHED_A_SECOND, calibration_lines, calibration_needs
from framefusion.export.report.inspection import TEXT, cache_facts, reduction_facts, span, weight_facts
from framefusion.export.writing.parts import EMBEDDING_FILE, TOKENIZER_FILE, Builder
from framefusion.export.writing.staging import SPARE
from framefusion.runtime.backends.table import backend, engine_traits
from framefusion.runtime.format.manifest import FileRecord, Manifest
from framefusion.runtime.memory import expected_lengths, gpu_plan, memory_plan, slot_bytes

CHECKED_A_SECOND = 40e6  # bytes of the checkpoint that a streamed check compares: 360 s of one core for a 7B
COMPARED_A_SECOND = 80e6  # without the runs in ONNX Runtime
GOLDEN_A_SECOND = 40e6  # bytes of the checkpoint that the golden's runs take, roughly, on two cores: an estimate
BYTES_A_SECOND = 180e6  # read, converted, hashed, written and on the disk
COMPILED_A_SECOND = 40e6  # bytes of weights that TensorRT-RTX compiles with eight profiles, a 7B's
TRACING = 0.024  # seconds for each parameter of a graph; equal segments are traced once
NEW_TOKENS = 128
WEIGHTS = ("int8", "int4", "int8+head", "int4+head", "int4+head4", "fp8", "fp8+head")
"""Values of --weights whose bytes a plan says beside its own."""


def forecast(plan: BuildPlan, output: Path, *, verify: bool = True, calibration: Sequence[Path] = ()) -> dict[str, Any]:
    """What a build would write and take, as plain values: sizes in bytes, times in seconds.

    Args:
        plan: of the build.
        output: where the bundle is to be.
        verify: whether the build will check it.
        calibration: films and files of questions that the build is given, and the plan by `planned_options`.

    Raises:
        CheckpointError, BudgetError, VideoError, PromptError, EvaluationError: the build would be refused.
    """
    scope = scope_of(plan) if verify else None
    golden = golden_effort(plan, may_stream=verify)
    sizes = sizes_of(plan, scope)
    manifest = predicted(plan, sizes)
    dequantized = scratch_of_agreement(plan) if scope is not None and not scope.uncompared else 0
    written = sizes.pop("check", 0)
    checked = max(written, dequantized)  # one is gone before the other is written
    engines = _engines(plan, sizes.get(ENGINES, 0))
    needs = calibration_needs(plan, manifest, calibration) if calibration else None
    total = sum(sizes.values())
    meanwhile = checked + (needs["disk"] if needs else 0)  # codes wait while the bundle is written and checked
    free = free_disk(output)
    tokens = plan.limits.max_input_len
    visual = max(tokens - TEXT, 0)
    lengths = expected_lengths(manifest, tokens, visual)
    plans = {
        "worst": memory_plan(manifest, tokens, visual, NEW_TOKENS),
        "expected": memory_plan(manifest, tokens, visual, NEW_TOKENS, lengths=lengths),
    }
    return {
        "checkpoint": str(plan.checkpoint.folder),
        "family": plan.family.name,
        "model": asdict(manifest.model),
        "quantized_checkpoint": plan.stored_weights or None,
        "dialect": plan.dialect.name,
        "limits": asdict(plan.limits),
        "reduction": reduction_facts(manifest),
        "segments": [_segment(manifest, index) for index in range(len(manifest.segments))],
        "weights": weight_facts(manifest) | {"choices": _choices(plan)},
        "files": _files(sizes),
        "bytes": total,
        "kv_cache": cache_facts(manifest),
        "kv_bytes_per_token": sum(slot_bytes(manifest) * len(s.attention_layers) for s in manifest.segments),
        "prompt": {"input_len": tokens, "visual_len": visual, "max_new_tokens": NEW_TOKENS},
        "memory": {
            "build": build_memory(plan),
            "run": {name: memory.total for name, memory in plans.items()},
            "check": None if scope is None else scope.memory,
            "golden": None if golden.missing else golden.memory,
            "gpu": _gpu(manifest, plan, tokens),
        },
        "check": None if scope is None else _check(scope, written, dequantized),
        "golden": {"streamed": golden.streamed, "missing": golden.missing},
        "engines": engines,
        "calibration": needs,
        "seconds": _seconds(plan, total + checked, scope, golden) + (engines["seconds"] if engines else 0),
        "disk": _disk(output, total + meanwhile + SPARE, free),
    }  # fmt: skip


def _disk(output: Path, needed: int, free: int) -> dict[str, Any]:
    return {"folder": str(output), "needed": needed, "free": free, "fits": needed <= free}


def _choices(plan: BuildPlan) -> dict[str, int]:
    """--weights, or a type of floats -> bytes of the LLM's weights; what the options do not allow is left out."""
    floats = None if plan.checkpoint.quantization is None else DEQUANTIZED
    choices: dict[str, dict[str, Any]] = {
        "float32": {"weights": floats, "dtype": "float32"},
        "float16": {"weights": floats, "dtype": "float16"},
    }
    stored = () if plan.checkpoint.quantization is None else (AS_STORED,)
    choices |= {weights: {"weights": weights} for weights in (*stored, *WEIGHTS)}
    found = {}
    for name, changes in choices.items():
        with suppress(BudgetError, CheckpointError):
            other = BuildPlan(plan.checkpoint, replace(plan.options, **changes))
            found[name] = sum(record.weight_bytes for record in other.segment_records)
    return found


def predicted(plan: BuildPlan, sizes: Mapping[str, int]) -> Manifest:
    """The manifest as far as it is known now: no graph, no hash."""
    files = {name: FileRecord(size, "") for name, size in _files(sizes).items()}
    return Builder(plan).manifest(files, None)


def _files(sizes: Mapping[str, int]) -> dict[str, int]:
    """File of the bundle -> bytes."""
    single = {"embedding": EMBEDDING_FILE, "tokenizer": TOKENIZER_FILE}
    single[ENGINES] = ENGINES
    return {single.get(part, f"{part}/{WEIGHTS_FILE}"): size for part, size in sizes.items() if part != "check"}


def _check(scope: Scope, scratch: int, dequantized: int) -> dict[str, Any]:
    compared = {"compared": not scope.uncompared} | ({"why": scope.uncompared} if scope.uncompared else {})
    return {"method": scope.method, "why": scope.why, "scratch_bytes": scratch,
            "dequantized_bytes": dequantized, "transformers": compared}  # fmt: skip


def _checking(plan: BuildPlan, scope: Scope | None) -> float:
    """Seconds of a check whose weights are read from the disk as they are used; of another one little."""
    if scope is None or not scope.effort.streamed or scope.uncompared:
        return 0.0
    return _checkpoint_bytes(plan) / (CHECKED_A_SECOND if scope.method == "streamed" else COMPARED_A_SECOND)


def _checkpoint_bytes(plan: BuildPlan) -> int:
    return sum(plan.checkpoint.nbytes(key) for key in plan.checkpoint.files)


def _engines(plan: BuildPlan, size: int) -> dict[str, Any] | None:
    """What is compiled; the bytes are those of the weights and some megabytes for each profile of a segment."""
    options = plan.options.engines
    if options is None:
        return None
    inside = engine_traits(options.kind).weights_inside
    heaviest = max(graph.weight_bytes for graph in plan.graphs)
    steps = 1 + len(batch_sizes(options.max_batch_size or MAX_BATCH_SIZE))
    profiles = len(plan.buckets() or (0,)) + steps  # a fixed prefill has one
    return {
        "kind": options.kind,
        "targets": list(options.targets),
        "bytes": size + CODE_BYTES * len(plan.segments) * profiles if inside else None,
        "seconds": size / COMPILED_A_SECOND if inside else None,
        "memory": engine_memory(profiles, heaviest) if inside else None,
    }


def _gpu(manifest: Manifest, plan: BuildPlan, tokens: int) -> dict[str, int] | None:
    """What a GPU holds of a run at least, and with the embedding table; None where nothing is built for one."""
    options = plan.options.engines
    if options is None or (options.device == "cpu" and "cpu" in backend(options.kind).devices):
        return None
    memory = gpu_plan(manifest, tokens, NEW_TOKENS)
    return asdict(memory) | {"least": memory.least, "total": memory.total}


def _segment(manifest: Manifest, index: int) -> dict[str, Any]:
    record = manifest.segments[index]
    first = sum(segment.num_mlps for segment in manifest.segments[:index])
    return {
        "name": record.name,
        "mlp_layers": list(range(first, first + record.num_mlps)),
        "attention_layers": list(record.attention_layers),
        "weight_bytes": record.weight_bytes,
        "kv_bytes_per_token": slot_bytes(manifest) * len(record.attention_layers),
    }


def _searched(plan: BuildPlan) -> list[int]:
    """Weights of each matrix whose codes the build searches; those by films are chosen before it."""
    if plan.in_floats is None:
        return []
    graphs = [graph for graph in plan.graphs if graph.role != "decode"]  # its prefill has the same weights
    parts = [(shape, graph.sources[name]) for graph in graphs for name, shape in graph.shapes.items()]
    codes = [(shape, part) for shape, part in parts if isinstance(part, QuantizedPart) and part.part == "packed"]
    return [math.prod(shape) * 8 // part.recipe.form.bits for shape, part in codes if isinstance(part.recipe, Made)]


def _seconds(plan: BuildPlan, size: int, scope: Scope | None, golden: GoldenEffort) -> float:
    """Of everything but engines: writing this many bytes, tracing, the check, the golden."""
    traced = {graph.structure: len(graph.sources) for graph in plan.graphs}
    canned = 0.0 if golden.missing else _checkpoint_bytes(plan) / GOLDEN_A_SECOND
    times = 2 if scope is not None and scope.method == "full" else 1  # the check chooses all codes once more
    searched = times * sum(_searched(plan)) / SEARCHED_A_SECOND
    return searched + size / BYTES_A_SECOND + TRACING * sum(traced.values()) + _checking(plan, scope) + canned


def _gpu_lines(gpu: Mapping[str, int] | None) -> list[str]:
    if gpu is None:
        return []
    return [
        f"of it on a GPU: {in_bytes(gpu['least'])} (weights {in_bytes(gpu['weights'])}, caches "
        f"{in_bytes(gpu['caches'])}), activations besides; the embedding table {in_bytes(gpu['embedding'])} more where "
        "an eighth of what is free takes it"
    ]


def _engine_lines(engines: Mapping[str, Any] | None) -> list[str]:
    if engines is None:
        return []
    if engines["bytes"] is None:
        return [f"{engines['kind']} engines: without weights, some megabytes and minutes; not forecast"]
    targets = ", ".join(engines["targets"]) or "all that the library builds for"
    return [
        f"{engines['kind']} engines for {targets}: about {in_bytes(engines['bytes'])}, compiled one by one in "
        f"{in_time(engines['seconds'])}, the largest with {in_bytes(engines['memory'])} of memory"
    ]


def _check_line(check: Mapping[str, Any] | None, memory: int | None) -> str:
    if check is None or memory is None:
        return "check: left out, NOTHING will be compared"
    scope = check["why"]
    if not scope and check["method"] == "streamed":
        scope = "all of it, weights read from the disk as they are used"
    compared = "each layer built is compared with transformers' own class"
    why = check["transformers"].get("why")
    if why:
        compared = f"NOT compared with transformers: {why}"
    if check["dequantized_bytes"]:
        compared += f", over {in_bytes(check['dequantized_bytes'])} of floats that lie on the disk meanwhile"
    return f"check: {scope or 'full'}; memory about {in_bytes(memory)}; {compared}"


def _golden_line(golden: Mapping[str, Any], memory: int | None) -> str:
    if memory is None:
        return f"golden: none, a device will not be compared with this bundle: {golden['missing']}"
    read = ", weights read from the disk as they are used" if golden["streamed"] else ""
    return f"golden: the eager model's answers for `ff-run check`; memory about {in_bytes(memory)}{read}"


def render(facts: Mapping[str, Any]) -> str:
    """What `forecast` gives, as tables for people."""
    model = facts["model"]
    memory = facts["memory"]
    disk = facts["disk"]
    check = facts["check"]
    prompt = facts["prompt"]
    head = [
        f"{facts['checkpoint']}: {facts['family']}, {model['num_layers']} layers, hidden {model['hidden_size']}, "
        f"vocabulary {model['vocab_size']}, to be built in {model['dtype']}, dialect {facts['dialect']}",
        f"weights: {facts['weights']['text']}",
        *([f"quantized checkpoint: {facts['quantized_checkpoint']}"] if facts["quantized_checkpoint"] else []),
        f"reduction: {facts['reduction']['text']}",
        f"KV cache: {facts['kv_cache']['text']}",
    ]
    rows = [
        (row["name"], span(row["mlp_layers"]), span(row["attention_layers"]), in_bytes(row["kv_bytes_per_token"]))
        for row in facts["segments"]
    ]
    files = [(name, size, in_bytes(size)) for name, size in facts["files"].items()]
    choices = [(name, size, in_bytes(size)) for name, size in facts["weights"]["choices"].items()]
    tail = [
        f"memory of the build: about {in_bytes(memory['build'])}",
        f"memory of a run, {prompt['input_len']} tokens of prompt and {prompt['max_new_tokens']} new ones: "
        f"{in_bytes(memory['run']['expected'])} expected, {in_bytes(memory['run']['worst'])} at worst",
        *_gpu_lines(memory["gpu"]),
        *_engine_lines(facts["engines"]),
        *calibration_lines(facts["calibration"]),
        _check_line(check, memory["check"]),
        _golden_line(facts["golden"], memory["golden"]),
        f"time: about {in_time(facts['seconds'])} to write, at {BYTES_A_SECOND / 1e9:.2f} GB/s and "
        f"{TRACING:g} s of tracing for each parameter of a graph",
        f"disk at {disk['folder']}: {in_bytes(disk['needed'])} needed, {in_bytes(disk['free'])} free: "
        + ("it fits" if disk["fits"] else "it does NOT fit"),
    ]
    blocks = ["\n".join(head), table(("segment", "MLPs", "attentions", "KV a token"), rows)]
    blocks += [table(("file", "bytes", ""), [*files, ("total", facts["bytes"], in_bytes(facts["bytes"]))])]
    blocks += [table(("LLM's weights by --weights or --dtype", "bytes", ""), choices)]
    return "\n\n".join([*blocks, "\n".join(tail)])
