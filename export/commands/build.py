"""The commands that make something: `build` a bundle, `plan` one, `compile` the engines of one.

Builds library objects of the flags and prints reports. torch is imported by what runs, never for a help text.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from framefusion.console import messages as console
from framefusion.console.help import Command, option, sectioned
from framefusion.console.layout import counted
from framefusion.console.progress import in_time, progress_lines
from framefusion.console.terminal import activity
from framefusion.errors import BackendError, BudgetError
from framefusion.export.commands.flags import (
    ACCEPTANCE,
    BUNDLE_REVISION,
    CHECKPOINT_REVISION,
    ENGINE_KIND,
    ENGINE_RESOURCES,
    FOLDER,
    GIGA,
    IN_CHECK,
    IN_ENGINES,
    IN_REDUCTION,
    TARGETS,
    TOLERANCE,
    build_options,
    options_of,
)
from framefusion.installation import install_command

LOADING = "loading torch"
CALIBRATE = option(
    "--calibrate",
    "clips",
    multiple=True,
    type=FOLDER,
    section=IN_REDUCTION,
    help="Film, or file of questions about films, whose tokens set the schedule (fixed), whose activations choose the "
    "codes of --weights int8 and int4, and that the scales of --kv-cache-dtype int8 are measured on; repeatable; "
    "default: no film, or drawn clips.",
)

if TYPE_CHECKING:
    from framefusion.export.build import Built
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.evaluate.acceptance.loss import Acceptance
    from framefusion.export.options import BuildOptions, Resources
    from framefusion.export.plan.build_plan import BuildPlan
    from framefusion.export.quantization.code_store import CodeStore
    from framefusion.runtime.format.manifest import Manifest

# --- build ------------------------------------------------------------------------------------------------------------


@click.command(
    name="build",
    cls=Command,
    examples=(
        "ff-export build path/to/Qwen2-VL-2B-Instruct -o bundle",
        "ff-export build Qwen/Qwen2-VL-2B-Instruct -o bundle --dtype float16",
    ),
)
@click.argument("checkpoint")
@option("--output", "-o", required=True, type=FOLDER, section="Output", help="Folder that the bundle gets.")
@option("--force", is_flag=True, section="Output", help="Replace a bundle that is there.")
@console.json_option
@CHECKPOINT_REVISION
@build_options
@options_of(*sectioned(IN_ENGINES, *ENGINE_RESOURCES))
@CALIBRATE
@option("--no-check", is_flag=True, section=IN_CHECK, help="Do not compare the bundle with the eager model.")
@options_of(*sectioned(IN_CHECK, TOLERANCE, *ACCEPTANCE))
def build_command(
    checkpoint: str,
    output: Path,
    revision: str | None,
    clips: tuple[Path, ...],
    force: bool,
    no_check: bool,
    tolerance: float | None,
    questions: Path | None,
    max_points_lost: float | None,
    jobs: int | None,
    engine_cache: Path | None,
    engine_cache_limit: float | None,
    **fields: Any,
) -> None:
    """Make a bundle of CHECKPOINT, and check it number by number.

    CHECKPOINT is a folder, or an id on the Hugging Face hub: ORGANISATION/MODEL. The bundle gets its name when it was
    compared with the eager model.
    """
    from framefusion.export.options import BuildOptions

    options = BuildOptions.chosen(**fields)
    limits = _resources(jobs, engine_cache, engine_cache_limit)
    accepted = _acceptance(questions, max_points_lost)
    _check_output(output, force)  # before anything is downloaded
    source = open_checkpoint(checkpoint, revision)
    options = _calibrated(source, options, clips)
    with _codes(source, options, clips, output) as (options, chosen), progress_lines() as progress:
        settings: dict[str, Any] = {"force": force, "verify": not no_check, "tolerance": tolerance, "resources": limits}
        settings |= {"films": _films(clips) if options.kv_cache_dtype else (), "codes": chosen}
        built = _build(source, output, options, progress=progress, acceptance=accepted, **settings)
    console.show(_built_report(built), _render_built)
    if accepted is not None:
        from framefusion.export.evaluate.acceptance.loss import doubt

        codes = built.manifest.quantization or built.manifest.kv_cache
        if codes is not None and (sentence := doubt(codes.losses, accepted.points)):
            console.log(sentence)
    if not console.wants_json():
        console.log(_next_command(built))


def _acceptance(questions: Path | None, points: float | None) -> Acceptance | None:
    """What quantized weights may cost in answers; the file is read before anything is downloaded."""
    if (questions is None) != (points is None):
        raise BudgetError("--questions and --max-points-lost belong together: give both, or none")
    if questions is None or points is None:
        return None
    from framefusion.export.evaluate.acceptance.loss import Acceptance
    from framefusion.export.evaluate.questions import read_questions

    return Acceptance(tuple(read_questions(questions, None)), points)


def _check_output(output: Path, force: bool) -> None:
    from framefusion.export.writing.staging import check_output

    check_output(output, force=force)


def _calibrated(source: Checkpoint, options: BuildOptions, clips: tuple[Path, ...]) -> BuildOptions:
    """The options with the schedule that suits the clips, if there are any."""
    if not clips:
        return options
    from framefusion.export.report.calibration import SCHEDULE, planned_options, purposes

    if SCHEDULE not in purposes(options):
        return options
    from framefusion.export.eager.calibrate import calibrate
    from framefusion.export.eager.calibration.prompts import films_of
    from framefusion.export.plan.build_plan import BuildPlan

    films = films_of(clips, "a schedule is set")
    if options.kv_cache_dtype is not None:  # which no schedule goes with: the plan says why, before films are run
        BuildPlan(source, planned_options(options, clips))
    with activity(f"running {counted(len(films), 'film')} to set the schedule by", logged=True):
        return calibrate(source, options, list(films))


def _films(clips: tuple[Path, ...]) -> tuple[Path, ...]:
    """The films that scales are measured on."""
    if not clips:
        return ()
    from framefusion.export.eager.calibration.prompts import films_of

    return films_of(clips, "scales are measured")


def _chooses_codes(options: BuildOptions) -> bool:
    from framefusion.export.plan.weight_plan import parse_weights
    from framefusion.export.quantization.blocks import BlockFormat

    return isinstance(parse_weights(options.weights), BlockFormat)


@contextmanager
def _codes(
    source: Checkpoint, options: BuildOptions, clips: tuple[Path, ...], output: Path
) -> Iterator[tuple[BuildOptions, CodeStore | None]]:
    """The options with the films' digests, and the codes that they chose, which lie beside the output meanwhile."""
    if not clips or not _chooses_codes(options):
        yield options, None
        return
    from framefusion.export.eager.calibration.codes import calibrated_codes, folder_of_codes
    from framefusion.export.eager.calibration.prompts import read_prompts

    prompts = read_prompts(clips)
    with folder_of_codes(output) as folder:
        what = f"choosing codes by {counted(len(prompts), 'prompt')}"
        with activity(what, logged=True) as now:
            named, codes = calibrated_codes(source, options, prompts, folder, lambda part: now.say(f"{what}: {part}"))
        yield named, codes


