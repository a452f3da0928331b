"""The model card of a bundle: README.md as the Hugging Face hub reads it. All that it says is the manifest's.

Written after the check, because it says what was compared and how far apart it was; licence files of the checkpoint
travel beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from framefusion.console.messages import in_bytes
from framefusion.export.checkpoints.origin.source import license_files
from framefusion.export.options import BuildOptions
from framefusion.export.report.inspection import (
    base_model,
    bytes_of_files,
    cache_facts,
    comparison_summary,
    licence,
    reduction_facts,
    weight_facts,
)
from framefusion.reducers import DEFAULT
from framefusion.runtime.format.manifest import Manifest, SourceRecord
from framefusion.runtime.format.manifest_file import MANIFEST

CARD = "README.md"
LIBRARY = "framefusion-aot"
TASK = "video-text-to-text"  # the hub's name for what a video LVLM does
TAGS = ("framefusion", "token-reduction", "video", "onnx")


def write_card(folder: Path, manifest: Manifest, checkpoint: Path) -> list[str]:
    """Write the card and copy the licence files of the checkpoint; returns the names of all."""
    copied = [path.name for path in license_files(checkpoint)]
    for name in copied:
        shutil.copyfile(checkpoint / name, folder / name)
    (folder / CARD).write_text(card(manifest), encoding="utf-8")
    return [CARD, *copied]


def card(manifest: Manifest) -> str:
    """The text of the card, as Markdown with YAML at its head.

    Args:
        manifest: with its source, its files (the card left out) and the result of its check.
    """
    source = _source(manifest)
    title = f"# {source.name.split('/')[-1]} with FrameFusion"
    blocks = [f"---\n{front_matter(manifest)}\n---\n\n{title}", _introduction(manifest, source)]
    sections = {
        "Made of": _origin(manifest, source),
        "Token reduction": _reduction(manifest),
        "Checked": _checked(manifest.check),
        "Limits": _limits(manifest),
        "Sizes": _sizes(manifest),
        "Run it": f"With {LIBRARY} installed, in this folder:\n\n```shell\n{_run_command(manifest)}\n```",
        "Made with": _build_facts(manifest, source),
    }
    blocks += [f"## {heading}\n\n{text}" for heading, text in sections.items()]
    return "\n\n".join(blocks) + "\n"


def front_matter(manifest: Manifest) -> str:
    """YAML for the hub. A folder has no id there, so base_model is left out."""
    from huggingface_hub import ModelCardData

    source = _source(manifest)
    data = ModelCardData(
        base_model=source.name if source.on_hub else None,
        license=source.license,
        license_name=source.license_name,
        license_link=source.license_link,
        library_name=LIBRARY,
        pipeline_tag=TASK,
        tags=[*TAGS, manifest.model.model_type],
    )
    return str(data.to_yaml())


def _source(manifest: Manifest) -> SourceRecord:
    assert manifest.source is not None  # every build writes it
    return manifest.source


def _introduction(manifest: Manifest, source: SourceRecord) -> str:
    base = f"[{source.name}](https://huggingface.co/{source.name})" if source.on_hub else f"`{source.name}`"
    return (
        f"A bundle of {LIBRARY}: {base}, exported ahead of time with FrameFusion's token reduction inside the LLM "
        f"({reduction_facts(manifest)['text']}). It runs without torch. `{MANIFEST}` says the same for programs, with "
        "size and SHA-256 of every file, this one among them."
    )


def _origin(manifest: Manifest, source: SourceRecord) -> str:
    model = manifest.model
    rows = [
        ("base model", base_model(source)),
        *([("quantized checkpoint", source.quantization)] if source.quantization else []),
        ("SHA-256 of config.json", source.config_sha256),
        ("licence", licence(source)),
        ("family", f"{model.family} ({model.model_type})"),
        ("layers, hidden size, type", f"{model.num_layers}, {model.hidden_size}, {model.dtype}"),
        *([("weights", weight_facts(manifest)["text"])] if manifest.quantization else []),
        *([("KV cache", cache_facts(manifest)["text"])] if manifest.kv_cache else []),
    ]
    return _table(("", ""), rows)


def _reduction(manifest: Manifest) -> str:
    facts = reduction_facts(manifest)
    record = manifest.reduction
    rows = [("mode", record.mode), ("cost", facts["text"].partition(", ")[2])]
    if record.mode == "adaptive":
        rows.append(("reducer", record.reducer))
    if record.mode == "adaptive" and record.reducer == DEFAULT:
        rows += [
            ("similarity bound", record.similarity_lower_bound),
            ("ratio bound", record.ratio_lower_bound),
            ("deepest layer a reduction follows", record.depth),
        ]
    if record.schedule is not None:
        shares = ", ".join(f"{share:.1%}" for share in record.schedule.merge_shares)
        rows += [
            ("merged at the first calls", shares or "nothing"),
            ("pruned", f"{record.schedule.prune_share:.1%} after layer {record.schedule.prune_layer}"),
        ]
    return _table(("", ""), rows)


def _checked(check: Mapping[str, Any]) -> str:
    if not check:
        return "**Not checked**: the build was told to leave the comparison with the eager model and transformers out."
    summary = comparison_summary(check)
    blocks = [f"**{summary}.**" if summary.startswith("NOT") else f"{summary[:1].upper()}{summary[1:]}."]
    if check.get("why"):
        blocks.append(f"The bundle itself was not run: {check['why']}.")
    if "prompt_tokens" in check:
        blocks.append(
            "In ONNX Runtime against the same model in eager torch, float32, on a drawn clip and a question "
            f"({check['prompt_tokens']} tokens). `against transformers` is the eager model against its class, but for "
            f"`dense logits`, which are the bundle's. Reference of the dense path: {check['reference']}. Errors are "
            "relative to the largest magnitude of the reference; of kept tokens those that differ are counted. "
            "Accuracy on benchmarks was not measured."
        )
    if check.get("notes"):
        blocks.append("\n".join(f"- {note}" for note in check["notes"]))
    rows = [(line["what"], f"{line['value']:.3g}", f"{line['limit']:.3g}") for line in check["lines"]]
    return "\n\n".join([*blocks, _table(("compared", "error", "limit"), rows)])


def _limits(manifest: Manifest) -> str:
    limits = manifest.limits
    sampling = manifest.sampling
    buckets = manifest.segments[0].buckets
    rows = [
        ("longest prompt", f"{limits.max_input_len} tokens"),
        ("prompt and answer", f"{limits.max_kv_cache_capacity} tokens"),
        ("frames of a film", f"at most {sampling.max_frames}, {sampling.fps:g} a second"),
        ("requests at a time", 1),
    ]
    if manifest.fixed is not None:
        rows.append(("of the prompt", f"{manifest.fixed.max_text} text, {manifest.fixed.max_visual} visual"))
    if buckets:
        rows.append(("prefills are padded to", ", ".join(map(str, buckets))))
    return _table(("", ""), rows)


def _sizes(manifest: Manifest) -> str:
    sizes = bytes_of_files(manifest.files)
    rows = [(part, size, in_bytes(size)) for part, size in sizes.items()]
    total = sum(sizes.values())
    return _table(("part", "bytes", ""), [*rows, ("total", total, in_bytes(total))])


def _run_command(manifest: Manifest) -> str:
    cost = f" --cost {manifest.reduction.cost:g}" if manifest.reduction.mode == "adaptive" else ""
    return f'ff-run generate . --video clip.mp4 --prompt "What happens in this video?"{cost}'


def _build_facts(manifest: Manifest, source: SourceRecord) -> str:
    rows = [("dialect", manifest.dialect), *manifest.tools.items()]
    return f"```shell\n{_build_command(manifest, source)}\n```\n\n{_table(('', ''), rows)}"


def _build_command(manifest: Manifest, source: SourceRecord) -> str:
    """The options of the build as `ff-export build` takes them; those with their defaults are left out."""
    arguments = ["ff-export build", source.name, "-o bundle"]
    if source.commit is not None:
        arguments.append(f"--revision {source.commit}")
    for field in fields(BuildOptions):
        value = manifest.options.get(field.name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        if value != field.default:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            arguments.append(f"--{field.name.replace('_', '-')} {text}")
    return " ".join(arguments)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
