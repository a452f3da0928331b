"""The main path of the toolchain: a checkpoint to a checked bundle.

    checkpoint -> plan -> [weights, graph] for each segment, vision, embedding, tokenizer (parts.py) -> manifest
    -> check (verify.py) -> golden (golden.py) -> engines (compile.py) -> model card -> manifest -> rename

Each part is written, hashed and journaled before the next.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import framefusion
from framefusion.console.progress import Meter, Progress
from framefusion.errors import BudgetError, CheckFailedError, InterruptedBuildError, StorageError
from framefusion.export.check.golden import golden_of, write_golden
from framefusion.export.check.observation import Doing, ignore
from framefusion.export.check.verify import Scope, report, scope_of
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.kv_scales import measure_scales
from framefusion.export.engines.compile import Compiled, compile_engines, with_engines, without_graphs, write_checksums
from framefusion.export.engines.jobs import FOLDER as ENGINES
from framefusion.export.engines.jobs import checked_builder
from framefusion.export.evaluate.acceptance.loss import Acceptance, check_loss, points_lost
from framefusion.export.options import BuildOptions, Resources
from framefusion.export.plan.build_plan import BuildPlan, identities, identity_of, replan
from framefusion.export.quantization.code_store import CodeStore
from framefusion.export.report.card import write_card
from framefusion.export.writing import staging
from framefusion.export.writing.journal import CHECKSUMS
from framefusion.export.writing.parts import Builder
from framefusion.export.writing.staging import Staging
from framefusion.runtime.backends.table import engine_traits
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest import SCHEMA_VERSION, FileRecord, LossRecord, Manifest
from framefusion.runtime.format.manifest_file import MANIFEST, write_manifest
from framefusion.runtime.proof.golden import GOLDEN
from framefusion.storage import files

CARD = "card"  # the part of the model card
GOLDEN_PART = "golden"


@dataclass(frozen=True)
class Built:
    """A published bundle: its place and its manifest."""

    folder: Path
    manifest: Manifest


def build(
    checkpoint: Checkpoint,
    output: Path,
    options: BuildOptions,
    *,
    force: bool = False,
    verify: bool = True,
    tolerance: float | None = None,
    progress: Progress | None = None,
    resources: Resources | None = None,
    acceptance: Acceptance | None = None,
    films: Sequence[Path] = (),
    codes: CodeStore | None = None,
) -> Built:
    """Build a bundle, check it against the eager model, compile its engines if any, and give it its name.

    Args:
        checkpoint: what to read.
        output: folder of the bundle; must not exist unless `force`.
        options: see `BuildOptions`.
        force: replace an output that exists.
        verify: run the check; without it the manifest says so.
        tolerance: largest error that passes the check, see `check.check_bundle`; None takes its default.
        progress: called with each part and its bytes; `check` and `engines` are the last parts.
        resources: what the compilation of engines may take.
        acceptance: what codes in place of floats may cost in answers; a second bundle, of floats, is built for it
            meanwhile.
        films: that scales of KV caches in int8 are measured on, see `measure_scales`.
        codes: chosen by films, with `options`: see `eager.calibration.codes.calibrated_codes`.

    Raises:
        CheckFailedError: the bundle does not reproduce the eager model, or loses more answers than is accepted; its
            parts stay in NAME.partial.
        BudgetError: an acceptance was given, and no weights are quantized by this build.
        FrameFusionError: see `framefusion.errors`; nothing half-written has the output's name.
    """
    try:
        # 1. plan: everything that configuration and headers can be refused for is refused here, in a second
        plan = BuildPlan(checkpoint, options, codes)
        return build_planned(
            plan,
            output,
            force=force,
            verify=verify,
            tolerance=tolerance,
            progress=progress,
            resources=resources,
            acceptance=acceptance,
            films=films,
        )
    except KeyboardInterrupt:
        raise InterruptedBuildError("interrupted before anything was written: run the same command again") from None


def build_planned(
    plan: BuildPlan,
    output: Path,
    *,
    force: bool = False,
    verify: bool = True,
    tolerance: float | None = None,
    progress: Progress | None = None,
    resources: Resources | None = None,
    acceptance: Acceptance | None = None,
    golden: bool = True,
    films: Sequence[Path] = (),
) -> Built:
    """Carry a plan out; arguments and errors are those of `build`.

    `golden` is False for a bundle that nobody will run on another device.
    """
    checkpoint = plan.checkpoint
    options = plan.options
    if options.engines is not None:
        checked_builder(options.engines, options.dialect, options.dtype)
    if acceptance is not None and plan.in_floats is None:
        raise BudgetError(
            "--max-points-lost compares what this build quantizes with floats: give --weights or --kv-cache-dtype"
        )
    scope = scope_of(plan) if verify else None
    # 2. stage: parts of an interrupted build of the same thing are taken over
    origin = {**identity_of(checkpoint), "films": identities(films)} if films else identity_of(checkpoint)
    key = staging.identity(options, origin, framefusion.__version__, SCHEMA_VERSION)
    with Staging(output, key, force=force, progress=progress, checkpoint=checkpoint.folder) as staged:
        staged.forget(CARD)
        if verify:
            staged.forget(GOLDEN_PART)  # a build without the check may have left it out
        meter = Meter(progress, sizes_of(plan, scope))
        if plan.kv_scales is not None:
            measure_scales(plan, staged.scratch, films, meter.doing)
        # 3. write: each part is hashed and journaled before the next
        manifest = _write_parts(plan, staged, meter)
        # 4. check: before engines, which take the longest and inherit every fault
        if scope is not None:
            scratch = partial(scratch_bundle, staged.scratch, meter)
            checked = report(staged.folder, plan, scope, tolerance, scratch, meter.doing)
            manifest = replace(manifest, check=_passed(checked, staged.folder))
        if acceptance is not None:
            manifest = with_losses(manifest, _losses(plan, staged, meter, acceptance))
        # 5. golden: what the eager model makes of a canned request, so that every device can be compared with it
        if golden:
            meter.begin(GOLDEN_PART)
            opened = Bundle(staged.folder, verify=False)
            make = partial(golden_of, opened, plan, meter.doing, may_stream=verify)
            staged.write(GOLDEN_PART, lambda folder: write_golden(folder, make()))
            manifest = replace(manifest, files={**manifest.files, GOLDEN: staged.files[GOLDEN]})
        # 6. compile
        if options.engines is not None:
            manifest = _compile(plan, manifest, staged, resources, meter)
        # 7. describe: the card says what was checked, the manifest has the card's hash
        manifest = _describe(manifest, checkpoint, staged)
        # 8. publish: only now the output has its name
        staged.publish()
    return Built(staged.output, manifest)


def with_losses(manifest: Manifest, losses: tuple[LossRecord, ...]) -> Manifest:
    """A manifest that says what codes cost in answers: those of weights, or of caches where weights are floats."""
    if manifest.quantization is not None:
        return replace(manifest, quantization=replace(manifest.quantization, losses=losses))
    assert manifest.kv_cache is not None  # one of the two has codes
    return replace(manifest, kv_cache=replace(manifest.kv_cache, losses=losses))


def sizes_of(plan: BuildPlan, scope: Scope | None) -> dict[str, int]:
    """Bytes of each part that will be written, the bundle that only the check needs among them."""
    sizes = Builder(plan).sizes()
    if scope is not None:
        other = None if scope.substitute is None else Builder(scope.substitute).sizes()
        sizes["check"] = sum(other.values()) if other else 0
    if plan.options.engines is not None:
        sizes[ENGINES] = engine_bytes(plan)
    return sizes


def engine_bytes(plan: BuildPlan) -> int:
    """Bytes of the engines of a plan: the weights of each graph; what comes on top of them is little."""
    assert plan.options.backend is not None
    if not engine_traits(plan.options.backend).weights_inside:
        return 0
    return sum(graph.weight_bytes for graph in plan.graphs)


@contextmanager
def scratch_bundle(place: Path, meter: Meter, plan: BuildPlan) -> Iterator[Path]:
    """The bundle of another plan in a new folder in `place`, gone when the body ends.

    In the scratch folder of a build, what a killed process leaves is removed by the next one.

    Raises:
        StorageError: `place` cannot be written.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=".check-", dir=place))
    except OSError as error:
        raise StorageError(f"{place} cannot be written ({error.strerror}): the check builds a bundle there") from None
    try:
        yield build_planned(plan, folder / "bundle", verify=False, progress=meter.within, golden=False).folder
    except InterruptedBuildError:
        raise KeyboardInterrupt from None  # what it says is of the scratch bundle
    finally:
        files.remove_scratch(folder)


