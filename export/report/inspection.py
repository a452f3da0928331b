"""What a bundle says about itself, for people and for programs: `ff-export inspect`. Reads manifests, runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from framefusion.console.layout import counted
from framefusion.console.messages import in_bytes, table
from framefusion.errors import BundleError, PromptError
from framefusion.export.engines.inspection import engine_block, engine_facts
from framefusion.export.report.integrity import integrity_facts, render_integrity
from framefusion.reducers import DEFAULT
from framefusion.reduction.budget import describe_cost
from framefusion.runtime.format.manifest import (
    UNKNOWN_LICENSE,
    CalibrationRecord,
    FileRecord,
    LossRecord,
    Manifest,
    SourceRecord,
    WeightFormatRecord,
)
from framefusion.runtime.format.manifest_file import MANIFEST, read_manifest
from framefusion.runtime.memory import MemoryPlan, expected_lengths, memory_plan, slot_bytes

TEXT = 64  # tokens of text in a prompt of which only the length is given


@dataclass(frozen=True)
class PromptSize:
    """The prompt that lengths and memory are worked out for; None takes the longest, mostly visual."""

    input_len: int | None = None
    visual_len: int | None = None
    max_new_tokens: int = 128
    cost: float | None = None


def report(folder: Path, prompt: PromptSize) -> dict[str, Any]:
    """All facts of a bundle as plain values.

    Args:
        folder: the bundle.
        prompt: that lengths and memory are worked out for.

    Raises:
        BundleError: there is no bundle, or its manifest is not what a build writes.
        PromptError, BudgetError: the prompt does not fit it, or its cost cannot be met.
    """
    manifest = read_manifest(folder)
    tokens, visual = _lengths(manifest, prompt)
    lengths = expected_lengths(manifest, tokens, visual, prompt.cost)
    plans = {
        "worst": memory_plan(manifest, tokens, visual, prompt.max_new_tokens),
        "expected": memory_plan(manifest, tokens, visual, prompt.max_new_tokens, lengths=lengths),
    }
    return {
        "bundle": str(folder),
        "integrity": integrity_facts(folder),
        "source": None if manifest.source is None else asdict(manifest.source),
        "model": asdict(manifest.model),
        "weights": weight_facts(manifest),
        "kv_cache": cache_facts(manifest),
        "dialect": manifest.dialect,
        "limits": asdict(manifest.limits),
        "reduction": reduction_facts(manifest, prompt.cost),
        "prompt": {"input_len": tokens, "visual_len": visual, "max_new_tokens": prompt.max_new_tokens},
        "segments": _segments(manifest, plans),
        "buckets": padding(manifest.segments[0].buckets or ()),
        "fixed": None if manifest.fixed is None else asdict(manifest.fixed),
        "bytes": bytes_by_part(folder, manifest),
        "memory": {name: asdict(plan) | {"total": plan.total} for name, plan in plans.items()},
        "engines": engine_facts(manifest),
        "check": _check_report(folder, manifest),
        "tools": dict(manifest.tools),
    }


def _check_report(folder: Path, manifest: Manifest) -> dict[str, Any] | None:
    """What the manifest says of the comparison with the eager model, if it can be shown."""
    check = dict(manifest.check) or None
    try:
        _check_table(check)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise BundleError(
            f"{folder}: the manifest's report of the check is not what a check writes ({error!r}): rebuild the bundle"
        ) from None
    return check


def reduction_facts(manifest: Manifest, cost: float | None = None) -> dict[str, Any]:
    """The reduction with its cost in both senses."""
    record = manifest.reduction
    cost = record.cost if cost is None else cost
    by = f" by {record.reducer}" if record.mode == "adaptive" and record.reducer != DEFAULT else ""
    calls = list(manifest.calls) if record.mode == "adaptive" else []
    return asdict(record) | {"cost": cost, "text": f"{record.mode}{by}, {describe_cost(cost)}", "calls": calls}


def weight_facts(manifest: Manifest) -> dict[str, Any]:
    """How the weights of the LLM's linear maps are stored."""
    record = manifest.quantization
    if record is None:
        return {"text": f"{manifest.model.dtype}", "quantization": None}
    parts = [f"{form.linears} in {_format_text(form)}" for form in record.formats]
    floats = [f"{record.floats} in {manifest.model.dtype}"] if record.floats else []
    origin = record.method if record.read else f"made by {record.method}"
    if record.calibration is not None:
        origin += f" ({_calibration(record.calibration)})"
    text = f"of the LLM's linear maps {' and '.join([*parts, *floats])}; {origin}{_points(record.losses)}"
    return {"text": text, "quantization": asdict(record)}


