"""The part of ff-export that is about engines: `compile`, and what `check` and `build` say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from framefusion.console import messages as console
from framefusion.console.progress import in_time, progress_lines
from framefusion.export.commands.flags import BACKEND, BUNDLE_REVISION, ENGINE_RESOURCES, TARGETS, options_of

if TYPE_CHECKING:
    from framefusion.export.options import Resources
    from framefusion.export.plan.build_plan import BuildPlan
    from framefusion.runtime.format.manifest import Manifest

GIGA = 10**9


@click.command(name="compile")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", help="What BUNDLE was built from, by folder or id; inductor traces it again.")
@BUNDLE_REVISION
@options_of(BACKEND, *TARGETS, *ENGINE_RESOURCES)
@console.json_option
def compile_command(bundle: Path, checkpoint: str | None, revision: str | None, **fields: Any) -> None:
    """Compile the graphs of BUNDLE to engines, and add them to it.

    For TensorRT and TensorRT-RTX a bundle of the portable dialect, in float16 or bfloat16. Engines that were compiled
    before come from the cache. TensorRT-RTX compiles without a GPU, for all targets at once.
    """
    from framefusion.export.engines.compile import compile_bundle
    from framefusion.export.options import BuildOptions
    from framefusion.runtime.backends.table import engine_kinds

    limits = {name: fields.pop(name) for name in ("jobs", "engine_cache", "engine_cache_limit")}
    options = BuildOptions.chosen(**fields).engines
    if options is None:
        *names, last = engine_kinds()
        raise click.UsageError(f"say which engines: --backend {', '.join(names)} or {last}")
    plan = None if checkpoint is None else _plan(bundle, checkpoint, revision)
    with progress_lines() as progress:
        made = compile_bundle(bundle, options, resources(**limits), progress, plan)
    console.show({"bundle": str(bundle)} | dict(made.report), render_report)


def _plan(bundle: Path, checkpoint: str, revision: str | None) -> BuildPlan:
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.plan.build_plan import replan
    from framefusion.runtime.format.manifest_file import read_manifest

    manifest = read_manifest(bundle)
    return replan(bundle, manifest, Checkpoint.named(checkpoint, source_revision(manifest, checkpoint, revision)))


def source_revision(manifest: Manifest, checkpoint: str, revision: str | None) -> str | None:
    """The commit that a bundle was built from, where its own checkpoint is named and no other revision."""
    source = manifest.source
    if revision is None and source is not None and checkpoint == source.name and not Path(checkpoint).is_dir():
        return source.commit
    return revision


def resources(jobs: int | None, engine_cache: Path | None, engine_cache_limit: float | None) -> Resources:
    """The flags of ENGINE_RESOURCES as the library takes them."""
    from framefusion.export.options import CACHE_LIMIT, Resources

    limit = CACHE_LIMIT if engine_cache_limit is None else int(engine_cache_limit * GIGA)
    return Resources(jobs, engine_cache, limit)


def render_report(report: Mapping[str, Any]) -> str:
    """What was compiled, as a table."""
    engines = report["engines"]
    rows = [
        (row["file"], console.in_bytes(row["bytes"]), "-" if row["cache"] == "hit" else row["seconds"], row["cache"])
        for row in engines
    ]
    size = sum(row["bytes"] for row in engines)
    targets = ", ".join(report["targets"])
    head = (
        f"{report['bundle']}: {len(engines)} engines of {report['library']} {report['version']} for {targets}, "
        f"{console.in_bytes(size)}, in {in_time(report['seconds'])}"
    )
    return "\n".join([head, *report["notes"], console.table(("engine", "size", "seconds", "cache"), rows)])


def engine_fits(bundle: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """For each engine whether it fits this machine; every engine is hashed."""
    from framefusion.runtime.backends.fit import examine
    from framefusion.runtime.machine.gpu import find_gpu

    rows = []
    for fit in examine(bundle, manifest, gpu=find_gpu(), hashes=True):
        told = asdict(fit)
        told["engine"] = {name: told["engine"][name] for name in ("kind", "graph", "file", "version", "targets")}
        rows.append(told | {"fits": fit.fits, "text": fit.text})
    return rows


def render_fits(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each answer; engines that have the same share it."""
    files: dict[str, list[str]] = {}
    for row in rows:
        files.setdefault(row["text"], []).append(row["engine"]["file"])
    return [
        f"{names[0] if len(names) == 1 else f'{len(names)} engines, {names[0]} ...'}: {text}"
        for text, names in files.items()
    ]
