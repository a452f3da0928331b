"""ff-export: a checkpoint to a bundle, and what there is to know about one. Builds library objects and prints reports.

torch and its kin are imported by the commands that need them, so that help, `inspect` and `families` run without.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click

import framefusion
from framefusion import console
from framefusion.errors import BackendError, BudgetError, CheckFailedError

if TYPE_CHECKING:
    from framefusion.export.build import Built
    from framefusion.export.options import BuildOptions

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic only since click 8.2

Number = TypeVar("Number", int, float)
FOLDER = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)


class CommaList(ParamType, Generic[Number]):
    """Numbers with commas between them."""

    def __init__(self, kind: type[Number]) -> None:
        self.kind: type[Number] = kind
        self.name = f"{kind.__name__},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Number, ...]:
        """Read "0.4,0.1"."""
        try:
            return value if isinstance(value, tuple) else tuple(map(self.kind, value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is no list of {self.kind.__name__} with commas between them", param, ctx)


# One option for each field of BuildOptions; what is not given keeps that class's default.
BUILD_OPTIONS = (
    click.option("--reduction", type=click.Choice(("none", "fixed", "adaptive")), help="Where tokens are dropped."),
    click.option("--cost", type=float, help="Share of the computation over visual tokens that is kept, in (0, 1]."),
    click.option("--similarity-lower-bound", type=float, help="Tokens at least this alike merge (adaptive)."),
    click.option("--ratio-lower-bound", type=float, help="Merging ends when a smaller share merges (adaptive)."),
    click.option("--depth", type=click.IntRange(min=0), help="Deepest layer a reduction may follow (adaptive)."),
    click.option("--merge-shares", type=CommaList(float), help="Share merged at calls 0, 1, ... (fixed)."),
    click.option("--prune-layer", type=click.IntRange(min=0), help="Layer the prune follows (fixed)."),
    click.option("--dialect", help="How the graphs say attention: gqa (ONNX Runtime) or portable."),
    click.option("--buckets", type=CommaList(int), help="Sizes of a prefill; the gqa dialect needs none."),
    click.option("--max-input-len", type=COUNT, help="Longest prompt in tokens."),
    click.option("--max-kv-cache-capacity", type=COUNT, help="Longest prompt and answer together."),
    click.option("--max-text-len", type=COUNT, help="Longest text of a prompt (fixed)."),
    click.option("--dtype", type=click.Choice(("float32",)), help="Of the weights in the bundle."),
    click.option("--num-decoder-layer", type=COUNT, help="Take only the first layers, for a smoke test."),
    click.option("--fps", type=click.FloatRange(min=0, min_open=True), help="Frames sampled from a second of film."),
    click.option("--max-frames", type=COUNT, help="Most frames sampled."),
    click.option("--min-pixels", type=COUNT, help="Smallest frame."),
    click.option("--max-pixels", type=COUNT, help="Largest frame."),
)


@click.group(cls=console.CommandGroup)
@click.version_option(framefusion.__version__)
def ff_export() -> None:
    """Export a video LVLM with token reduction inside its LLM."""


def _with_build_options(command: Any) -> Any:
    for option in reversed(BUILD_OPTIONS):
        command = option(command)
    return command


@ff_export.command()
@click.argument("checkpoint", type=FOLDER)
@click.option("-o", "--output", required=True, type=FOLDER, help="Folder of the bundle.")
@_with_build_options
@click.option("--calibrate", "clips", multiple=True, type=FOLDER, help="Film to set the fixed schedule by; repeatable.")
@click.option("--force", is_flag=True, help="Replace a bundle that exists.")
@click.option("--no-check", is_flag=True, help="Do not compare the bundle with the eager model.")
@console.json_option
def build(checkpoint: Path, output: Path, clips: tuple[Path, ...], force: bool, no_check: bool, **fields: Any) -> None:
    """Make a bundle of the folder CHECKPOINT and check it against the eager model."""
    from framefusion.export.options import BuildOptions

    options = BuildOptions(**{name: value for name, value in fields.items() if value is not None})
    with console.progress_by_part() as progress:
        built = _build(checkpoint, output, options, clips, force=force, verify=not no_check, progress=progress)
    console.show(_built_report(built), _render_built)


def _build(checkpoint: Path, output: Path, options: BuildOptions, clips: tuple[Path, ...], **how: Any) -> Built:
    try:
        from framefusion.export.build import build as build_bundle
        from framefusion.export.checkpoint import Checkpoint
    except ImportError as error:
        raise _missing(error) from None
    source = Checkpoint(checkpoint)
    if clips:
        if options.reduction != "fixed":
            raise BudgetError(f"--calibrate sets the schedule of --reduction fixed, not of {options.reduction}")
        from framefusion.export.calibrate import calibrate

        options = calibrate(source, options, list(clips))
    return build_bundle(source, output, options, **how)


def _missing(error: ImportError) -> BackendError:
    return BackendError(f"{error.name or error} is not installed: pip install 'framefusion-aot[export]'")


def _built_report(built: Built) -> dict[str, Any]:
    from framefusion.export.inspection import bytes_by_part, reduction_facts

    manifest = built.manifest
    return {
        "bundle": str(built.folder),
        "reduction": reduction_facts(manifest),
        "bytes": bytes_by_part(built.folder, manifest),
        "check": dict(manifest.check) or None,
        "options": dict(manifest.options),
    }


def _render_built(report: dict[str, Any]) -> str:
    size, check = console.in_bytes(sum(report["bytes"].values())), report["check"]
    lines = [f"{report['bundle']}: {size}, reduction {report['reduction']['text']}"]
    if check is None:
        return "\n".join([*lines, "not checked against the eager model (--no-check)"])
    return "\n".join([*lines, _render_lines(check)])


def _render_lines(check: dict[str, Any]) -> str:
    """The comparison as a table."""
    rows = [(line["what"], f"{line['value']:.3g}", f"{line['limit']:.3g}") for line in check["lines"]]
    verdict = "passed" if check["passed"] else "FAILED"
    return f"check {verdict}, reference: {check['reference']}\n" + console.table(("compared", "error", "limit"), rows)


@ff_export.command()
@click.argument("bundle", type=FOLDER)
@click.option("--checkpoint", type=FOLDER, help="Compare with the eager model again; the folder it was built from.")
@console.json_option
@click.pass_context
def check(ctx: click.Context, bundle: Path, checkpoint: Path | None) -> None:
    """Verify the files of BUNDLE, all of them hashed afresh."""
    from framefusion.runtime.bundle import read_manifest, verify_files

    manifest = read_manifest(bundle)
    verify_files(bundle, manifest.files, trust_stamps=False)
    size = sum(record.size for record in manifest.files.values())
    files = {"count": len(manifest.files), "bytes": size}
    comparison = None if checkpoint is None else _compare(bundle, checkpoint)
    console.show({"bundle": str(bundle), "files": files, "comparison": comparison}, _render_check)
    if comparison is not None and not comparison["passed"]:
        console.log(f"error: {bundle} does not reproduce the eager model of {checkpoint}: rebuild it")
        ctx.exit(CheckFailedError.exit_code)


def _compare(bundle: Path, checkpoint: Path) -> dict[str, Any]:
    try:
        from framefusion.export.check import check_again
        from framefusion.export.checkpoint import Checkpoint
    except ImportError as error:
        raise _missing(error) from None
    return check_again(bundle, Checkpoint(checkpoint))


def _render_check(report: dict[str, Any]) -> str:
    files = report["files"]
    text = f"{report['bundle']}: {files['count']} files, {console.in_bytes(files['bytes'])}, sizes and hashes are right"
    return text if report["comparison"] is None else f"{text}\n{_render_lines(report['comparison'])}"


@ff_export.command()
@click.argument("bundle", type=FOLDER)
@click.option("--input-len", type=COUNT, help="Tokens of the prompt; default: the longest that fits.")
@click.option("--visual-len", type=click.IntRange(min=0), help="Visual tokens among them; default: all but 64.")
@click.option("--max-new-tokens", type=COUNT, default=128, show_default=True, help="Of the answer.")
@click.option("--cost", type=float, help="Kept share for the expected lengths; default: the bundle's.")
@console.json_option
def inspect(bundle: Path, **question: Any) -> None:
    """Say what is in BUNDLE and what memory it takes."""
    from framefusion.export.inspection import Question, render, report

    console.show(report(bundle, Question(**question)), render)


@ff_export.command()
@console.json_option
def families() -> None:
    """List the model families that can be exported."""
    from framefusion.export.families import FAMILIES

    names = ("name", "model_types", "checkpoints", "verified")
    rows = [{name: getattr(family, name) for name in names} for family in FAMILIES]
    console.show({"families": rows}, _render_families)


def _render_families(report: dict[str, Any]) -> str:
    rows = [
        (row["name"], ", ".join(row["model_types"]), ", ".join(row["checkpoints"]), row["verified"])
        for row in report["families"]
    ]
    return console.table(("name", "model_types", "checkpoints", "verified"), rows)


def main() -> None:
    """Entry point."""
    ff_export(prog_name="ff-export")