def _calibration(record: CalibrationRecord) -> str:
    """What codes were calibrated on, and how they did on what was held out."""
    answers = f", {record.answer_rows} of them of answers to {record.prompts} prompts" if record.prompts else ""
    given = f"{counted(len(record.films), 'file')}, {record.rows} rows{answers}"  # pictures among the films
    if record.divergence is None:
        return given
    far = f"{record.divergence:.2g} from floats on {record.held_out} prompts held out, by the search "
    far += f"{record.search_divergence:.2g}"
    return f"{given}; {far}" if record.taken else f"films were given, {given}, and their codes left: {far}"


def _format_text(form: WeightFormatRecord) -> str:
    """How weights are stored: "int4, blocks of 32 with zero points"."""
    scales = f"blocks of {form.block}" if form.block else "a scale a row"
    if form.kind == "float":
        return f"fp8, {scales}, activations {'in fp8 too, a scale a token' if form.rounds else 'in floats'}"
    return f"int{form.bits}, {scales}{'' if form.symmetric else ' with zero points'}"


def cache_facts(manifest: Manifest) -> dict[str, Any]:
    """How keys and values are stored, and what a token of them takes in all layers together."""
    size = slot_bytes(manifest) * manifest.model.num_layers
    record = manifest.kv_cache
    facts = {"dtype": manifest.model.dtype, "bytes_per_token": size, "quantization": None}
    text = f"{in_bytes(size)} a token, all segments together"
    if record is None:
        return facts | {"text": f"{manifest.model.dtype}, {text}"}
    measured = "not measured yet"
    if record.tokens:
        measured = f"measured on {record.tokens} tokens, {record.clipped:.3%} of a further film's numbers beyond them"
    text = f"{record.dtype}, {text}; a scale for each channel, {measured}{_points(record.losses)}"
    return facts | {"dtype": record.dtype, "quantization": asdict(record), "text": text}


def _points(losses: Sequence[LossRecord]) -> str:
    """What was lost in answers; "" where nobody asked."""
    lost = [f"{loss.points:+.1f} at cost {loss.cost:g} ({loss.low:+.1f} to {loss.high:+.1f})" for loss in losses]
    return f"; points lost on {losses[0].questions} questions: {', '.join(lost)}" if lost else ""


def padding(buckets: tuple[int, ...]) -> list[dict[str, Any]]:
    """For each bucket the lengths it takes, and which share of it is padding: at worst, and over all its lengths."""
    rows = []
    below = 0
    for size in buckets:
        first = below + 1
        below = size
        worst = (size - first) / size
        rows.append({"bucket": size, "first": first, "last": size, "expected": worst / 2, "worst": worst})
    return rows


def bytes_by_part(folder: Path, manifest: Manifest) -> dict[str, int]:
    """Bytes on disk: one entry a segment, one a kind of engine, and one each for the other parts."""
    return bytes_of_files(manifest.files) | {"manifest": (folder / MANIFEST).stat().st_size}


def bytes_of_files(files: Mapping[str, FileRecord]) -> dict[str, int]:
    """The same for the files that a manifest records."""
    sizes: dict[str, int] = {}
    for name, record in files.items():
        parts = Path(name).parts
        part = "/".join(parts[:2]) if parts[0] in ("segments", "engines") else Path(parts[0]).stem
        sizes[part] = sizes.get(part, 0) + record.size
    return sizes


def base_model(source: SourceRecord) -> str:
    """The checkpoint in a line: its id with the commit, or the folder's name."""
    if not source.on_hub:
        return f"{source.name}, a folder"
    return f"{source.name} at {source.commit}" + (f" ({source.revision})" if source.revision != source.commit else "")


def licence(source: SourceRecord) -> str:
    """What the checkpoint says of its licence, in a line."""
    if source.license == UNKNOWN_LICENSE:
        return "unknown: the checkpoint does not state one"
    return (source.license_name or source.license) + (f" ({source.license_link})" if source.license_link else "")


