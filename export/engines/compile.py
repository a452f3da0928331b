"""The main path from a bundle to its engines, one for each graph; needs no checkpoint.

    bundle -> spec of each graph -> key -> cache, or a build for one of `jobs` threads -> engines/KIND/ -> report
    -> manifest -> checksums

An engine is in the cache before it is in the bundle, and the manifest names it when it is there with its hash; so a
compilation that ended early goes on from the engines that are complete. What builds an engine is an `EngineBuilder`
(builder.py). Knows no library.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import framefusion
from framefusion.console.progress import Meter, Progress
from framefusion.errors import BundleError, InterruptedBuildError
from framefusion.export.engines.builder import EngineBuilder
from framefusion.export.engines.cache import EngineCache, Fetched, default_folder
from framefusion.export.engines.jobs import (
    FOLDER,
    Job,
    admitted,
    check_disk,
    checked_builder,
    plan_jobs,
)
from framefusion.export.machine import available_memory, peak_memory
from framefusion.export.options import EngineOptions, Resources
from framefusion.export.writing.amendment import Amendment
from framefusion.export.writing.journal import CHECKSUMS
from framefusion.runtime.backends.fit import first_engines, other_files
from framefusion.runtime.backends.table import engine_traits
from framefusion.runtime.bundle import Bundle, file_record
from framefusion.runtime.format.bundle_files import sha256_of, verify_files
from framefusion.runtime.format.engine_record import EngineKind, EngineRecord, TensorRecord
from framefusion.runtime.format.manifest import FileRecord, Manifest
from framefusion.runtime.format.manifest_file import MANIFEST, write_manifest
from framefusion.runtime.trust.engines import remember_compiled
from framefusion.storage.records import from_json, to_json

if TYPE_CHECKING:
    from framefusion.export.plan.build_plan import BuildPlan

REPORT = "report.json"
_TICK = 0.1  # seconds between two looks at the builds


@dataclass(frozen=True)
class Compiled:
    """What came of a compilation.

    Attributes:
        records: of the engines, for a manifest.
        files: the engines and the report by their names in a bundle.
        report: what was compiled from what, as plain values.
    """

    records: tuple[EngineRecord, ...]
    files: Mapping[str, FileRecord]
    report: Mapping[str, Any] = field(default_factory=dict)


def compile_bundle(
    folder: Path,
    options: EngineOptions,
    resources: Resources | None = None,
    progress: Progress | None = None,
    plan: BuildPlan | None = None,
) -> Compiled:
    """Compile the graphs of a published bundle and add the engines to it.

    Args:
        folder: the bundle.
        options: what to compile.
        resources: what that may take.
        progress: follows the engines, in bytes of its graph's weights.
        plan: of the checkpoint that the bundle was built from; inductor traces it.

    Raises:
        BundleError: the bundle is damaged, of another dialect, or holds engines only.
        BackendError: a package is missing, a target is unknown, the type has no engines, or memory is short.
        StorageError: disk or cache cannot take the engines, or another process writes the bundle.
        InterruptedBuildError: Ctrl-C; engines that are complete are in the cache.
    """
    # 1. Hold the bundle: another process would publish a manifest without these engines.
    with Amendment(folder) as amendment:
        # 2. Compare the files that engines are compiled from: an engine's key speaks of their hashes.
        bundle = Bundle(folder, verify=False)
        if bundle.manifest.kv_cache is not None:
            raise BundleError(f"{folder}: {first_engines(folder, bundle.manifest, options.kind)}")
        verify_files(folder, other_files(bundle.manifest))
        # 3. Compile into a scratch folder, so that an end at any point leaves the bundle as it was.
        compiled = compile_engines(
            bundle, options, resources, progress, plan, into=amendment.scratch, check_names=amendment.refuse_foreign
        )
        # 4. Say in a manifest what the bundle will hold, and in the checksums what that is.
        manifest = with_engines(bundle.manifest, compiled, options.kind)
        if options.engines_only:
            manifest = without_graphs(manifest)
        write_manifest(amendment.scratch, manifest)
        write_checksums(amendment.scratch, manifest)
        # 5. Move engines in first and the manifest behind them: it never names what is not there.
        removed = bundle.manifest.files.keys() - manifest.files.keys()
        amendment.commit(moves=[*compiled.files, MANIFEST, CHECKSUMS], removes=removed)
    return compiled


def compile_engines(
    bundle: Bundle,
    options: EngineOptions,
    resources: Resources | None = None,
    progress: Progress | None = None,
    plan: BuildPlan | None = None,
    *,
    into: Path,
    check_names: Callable[[Sequence[str]], None] = lambda _: None,
) -> Compiled:
    """Bring all engines of a kind, and the report, into a folder by their names in a bundle, whose manifest stays.

    Args:
        bundle: whose graphs are compiled; its files are the recorded ones.
        options: what to compile.
        resources: what that may take.
        progress: follows the engines, in bytes of its graph's weights.
        plan: of the checkpoint that the bundle was built from; inductor traces it.
        into: the folder.
        check_names: called with all names before anything is compiled; may refuse them.

    Raises:
        FrameFusionError: see `compile_bundle`.
    """
    resources = resources or Resources()
    start = time.monotonic()
    manifest = bundle.manifest
    # 1. Refuse what cannot be compiled while that costs nothing: graphs, library, targets, names in the bundle.
    bundle.require_graphs()
    builder = checked_builder(options, manifest.dialect, manifest.model.dtype)
    jobs = plan_jobs(bundle, options, plan, builder)
    report_name = f"{FOLDER}/{options.kind}/{REPORT}"
    check_names([*(job.file for job in jobs), report_name, CHECKSUMS])
    # 2. Read the graphs ourselves before a library of somebody else's parses them.
    if not engine_traits(options.kind).traced:
        bundle.check_graphs()
    # 3. Ask for disk and memory only for what the cache does not have.
    cache = EngineCache(resources.cache or default_folder(), resources.cache_limit)
    missing = [job for job in jobs if cache.find(job.components) is None]
    check_disk(bundle.folder, cache, jobs, missing)
    threads, note = admitted(missing, resources.jobs, available_memory())
    # 4. Compile through the cache: an engine is complete there before it is in the folder.
    meter = Meter(progress, {job.label: job.weight_bytes for job in jobs})
    fetched = list(_fetch_all(into, jobs, cache, builder, threads, meter))
    # 5. Vouch for what was compiled here, which may then run.
    _vouch_for(fetched, cache)
    # 6. Evict only now: nothing of this job goes, and the report says what is left.
    cache_bytes = cache.trim()
    # 7. Report beside the engines: what they were compiled from, what that took, what came from the cache.
    records = tuple(_record(job, engine) for job, engine in zip(jobs, fetched, strict=True))
    files = {job.file: engine.entry.file for job, engine in zip(jobs, fetched, strict=True)}
    report = _summary(records[0], options, sorted(job.peak_memory for job in jobs)[-threads:]) | {
        "jobs": threads,
        "notes": [note] if note else [],
        "seconds": round(time.monotonic() - start, 2),
        "cache": {"folder_bytes": cache_bytes, "limit": cache.limit, "hits": sum(engine.hit for engine in fetched)},
        "engines": [_report_line(job, engine) for job, engine in zip(jobs, fetched, strict=True)],
    }
    files[report_name] = _write_report(into / report_name, report)
    return Compiled(records, files, report)


def _vouch_for(fetched: Sequence[Fetched], cache: EngineCache) -> None:
    """Remember the engines that this user compiled: of a cache that others share only those compiled just now."""
    is_own_cache = cache.folder == default_folder()
    remember_compiled(engine.entry.file.sha256 for engine in fetched if is_own_cache or not engine.hit)


def _write_report(path: Path, report: Mapping[str, Any]) -> FileRecord:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return file_record(path)


def with_engines(manifest: Manifest, compiled: Compiled, kind: EngineKind) -> Manifest:
    """The manifest with these engines in place of others of their kind."""
    folder = f"{FOLDER}/{kind}/"
    files = {name: record for name, record in manifest.files.items() if not name.startswith(folder)}
    engines = tuple(engine for engine in manifest.engines if engine.kind != kind)
    return replace(manifest, engines=(*engines, *compiled.records), files=files | dict(compiled.files))


def without_graphs(manifest: Manifest) -> Manifest:
    """The manifest without the files that engines stand for; the CPU, checks and further engines need those."""
    places = {str(Path(engine.graph).parent) for engine in manifest.engines}
    weights_needed = any(not engine_traits(engine.kind).weights_inside for engine in manifest.engines)

    def stays(name: str) -> bool:
        return str(Path(name).parent) not in places or (weights_needed and not name.endswith(".onnx"))

    return replace(manifest, files={name: record for name, record in manifest.files.items() if stays(name)})


def write_checksums(folder: Path, manifest: Manifest) -> None:
    """Write SHA256SUMS over all files and the manifest, which is in `folder`, for `sha256sum -c`."""
    sums = {name: record.sha256 for name, record in manifest.files.items()} | {MANIFEST: sha256_of(folder / MANIFEST)}
    text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    (folder / CHECKSUMS).write_text(text, encoding="utf-8")


def _fetch_all(
    folder: Path, jobs: Sequence[Job], cache: EngineCache, builder: EngineBuilder, threads: int, meter: Meter
) -> Iterator[Fetched]:
    """All engines in order; builds run ahead in threads, the meter belongs to this one alone."""
    cancel = threading.Event()
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(_fetch, folder, job, cache, builder, cancel) for job in jobs]
        try:
            for job, future in zip(jobs, futures, strict=True):
                meter.begin(job.label)
                yield _watched(job, future, meter)
        except BaseException as error:
            cancel.set()
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                done = sum(future.done() and not future.cancelled() and not future.exception() for future in futures)
                raise InterruptedBuildError(
                    f"interrupted: {done} of {len(jobs)} engines are complete in {cache.folder}, run the same command "
                    "to go on"
                ) from None
            raise


def _watched(job: Job, future: Future[Fetched], meter: Meter) -> Fetched:
    """Wait for an engine and tell how far it is, in bytes of its graph's weights."""
    reported_bytes = 0
    meter.doing("compiling")
    while not future.done():
        wait([future], timeout=_TICK)
        if (done := int(job.share * job.weight_bytes)) > reported_bytes:
            meter.add(done - reported_bytes)
            reported_bytes = done
    fetched = future.result()
    meter.doing(fetched.reason)
    meter.add(job.weight_bytes - reported_bytes)
    return fetched