def _build(source: Checkpoint, output: Path, options: BuildOptions, **settings: Any) -> Built:
    from framefusion.export.build import build as build_bundle

    return build_bundle(source, output, options, **settings)


def _built_report(built: Built) -> dict[str, Any]:
    from framefusion.export.report.inspection import bytes_by_part, cache_facts, reduction_facts, weight_facts

    manifest = built.manifest
    source = manifest.source
    return {
        "bundle": str(built.folder),
        "quantized_checkpoint": None if source is None else source.quantization,
        "weights": weight_facts(manifest),
        "kv_cache": cache_facts(manifest),
        "reduction": reduction_facts(manifest),
        "bytes": bytes_by_part(built.folder, manifest),
        "check": dict(manifest.check) or None,
        "options": dict(manifest.options),
    }


def _render_built(report: dict[str, Any]) -> str:
    size = console.in_bytes(sum(report["bytes"].values()))
    check = report["check"]
    lines = [f"{report['bundle']}: {size}, reduction {report['reduction']['text']}"]
    if report["quantized_checkpoint"]:
        lines.append(f"quantized checkpoint: {report['quantized_checkpoint']}")
    if report["weights"]["quantization"] is not None:
        lines.append(f"weights: {report['weights']['text']}")
    if report["kv_cache"]["quantization"] is not None:
        lines.append(f"KV cache: {report['kv_cache']['text']}")
    from framefusion.export.report.inspection import comparison_summary, render_comparison

    compared = f"{comparison_summary(None)} (--no-check)" if check is None else render_comparison(check)
    return "\n".join([*lines, compared])


def _next_command(built: Built) -> str:
    """A line with what to type next, to be copied as it is; clip.mp4 stands for a film of the user."""
    folder = str(built.folder)
    safe = f"./{folder}" if folder.startswith("-") else folder
    manifest = built.manifest
    elsewhere = manifest.model.dtype == "bfloat16" or manifest.options.get("engines_only")
    where = ", where its engines run" if elsewhere else ""
    return f"next{where}: ff-run generate {shlex.quote(safe)} --video clip.mp4 --prompt 'What happens?'"