def _lengths(manifest: Manifest, prompt: PromptSize) -> tuple[int, int]:
    """Tokens of a prompt, and visual ones among them."""
    longest = manifest.limits.max_input_len
    tokens = prompt.input_len or longest
    visual = max(tokens - TEXT, 0) if prompt.visual_len is None else prompt.visual_len
    if tokens > longest:
        raise PromptError(f"--input-len {tokens} is beyond the bundle's longest input {longest}: ask for less")
    if visual > tokens:
        raise PromptError(f"--visual-len {visual} is beyond --input-len {tokens}: it is a part of it")
    return tokens, visual


def _segments(manifest: Manifest, plans: Mapping[str, MemoryPlan]) -> list[dict[str, Any]]:
    rows = []
    first = 0
    for index, record in enumerate(manifest.segments):
        rows.append(
            {
                "name": record.name,
                "mlp_layers": list(range(first, first + record.num_mlps)),
                "attention_layers": list(record.attention_layers),
                "weight_bytes": record.weight_bytes,
                "buckets": list(record.buckets or ()),
                "static": manifest.fixed is not None,
                "kv_length": {
                    name: plan.lengths[index] if manifest.fixed is None else max(manifest.fixed.lengths)
                    for name, plan in plans.items()
                },
                "kv_bytes": {name: plan.caches_by_segment[index] for name, plan in plans.items()},
            }
        )
        first += record.num_mlps
    return rows


def render(facts: Mapping[str, Any]) -> str:
    """What `report` gives, as tables for people."""
    model = facts["model"]
    limits = facts["limits"]
    prompt = facts["prompt"]
    head = [
        f"{facts['bundle']}: {model['family']} ({model['model_type']}), {model['num_layers']} layers, "
        f"hidden {model['hidden_size']}, {model['num_heads']}/{model['num_kv_heads']} heads of {model['head_dim']}, "
        f"vocabulary {model['vocab_size']}, {model['dtype']}",
        *_source_lines(facts["source"]),
        *render_integrity(facts["integrity"]),
        f"weights: {facts['weights']['text']}",
        f"KV cache: {facts['kv_cache']['text']}",
        f"reduction: {facts['reduction']['text']}",
        *_reducer_lines(facts["reduction"]),
        f"dialect: {facts['dialect']}",
        f"limits: {limits['max_input_len']} tokens of prompt, {limits['max_kv_cache_capacity']} with the answer",
        f"below: a prompt of {prompt['input_len']} tokens, {prompt['visual_len']} of them visual, "
        f"{prompt['max_new_tokens']} new ones",
    ]
    blocks = ["\n".join(head), _segment_table(facts["segments"]), _shapes(facts)]
    blocks += [engine_block(kind) for kind in facts["engines"]]
    blocks += [_byte_table(facts["bytes"]), _memory_table(facts["memory"]), _check_table(facts["check"])]
    return "\n\n".join(blocks)


def _source_lines(source: Mapping[str, Any] | None) -> list[str]:
    if source is None:
        return []
    record = SourceRecord(**source)
    quantized = [] if record.quantization is None else [f"quantized checkpoint: {record.quantization}"]
    return [f"base model: {base_model(record)}", *quantized, f"licence: {licence(record)}"]


def _reducer_lines(reduction: Mapping[str, Any]) -> list[str]:
    if not reduction["calls"]:
        return []
    calls = ", ".join(map(str, reduction["calls"]))
    return [f"reducer: {reduction['reducer']}; cut for calls {calls}, so others that act there run as well"]


def _segment_table(segments: list[dict[str, Any]]) -> str:
    names = ("segment", "MLPs", "attentions", "weights", "buckets", "KV worst", "KV expected", "KV bytes worst")
    rows = [
        (
            row["name"], span(row["mlp_layers"]), span(row["attention_layers"]), in_bytes(row["weight_bytes"]),
            "static" if row["static"] else len(row["buckets"]) or "any length",
            row["kv_length"]["worst"], row["kv_length"]["expected"], in_bytes(row["kv_bytes"]["worst"]),
        )
        for row in segments
    ]  # fmt: skip
    return table(names, rows)


def span(layers: list[int]) -> str:
    """First and last of some layers in a row: 3-9."""
    if len(layers) < 2:
        return "".join(map(str, layers)) or "-"
    return f"{layers[0]}-{layers[-1]}"