def _fetch(folder: Path, job: Job, cache: EngineCache, builder: EngineBuilder, cancel: threading.Event) -> Fetched:
    """One engine, in a thread of the pool."""

    def go_on() -> None:
        if cancel.is_set():
            raise InterruptedBuildError(f"{job.graph}: the compilation was ended")

    def report_share(share: float) -> None:
        go_on()  # what is raised here ends the build
        job.share = share

    def compile_engine(target: Path) -> tuple[Mapping[str, Any], FileRecord | None]:
        go_on()
        timing = "-".join([job.components["library"], job.components["version"], *job.spec.targets])
        facts = builder.build(job.spec, target, cache.timing_cache(timing), report_share)
        job.peak_memory = facts.peak_memory
        if facts.timing_cache is not None:
            cache.keep_timing_cache(timing, facts.timing_cache)
        plain: Mapping[str, Any] = to_json(
            {"tensors": facts.tensors, "layer_kinds": facts.layer_kinds, "seconds": round(facts.seconds, 2)}
        )
        return plain, facts.file

    return cache.fetch(job.components, folder / job.file, compile_engine, go_on)


def _record(job: Job, fetched: Fetched) -> EngineRecord:
    spec = job.spec
    entry = fetched.entry
    return EngineRecord(
        kind=spec.kind,
        graph=job.graph,
        file=job.file,
        library=job.components["library"],
        version=job.components["version"],
        targets=spec.targets,
        dtype=spec.dtype,
        key=entry.key,
        profiles=tuple(spec.profiles),
        tensors=tuple(from_json(TensorRecord, tensor) for tensor in entry.facts["tensors"]),
        capacities=tuple(spec.capacities),
        weight_bytes=job.weight_bytes if engine_traits(spec.kind).weights_inside else 0,
        options=dict(spec.options),
    )


def _summary(record: EngineRecord, options: EngineOptions, child_peaks: Sequence[int]) -> dict[str, Any]:
    """What is true of all engines; `child_peaks` are bytes of the largest processes that ran at once."""
    return {
        "framefusion-aot": framefusion.__version__,
        "kind": record.kind,
        "library": record.library,
        "version": record.version,
        "targets": list(record.targets),
        "engines_only": options.engines_only,
        "peak_memory_bytes": peak_memory() + sum(child_peaks),
    }


def _report_line(job: Job, fetched: Fetched) -> dict[str, Any]:
    """An engine's line of the report."""
    entry = fetched.entry
    facts = {name: entry.facts.get(name) for name in ("seconds", "layer_kinds")}
    return {
        "graph": job.graph,
        "file": job.file,
        "bytes": entry.file.size,
        "sha256": entry.file.sha256,
        "weight_bytes": job.weight_bytes,
        "estimated_memory_bytes": job.memory,
        "cache": fetched.reason,
        **facts,
    }