# --- plan -------------------------------------------------------------------------------------------------------------


@click.command(name="plan", cls=Command, examples=("ff-export plan path/to/Qwen2-VL-7B-Instruct -o /data/bundle",))
@click.argument("checkpoint")
@option(
    "--output", "-o", type=FOLDER, default=Path("."), section="Output", help="Where the bundle is to be; default: here."
)
@console.json_option
@CHECKPOINT_REVISION
@build_options
@CALIBRATE
@option("--no-check", is_flag=True, section=IN_CHECK, help="Plan a build that leaves the check out.")
def plan_command(
    checkpoint: str, output: Path, revision: str | None, clips: tuple[Path, ...], no_check: bool, **fields: Any
) -> None:
    """Say what a build of CHECKPOINT would write and take.

    From configuration and headers alone, and the films of --calibrate. The flags are those of `build`. Nothing is
    written and no weight is read.
    """
    from framefusion.export.options import BuildOptions

    options = BuildOptions.chosen(**fields)
    source = open_checkpoint(checkpoint, revision)
    from framefusion.export.plan.build_plan import BuildPlan
    from framefusion.export.report.calibration import planned_options
    from framefusion.export.report.forecast import forecast, render

    plan = BuildPlan(source, planned_options(options, clips))
    console.show(forecast(plan, output, verify=not no_check, calibration=clips), render)


# --- compile ----------------------------------------------------------------------------------------------------------


@click.command(
    name="compile",
    cls=Command,
    examples=("ff-export compile bundle --backend tensorrt-rtx --target-sm 86,89,120",),
)
@click.argument("bundle", type=FOLDER)
@option(
    "--checkpoint",
    help="Folder or id that BUNDLE was built from, which inductor traces again; default: none, others need no such.",
)
@BUNDLE_REVISION
@options_of(*sectioned(IN_ENGINES, ENGINE_KIND, *TARGETS, *ENGINE_RESOURCES))
@console.json_option
def compile_command(bundle: Path, checkpoint: str | None, revision: str | None, **fields: Any) -> None:
    """Compile the graphs of BUNDLE to engines, and add them to it.

    For TensorRT and TensorRT-RTX a bundle of the portable dialect, in float16 or bfloat16. Engines that were compiled
    before come from the cache. TensorRT-RTX compiles without a GPU, for all targets at once.
    """
    from framefusion.export.options import BuildOptions
    from framefusion.runtime.backends.table import engine_kinds

    limits = {name: fields.pop(name) for name in ("jobs", "engine_cache", "engine_cache_limit")}
    options = BuildOptions.chosen(**fields).engines
    if options is None:
        *names, last = engine_kinds()
        raise click.UsageError(f"say which engines: --backend {', '.join(names)} or {last}")
    with activity(LOADING):
        from framefusion.export.engines.compile import compile_bundle
    plan = None if checkpoint is None else _plan(bundle, checkpoint, revision)
    with progress_lines(first="reading the graphs") as progress:
        compiled = compile_bundle(bundle, options, _resources(**limits), progress, plan)
    console.show({"bundle": str(bundle)} | dict(compiled.report), _render_compiled)


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


def _resources(jobs: int | None, engine_cache: Path | None, engine_cache_limit: float | None) -> Resources:
    """The flags of ENGINE_RESOURCES as the library takes them."""
    from framefusion.export.options import CACHE_LIMIT, Resources

    limit = CACHE_LIMIT if engine_cache_limit is None else int(engine_cache_limit * GIGA)
    return Resources(jobs, engine_cache, limit)


def _render_compiled(report: Mapping[str, Any]) -> str:
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


# --- Checkpoints of a command -----------------------------------------------------------------------------------------


def open_checkpoint(name: str, revision: str | None) -> Checkpoint:
    """A checkpoint by folder or id.

    Raises:
        BackendError: a package that a build needs is missing; this comes before anything is downloaded.
        CheckpointError: see `Checkpoint.named`.
    """
    try:
        with activity(LOADING):
            import framefusion.export.build  # noqa: F401  what the callers need
            from framefusion.export.checkpoints.checkpoint import Checkpoint
    except ImportError as error:
        raise missing_package(error) from None
    return Checkpoint.named(name, revision)


def missing_package(error: ImportError) -> BackendError:
    """The error for a package that the extra `export` brings, or for what this system's Python is made without."""
    if error.name in sys.stdlib_module_names:  # fcntl and resource, on Windows
        return BackendError(
            f"this system's Python has no module {error.name}, which the toolchain needs: "
            "build on Linux, or on Windows in WSL"
        )
    return BackendError(f"{error.name or error} is not installed: {install_command('export')}")
