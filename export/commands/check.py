"""The commands about whether a bundle is what it says: `check` it, `sign` it, give its graphs `inputs` elsewhere.

Builds library objects of the flags and prints reports. torch is imported by a comparison alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from framefusion.console import messages as console
from framefusion.console.help import Command, option
from framefusion.console.terminal import PATIENCE, activity
from framefusion.errors import BackendError, BundleError, CheckFailedError
from framefusion.export.commands.build import open_checkpoint, source_revision
from framefusion.export.commands.flags import BUNDLE_REVISION, FILE, FOLDER
from framefusion.runtime.commands.flags import TRUSTED_KEYS

if TYPE_CHECKING:
    from framefusion.runtime.format.manifest import Manifest

# --- check ----------------------------------------------------------------------------------------------------------


@click.command(
    name="check",
    cls=Command,
    examples=("ff-export check bundle", "ff-export check bundle --checkpoint path/to/Qwen2-VL-2B-Instruct"),
)
@click.argument("bundle", type=FOLDER)
@option(
    "--checkpoint",
    help="Compare with the eager model of this folder or id, which BUNDLE was built from; default: no comparison.",
)
@BUNDLE_REVISION
@option("--bisect", is_flag=True, help="Look for the node where it differs, graph by graph; with --checkpoint.")
@TRUSTED_KEYS
@console.json_option
@click.pass_context
def check_command(
    ctx: click.Context,
    bundle: Path,
    checkpoint: str | None,
    revision: str | None,
    bisect: bool,
    trusted_keys: Path | None,
) -> None:
    """Verify every file of BUNDLE, and say of each engine whether it fits this machine.

    All files are hashed afresh. With --checkpoint the bundle runs beside the eager model, too.
    """
    from framefusion.export.report.integrity import integrity_facts
    from framefusion.runtime.backends.fit import other_files
    from framefusion.runtime.format.bundle_files import verify_files
    from framefusion.runtime.format.manifest_file import read_manifest
    from framefusion.runtime.trust.origin import Trust

    if bisect and checkpoint is None:
        raise click.UsageError("--bisect compares with the eager model: say with --checkpoint which one")
    trust = Trust.of(trusted_keys)
    manifest = read_manifest(bundle)
    # 1. A damaged engine is one answer among others below; any other damaged file ends the command here.
    others = other_files(manifest)
    with activity(f"hashing the files of {bundle}", after=PATIENCE):
        verify_files(bundle, others, trust_stamps=False)
        integrity = integrity_facts(bundle, trust.keys)
        engines = _engine_fits(bundle, manifest)
    intact = [manifest.files[row["engine"]["file"]] for row in engines if not row["damaged"]] + list(others.values())
    files = {"count": len(intact), "bytes": sum(record.size for record in intact)}
    # 2. The comparison runs a model: only with --checkpoint.
    revision = None if checkpoint is None else source_revision(manifest, checkpoint, revision)
    comparison = None if checkpoint is None else _compare(bundle, checkpoint, revision, bisect)
    report: dict[str, Any] = {"bundle": str(bundle), "files": files, "integrity": integrity, "engines": engines}
    report |= {"comparison": comparison, "when_built": dict(manifest.check) or None}
    console.show(report, _render_check)
    # 3. Exit codes come behind the report, which says what each of them means.
    trust.require_signature(bundle, integrity["digest"])
    if comparison is not None and not comparison["passed"]:
        console.log(f"error: {bundle} does not reproduce the eager model of {checkpoint}: rebuild it")
        ctx.exit(CheckFailedError.exit_code)
    unfit = [row for row in engines if not row["fits"]]
    if unfit:
        console.log(f"error: {len(unfit)} of {len(engines)} engines cannot run here: see above what mends it")
        ctx.exit((BundleError if any(row["damaged"] for row in unfit) else BackendError).exit_code)


def _compare(bundle: Path, checkpoint: str, revision: str | None, bisect: bool) -> dict[str, Any]:
    source = open_checkpoint(checkpoint, revision)
    if bisect:
        from framefusion.export.check.bisect.bisect import bisect_bundle

        with activity("comparing every graph with eager torch"):
            return bisect_bundle(bundle, source)
    from framefusion.export.build import check_again

    with activity("comparing with the eager model") as now:
        return check_again(bundle, source, lambda what: now.say(f"comparing with the eager model: {what}"))


def _render_check(report: dict[str, Any]) -> str:
    from framefusion.export.report.integrity import render_integrity

    files = report["files"]
    text = f"{report['bundle']}: {files['count']} files, {console.in_bytes(files['bytes'])}, sizes and hashes are right"
    lines = [text, *render_integrity(report["integrity"]), *_render_fits(report["engines"])]
    if report["comparison"] is not None:
        return "\n".join([*lines, _render_comparison(report["comparison"])])
    from framefusion.export.report.inspection import comparison_summary

    built = comparison_summary(report["when_built"])
    return "\n".join([*lines, f"files only: NOTHING was compared now (--checkpoint does); when it was built: {built}"])


def _render_comparison(check: Mapping[str, Any]) -> str:
    """The comparison as a table: of a bisection, or of a check."""
    if "words" in check:
        from framefusion.export.check.bisect.bisect import render

        return render(check)
    from framefusion.export.report.inspection import render_comparison

    return render_comparison(check)


def _engine_fits(bundle: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """For each engine whether it fits this machine; every engine is hashed."""
    from framefusion.runtime.backends.fit import examine
    from framefusion.runtime.machine.gpu import find_gpu

    rows = []
    for fit in examine(bundle, manifest, gpu=find_gpu(), hashes=True):
        row = asdict(fit)
        row["engine"] = {name: row["engine"][name] for name in ("kind", "graph", "file", "version", "targets")}
        rows.append(row | {"fits": fit.fits, "text": fit.text})
    return rows


def _render_fits(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each answer; engines that have the same share it."""
    files: dict[str, list[str]] = {}
    for row in rows:
        files.setdefault(row["text"], []).append(row["engine"]["file"])
    lines = []
    for text, names in files.items():
        engines = names[0] if len(names) == 1 else f"{len(names)} engines, {names[0]} ..."
        lines.append(f"{engines}: {text}")
    return lines