def _losses(plan: BuildPlan, staged: Staging, meter: Meter, acceptance: Acceptance) -> tuple[LossRecord, ...]:
    """What quantized weights cost in answers, within what is accepted."""
    assert plan.in_floats is not None
    with scratch_bundle(staged.scratch, meter, plan.in_floats) as floats:
        meter.doing("questions")
        answered = partial(_count, meter)
        rows = points_lost(staged.folder, floats, acceptance.questions, answered)
    check_loss(rows, acceptance.points, staged.folder)
    return rows


def _count(meter: Meter, done: int, total: int) -> None:
    meter.doing(f"question {done} of {total}")


def _write_parts(plan: BuildPlan, staged: Staging, meter: Meter) -> Manifest:
    """Write what is not complete yet, then the manifest."""
    staged.check_space(meter.sizes)
    builder = Builder(plan, meter)
    for part, produce in builder.producers().items():
        meter.begin(part)
        staged.write(part, produce)
    meter.begin("check" if "check" in meter.sizes else "manifest")
    manifest = builder.manifest(staged.files, staged.folder)
    staged.put(MANIFEST, lambda folder: write_manifest(folder, manifest), MANIFEST)
    return manifest


def _compile(
    plan: BuildPlan, manifest: Manifest, staged: Staging, resources: Resources | None, meter: Meter
) -> Manifest:
    """Compile the engines into the staging folder; what an earlier try compiled comes from the cache."""
    options = plan.options.engines
    assert options is not None
    staged.forget(ENGINES)
    meter.begin(ENGINES)
    bundle = Bundle(staged.folder, verify=False)  # every part was hashed when it was written or taken over
    compiled: list[Compiled] = []

    def produce(folder: Path) -> Mapping[str, FileRecord]:
        compiled.append(compile_engines(bundle, options, resources, meter.within, plan, into=folder))
        return compiled[0].files

    staged.write(ENGINES, produce)
    full = with_engines(manifest, compiled[0], options.kind)
    if not options.engines_only:
        return full
    kept = without_graphs(full)
    staged.forget_files(full.files.keys() - kept.files.keys())
    return kept


