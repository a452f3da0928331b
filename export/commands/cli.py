"""ff-export: a checkpoint to a bundle, and what there is to know about one. Builds library objects and prints reports.

torch and its kin are imported by the commands that need them, so that help, `inspect` and `families` run without.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import framefusion
from framefusion.console import messages as console
from framefusion.console.progress import CountLines, progress_lines
from framefusion.errors import BackendError, BudgetError, BundleError, CheckFailedError
from framefusion.export.commands.engines import compile_command, engine_fits, render_fits, resources, source_revision
from framefusion.export.commands.flags import (
    BUNDLE_REVISION,
    CHECKPOINT_REVISION,
    COUNT,
    ENGINE_RESOURCES,
    TOLERANCE,
    build_options,
    eval_options,
    options_of,
)
from framefusion.export.commands.signing import integrity_facts, render_integrity, sign_command
from framefusion.runtime.commands.flags import (
    COMPARE,
    OUTPUT,
    THREADS,
    TRUSTED_KEYS,
    PromptOptions,
    VisualCommand,
    question_options,
)

if TYPE_CHECKING:
    from framefusion.export.build import Built
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.options import BuildOptions
    from framefusion.runtime.pipeline import Pipeline

FOLDER = click.Path(path_type=Path)


@click.group(cls=console.CommandGroup)
@click.version_option(framefusion.__version__)
def ff_export() -> None:
    """Export a video LVLM with token reduction inside its LLM."""


ff_export.add_command(compile_command)
ff_export.add_command(sign_command)


@ff_export.command()
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=FOLDER, help="Folder of the bundle.")
@CHECKPOINT_REVISION
@build_options
@options_of(*ENGINE_RESOURCES)
@click.option("--calibrate", "clips", multiple=True, type=FOLDER, help="Film to set the fixed schedule by; repeatable.")
@click.option("--force", is_flag=True, help="Replace a bundle that exists.")
@click.option("--no-check", is_flag=True, help="Do not compare the bundle with the eager model.")
@TOLERANCE
@console.json_option
def build(
    checkpoint: str,
    output: Path,
    revision: str | None,
    clips: tuple[Path, ...],
    force: bool,
    no_check: bool,
    tolerance: float | None,
    jobs: int | None,
    engine_cache: Path | None,
    engine_cache_limit: float | None,
    **fields: Any,
) -> None:
    """Make a bundle of CHECKPOINT and check it.

    CHECKPOINT is a folder, or an id on the Hugging Face hub: ORGANISATION/MODEL. The bundle gets its name when it was
    compared with the eager model.
    """
    from framefusion.export.options import BuildOptions

    options = BuildOptions.chosen(**fields)
    limits = resources(jobs, engine_cache, engine_cache_limit)
    _check_output(output, force)  # before anything is downloaded
    source = _open(checkpoint, revision)
    with progress_lines() as progress:
        how: dict[str, Any] = {"force": force, "verify": not no_check, "tolerance": tolerance, "progress": progress}
        how["resources"] = limits
        built = _build(source, output, options, clips, **how)
    console.show(_built_report(built), _render_built)


def _open(name: str, revision: str | None) -> Checkpoint:
    """A checkpoint by folder or id; a package that is missing is told before anything is downloaded."""
    try:
        import framefusion.export.build  # noqa: F401  what the callers need
        from framefusion.export.checkpoints.checkpoint import Checkpoint
    except ImportError as error:
        raise _missing(error) from None
    return Checkpoint.named(name, revision)


def _check_output(output: Path, force: bool) -> None:
    from framefusion.export.writing.staging import check_output

    check_output(output, force=force)


def _build(source: Checkpoint, output: Path, options: BuildOptions, clips: tuple[Path, ...], **how: Any) -> Built:
    from framefusion.export.build import build as build_bundle

    if clips:
        if options.reduction != "fixed":
            raise BudgetError(f"--calibrate sets the schedule of --reduction fixed, not of {options.reduction}")
        from framefusion.export.eager.calibrate import calibrate

        options = calibrate(source, options, list(clips))
    return build_bundle(source, output, options, **how)


def _missing(error: ImportError) -> BackendError:
    return BackendError(f"{error.name or error} is not installed: pip install 'framefusion-aot[export]'")


def _built_report(built: Built) -> dict[str, Any]:
    from framefusion.export.report.inspection import bytes_by_part, reduction_facts

    manifest = built.manifest
    return {
        "bundle": str(built.folder),
        "reduction": reduction_facts(manifest),
        "bytes": bytes_by_part(built.folder, manifest),
        "check": dict(manifest.check) or None,
        "options": dict(manifest.options),
    }


def _render_built(report: dict[str, Any]) -> str:
    size = console.in_bytes(sum(report["bytes"].values()))
    check = report["check"]
    lines = [f"{report['bundle']}: {size}, reduction {report['reduction']['text']}"]
    if check is None:
        from framefusion.export.report.inspection import compared_words

        return "\n".join([*lines, f"{compared_words(None)} (--no-check)"])
    return "\n".join([*lines, _render_lines(check)])


def _render_lines(check: dict[str, Any]) -> str:
    """The comparison as a table."""
    if "words" in check:
        from framefusion.export.check.bisect.bisect import render

        return render(check)
    from framefusion.export.report.inspection import compared_words, comparison

    verdict = "passed" if check["passed"] else "FAILED"
    return f"check {verdict}, reference: {check['reference']}\n{comparison(check)}\n{compared_words(check)}"


@ff_export.command()
@click.argument("checkpoint")
@click.option("-o", "--output", type=FOLDER, default=Path("."), help="Where the bundle is to be; default: here.")
@CHECKPOINT_REVISION
@build_options
@click.option("--no-check", is_flag=True, help="Of a build that leaves the check out.")
@console.json_option
def plan(checkpoint: str, output: Path, revision: str | None, no_check: bool, **fields: Any) -> None:
    """Say what a build of CHECKPOINT would write and take.

    From configuration and headers alone. The flags are those of `build`. Nothing is written and no weight is read.
    """
    from framefusion.export.options import BuildOptions

    options = BuildOptions.chosen(**fields)
    source = _open(checkpoint, revision)
    from framefusion.export.plan.build_plan import BuildPlan
    from framefusion.export.report.forecast import forecast, render

    console.show(forecast(BuildPlan(source, options), output, verify=not no_check), render)


@ff_export.command()
@click.argument("bundle", type=FOLDER)
@click.option("--checkpoint", help="Compare with the eager model again: the folder or id that it was built from.")
@BUNDLE_REVISION
@click.option("--bisect", is_flag=True, help="Look for the node where it differs, graph by graph; with --checkpoint.")
@TRUSTED_KEYS
@console.json_option
@click.pass_context
def check(
    ctx: click.Context,
    bundle: Path,
    checkpoint: str | None,
    revision: str | None,
    bisect: bool,
    trusted_keys: Path | None,
) -> None:
    """Verify the files of BUNDLE, all of them hashed afresh, and say of each engine whether it fits this machine."""
    from framefusion.runtime.backends.fit import other_files
    from framefusion.runtime.format.bundle_files import verify_files
    from framefusion.runtime.format.manifest_file import read_manifest
    from framefusion.runtime.trust.origin import Trust

    if bisect and checkpoint is None:
        raise click.UsageError("--bisect compares with the eager model: say with --checkpoint which one")
    trust = Trust.of(trusted_keys)
    manifest = read_manifest(bundle)
    others = other_files(manifest)
    verify_files(bundle, others, trust_stamps=False)
    integrity = integrity_facts(bundle, trust.keys)
    engines = engine_fits(bundle, manifest)
    right = [manifest.files[row["engine"]["file"]] for row in engines if not row["damaged"]] + list(others.values())
    files = {"count": len(right), "bytes": sum(record.size for record in right)}
    revision = None if checkpoint is None else source_revision(manifest, checkpoint, revision)
    comparison = None if checkpoint is None else _compare(bundle, checkpoint, revision, bisect)
    report: dict[str, Any] = {"bundle": str(bundle), "files": files, "integrity": integrity, "engines": engines}
    report |= {"comparison": comparison, "when_built": dict(manifest.check) or None}
    console.show(report, _render_check)
    trust.require_signature(bundle, integrity["digest"])
    if comparison is not None and not comparison["passed"]:
        console.log(f"error: {bundle} does not reproduce the eager model of {checkpoint}: rebuild it")
        ctx.exit(CheckFailedError.exit_code)
    unfit = [row for row in engines if not row["fits"]]
    if unfit:
        console.log(f"error: {len(unfit)} of {len(engines)} engines cannot run here: see above what mends it")
        ctx.exit((BundleError if any(row["damaged"] for row in unfit) else BackendError).exit_code)


def _compare(bundle: Path, checkpoint: str, revision: str | None, bisect: bool) -> dict[str, Any]:
    source = _open(checkpoint, revision)
    if bisect:
        from framefusion.export.check.bisect.bisect import bisect_bundle

        return bisect_bundle(bundle, source)
    from framefusion.export.build import check_again

    return check_again(bundle, source)


def _render_check(report: dict[str, Any]) -> str:
    files = report["files"]
    text = f"{report['bundle']}: {files['count']} files, {console.in_bytes(files['bytes'])}, sizes and hashes are right"
    lines = [text, *render_integrity(report["integrity"]), *render_fits(report["engines"])]
    if report["comparison"] is not None:
        return "\n".join([*lines, _render_lines(report["comparison"])])
    from framefusion.export.report.inspection import compared_words

    built = compared_words(report["when_built"])
    return "\n".join([*lines, f"files only: NOTHING was compared now (--checkpoint does); when it was built: {built}"])


@ff_export.command()
@click.argument("bundle", type=FOLDER)
@click.option("--input-len", type=COUNT, help="Tokens of the prompt; default: the longest that fits.")
@click.option("--visual-len", type=click.IntRange(min=0), help="Visual tokens among them; default: all but 64.")
@click.option("--max-new-tokens", type=COUNT, default=128, show_default=True, help="Of the answer.")
@click.option("--cost", type=float, help="Kept share for the expected lengths; default: the bundle's.")
@console.json_option
def inspect(bundle: Path, **question: Any) -> None:
    """Say what is in BUNDLE and what memory it takes."""
    from framefusion.export.report.inspection import PromptSize, render, report

    console.show(report(bundle, PromptSize(**question)), render)


@ff_export.command(cls=VisualCommand)
@click.argument("model", metavar="BUNDLE|CHECKPOINT")
@CHECKPOINT_REVISION
@OUTPUT
@COMPARE
@question_options
@THREADS
@console.json_option
def view(model: str, revision: str | None, output: Path, compare: bool, threads: int, **asked: Any) -> None:
    """Answer a question and draw what became of each token: one HTML page.

    A bundle runs as `ff-run view` runs it; a checkpoint runs in eager torch, in fp32, and nothing is built.
    """
    from framefusion.runtime.bundle import Bundle
    from framefusion.runtime.commands.cli import show_page
    from framefusion.runtime.format.manifest_file import MANIFEST
    from framefusion.runtime.pipeline import Pipeline

    question = PromptOptions.from_flags(**asked)
    if (Path(model) / MANIFEST).is_file():
        show_page(Pipeline(Bundle(model), threads=threads), Path(model).resolve().name, question, output, compare)
        return
    source = _open(model, revision)
    with tempfile.TemporaryDirectory() as folder:
        show_page(_uncompiled(source, Path(folder) / "parts", threads), source.origin.name, question, output, compare)


def _uncompiled(source: Checkpoint, folder: Path, threads: int) -> Pipeline:
    import torch

    from framefusion.export.eager.pipeline import eager_pipeline
    from framefusion.export.options import BuildOptions
    from framefusion.export.plan.build_plan import BuildPlan

    if threads:
        torch.set_num_threads(threads)
    return eager_pipeline(BuildPlan(source, BuildOptions()), folder)


@ff_export.command("eval")
@click.argument("model", metavar="BUNDLE|CHECKPOINT")
@CHECKPOINT_REVISION
@eval_options
@THREADS
@console.json_option
def evaluate(
    model: str,
    questions: Path,
    reducer: tuple[str, ...] | None,
    cost: tuple[float, ...] | None,
    output: Path | None,
    limit: int | None,
    jobs: int,
    **setup: Any,
) -> None:
    """Answer a file of questions under every reducer and cost, and report accuracy with intervals.

    A bundle answers as `ff-run generate` does; a checkpoint live, reduced in eager torch, in fp32, and nothing is
    built. Decoding is greedy.
    """
    try:
        from framefusion.export.evaluate.answering import Setup, default_condition
        from framefusion.export.evaluate.evaluation import conditions, render
        from framefusion.export.evaluate.evaluation import evaluate as run
        from framefusion.export.evaluate.questions import read_questions
    except ImportError as error:
        raise _missing(error) from None

    question_list = read_questions(questions, limit)
    opened = Setup(model, **setup)
    if not opened.is_bundle:
        _open(model, opened.revision)
    default = default_condition(opened)
    under = conditions(reducer or (default.reducer,), cost or (1.0, default.cost))
    report = run(opened, question_list, under, output=output, jobs=jobs, on_progress=CountLines("questions"))
    console.show({"file": str(questions)} | report, render)


@ff_export.command()
@console.json_option
def families() -> None:
    """List the model families, and what each was verified against."""
    from framefusion.export.families import FAMILIES

    names = ("name", "architectures", "llm_architectures", "model_types", "checkpoints", "verified", "reference")
    names += ("stand_in",)  # type: ignore[assignment]
    rows = [{name: getattr(family, name) for name in names} for family in FAMILIES]
    console.show({"families": rows}, _render_families)


def _render_families(report: dict[str, Any]) -> str:
    blocks = ["A checkpoint belongs to the family that its config.json names by architecture."]
    for row in report["families"]:
        within = f" with {' or '.join(row['llm_architectures'])} within" if row["llm_architectures"] else ""
        facts = {
            "family": row["name"],
            "architecture": ", ".join(row["architectures"]) + within,
            "declared for": ", ".join(row["checkpoints"]),
            "verified against": row["verified"],
            "a build compares": f"with {row['reference'] or 'eager torch alone'}",
            "not by transformers": row["stand_in"] or "nothing",
        }
        blocks.append(console.labelled(facts))
    return "\n\n".join(blocks)


def main() -> None:
    """Entry point."""
    ff_export(prog_name="ff-export")