# --- sign -----------------------------------------------------------------------------------------------------------


@click.command(name="sign", cls=Command, examples=("ff-export sign bundle --key ~/.ssh/id_ed25519",))
@click.argument("bundle", type=FOLDER)
@option("--key", required=True, type=FILE, help="File with a private ed25519 key that has no passphrase.")
@console.json_option
def sign_command(bundle: Path, key: Path) -> None:
    """Sign BUNDLE, so that others can tell that it is yours.

    All of its files are hashed afresh. The key is one of ssh-keygen -t ed25519, or of openssl genpkey -algorithm
    ed25519. ff-run --trusted-keys runs what its public part signed.
    """
    from framefusion.export.writing.signing import sign_bundle
    from framefusion.runtime.trust.signatures import fingerprint

    with activity(f"hashing the files of {bundle}", after=PATIENCE):
        signature = sign_bundle(bundle, key)
    report = {"bundle": str(bundle), "digest": signature.digest, "key": fingerprint(signature.key)}
    console.show(report, _render_signed)


def _render_signed(report: Mapping[str, Any]) -> str:
    return f"{report['bundle']}: manifest {report['digest']}, signed by {report['key']}"


# --- inputs ---------------------------------------------------------------------------------------------------------


@click.command(
    name="inputs",
    cls=Command,
    examples=(
        "ff-export inputs bundle/segments/rest/graph.onnx -o in.json",
        "polygraphy run bundle/segments/rest/graph.onnx --onnxrt --load-inputs in.json",
    ),
)
@click.argument("graph", type=FILE)
@option("-o", "--output", required=True, type=FILE, help="File to write.")
@console.json_option
def inputs_command(graph: Path, output: Path) -> None:
    """Write what GRAPH of a bundle gets in a request, for polygraphy and others that run a graph by itself.

    The bundle's canned request runs on ONNX Runtime on the CPU: prefills with and without reduction, and decode steps.
    Numbers drawn by shape alone are refused by attention, whose lengths must fit its caches.
    """
    from framefusion.export.graph_inputs import graph_inputs, write_inputs

    with activity("running the canned request", after=PATIENCE):
        feeds = graph_inputs(graph)
        size = write_inputs(feeds, output)
    report = {"graph": str(graph), "output": str(output), "runs": len(feeds), "bytes": size, "inputs": list(feeds[0])}
    console.show(report, _render_inputs)


def _render_inputs(report: Mapping[str, Any]) -> str:
    facts = f"{report['output']}: inputs of {report['runs']} runs, {report['bytes']:,} bytes"
    return f"{facts}\nnext: polygraphy run {report['graph']} --onnxrt --load-inputs {report['output']}"