def _describe(manifest: Manifest, checkpoint: Checkpoint, staged: Staging) -> Manifest:
    """Write the model card, which says what was checked, then the manifest, which has the card's hash."""
    staged.write(CARD, lambda folder: write_card(folder, manifest, checkpoint.folder))
    described = replace(manifest, files=staged.files)

    def write(folder: Path) -> None:
        write_manifest(folder, described)
        if described.engines:
            write_checksums(folder, described)

    staged.put(MANIFEST, write, *((MANIFEST, CHECKSUMS) if described.engines else (MANIFEST,)))
    return described


def _passed(report: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    if not report["passed"]:
        failed = ", ".join(f"{line['what']}: {line['value']:.3g} > {line['limit']:.3g}" for line in report["failures"])
        raise CheckFailedError(
            f"{folder} does not reproduce the eager model ({failed}); it was not published: "
            "report it, or give --tolerance a limit that you accept"
        )
    return report


def check_again(folder: Path, checkpoint: Checkpoint, doing: Doing = ignore) -> dict[str, Any]:
    """Repeat the comparison for a bundle that was published, from the options in its manifest.

    `doing` is called with what runs now.

    Raises:
        BundleError: the manifest does not say how it was built.
        CheckpointError: the checkpoint is not the one that the bundle was built from.
    """
    bundle = Bundle(folder, verify=False)
    bundle.require_graphs()
    plan = replan(folder, bundle.manifest, checkpoint)
    scratch = partial(scratch_bundle, folder.absolute().parent, Meter())
    return report(folder, plan, scope_of(plan), bundle.manifest.check.get("tolerance"), scratch, doing)