def _shapes(facts: Mapping[str, Any]) -> str:
    """What sizes a prefill may have: the static ones of the fixed mode, or buckets."""
    fixed = facts["fixed"]
    if fixed is None:
        return _bucket_table(facts["buckets"])
    schedule = facts["reduction"]["schedule"]
    size = fixed["max_text"] + fixed["max_visual"]
    merges = ", ".join(f"call {call} merges {share:.1%}" for call, share in enumerate(schedule["merge_shares"]))
    rows = [(span(layers), length, f"{length / size:.1%}") for length, layers in _runs(fixed["lengths"])]
    return (
        f"static: up to {fixed['max_text']} tokens of text and {fixed['max_visual']} visual ones, padded to {size}\n"
        f"schedule: {merges or 'no merge'}; after layer {schedule['prune_layer']} {schedule['prune_share']:.1%} "
        "of the visual tokens are pruned\n" + table(("layers", "tokens and KV", "of the input"), rows)
    )


def _runs(lengths: list[int]) -> list[tuple[int, list[int]]]:
    """Neighbouring layers of equal length."""
    runs: list[tuple[int, list[int]]] = []
    for layer, length in enumerate(lengths):
        if not runs or runs[-1][0] != length:
            runs.append((length, []))
        runs[-1][1].append(layer)
    return runs


def _bucket_table(buckets: list[dict[str, Any]]) -> str:
    if not buckets:
        return "buckets: none, every length runs as it is, without padding"
    rows = [
        (row["bucket"], f"{row['first']}-{row['last']}", f"{row['expected']:.1%}", f"{row['worst']:.1%}")
        for row in buckets
    ]
    return table(("bucket", "lengths", "padding expected", "padding worst"), rows)


def _byte_table(sizes: Mapping[str, int]) -> str:
    rows = [(part, size, in_bytes(size)) for part, size in sizes.items()]
    total = sum(sizes.values())
    return table(("part", "bytes", ""), [*rows, ("total", total, in_bytes(total))])


def _memory_table(plans: Mapping[str, Mapping[str, Any]]) -> str:
    names = ("process", "weights", "embedding", "activations", "rows", "caches", "total")
    rows = [(name, *(in_bytes(plan[name]) for plan in plans.values())) for name in names]
    return table(("memory", *plans), rows)


def _check_table(check: Mapping[str, Any] | None) -> str:
    if check is None:
        return comparison_summary(check)
    return f"checked against {check['reference']}\n{comparison(check)}\n{comparison_summary(check)}"


def comparison(check: Mapping[str, Any]) -> str:
    """What was compared, as a table; above it why it was not the bundle itself, below it what is to be known."""
    rows = [(line["what"], f"{line['value']:.3g}", f"{line['limit']:.3g}") for line in check["lines"]]
    why = [check["why"]] if check.get("why") else []
    return "\n".join([*why, table(("compared", "error", "limit"), rows), *check.get("notes", ())])


def render_comparison(check: Mapping[str, Any]) -> str:
    """A check as it is printed behind a build: verdict, table, and what the bundle was compared with."""
    verdict = "passed" if check["passed"] else "FAILED"
    return f"check {verdict}, reference: {check['reference']}\n{comparison(check)}\n{comparison_summary(check)}"


def comparison_summary(check: Mapping[str, Any] | None) -> str:
    """One line: what a bundle was compared with, and loudly that it was not."""
    if not check:
        return "NOT CHECKED: compared neither with the eager model nor with transformers"
    facts = check.get("transformers")
    if facts is None:
        return "NOT COMPARED WITH TRANSFORMERS as far as the report says: it is an older release's"
    if not facts["compared"]:
        return f"NOT COMPARED WITH TRANSFORMERS: {facts['why']}"
    layers = f"all {facts['layers']} layers"
    if facts["layers"] < facts["of_layers"]:
        layers = f"ONLY the first {facts['layers']} of {facts['of_layers']} layers"
    classes = " and ".join(facts["classes"])
    worst = max(facts["errors"].values())
    line = f"compared with transformers {facts['version']}'s {classes}, {layers}: largest error {worst:.2g}"
    weights = f", its weights {facts['weights']}" if facts.get("weights") else ""
    return line + weights + (f"; NOT compared: {facts['stand_in']}" if facts["stand_in"] else "")
