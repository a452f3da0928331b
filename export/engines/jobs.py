"""What each engine of a bundle is compiled from, its key, and what the machine must have for it. Compiles nothing.

A graph's spec comes from the builder of its kind (builder.py); the key is a hash over the spec, the content of graph
and weights, and the code of the builder. Knows no library.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from framefusion.console.messages import in_bytes
from framefusion.errors import BackendError, BundleError, StorageError
from framefusion.export.engines.builder import EngineBuilder, EngineSpec, builder_of, code_folders
from framefusion.export.engines.cache import EngineCache
from framefusion.export.machine import free_disk
from framefusion.export.options import EngineOptions
from framefusion.export.writing.staging import SPARE
from framefusion.installation import install_command
from framefusion.runtime.backends.fit import installed_version
from framefusion.runtime.backends.table import backend, engine_traits
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.engine_record import EngineKind
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.machine.cpu import available_cores
from framefusion.storage.records import to_json

if TYPE_CHECKING:
    from framefusion.export.plan.build_plan import BuildPlan

FOLDER = "engines"
CORES_PER_JOB = 2  # a builder keeps about that many busy
_MEMORY_SHARE = 0.9  # of the free memory that builds may take by their estimates
_NO_WEIGHTS = 1 << 25  # bytes of an engine without any, at most


@dataclass
class Job:
    """One engine that is to be in the bundle, compiled now or taken from the cache."""

    graph: str
    file: str
    spec: EngineSpec
    components: Mapping[str, Any]
    weight_bytes: int  # of the graph
    size: int  # of the engine, expected
    memory: int  # bytes at the peak of its build, estimated
    share: float = 0.0  # of the build that is done; its thread writes it
    peak_memory: int = 0  # bytes of the process that built it, if that was not this one

    @property
    def label(self) -> str:
        """A few characters for a line of progress: "segments/rest", "segments/rest decode"."""
        path = Path(self.graph)
        return f"{path.parent} {path.stem}".removesuffix(" graph")


class _Requirement(NamedTuple):
    """What a kind of engines accepts of its graphs; none accepted is no requirement."""

    noun: str
    flag: str
    value: str
    accepted: tuple[str, ...]


def checked_builder(options: EngineOptions, dialect: str, dtype: str) -> EngineBuilder:
    """The builder of a kind of engines, after what it cannot compile was refused; nothing is written by then.

    Args:
        options: what a user chose.
        dialect: of the bundle's graphs.
        dtype: of them.

    Raises:
        BundleError: the graphs are of another dialect or type.
        BackendError: a package, a compiler or a GPU is missing, or a target is unknown.
    """
    traits = engine_traits(options.kind)
    requirements = [
        _Requirement("dialect", "--dialect", dialect, traits.dialects),
        _Requirement("type", "--dtype", dtype, traits.dtypes),
    ]
    limits = [requirement for requirement in requirements if requirement.accepted]
    unmet = next((limit for limit in limits if limit.value not in limit.accepted), None)
    if unmet is not None:
        graphs = " and ".join(f"the {' or '.join(limit.accepted)} {limit.noun}" for limit in limits)
        flags = " ".join(f"{limit.flag} {limit.accepted[0]}" for limit in limits)
        raise BundleError(
            f"{options.kind} engines are compiled from graphs of {graphs}, these have {unmet.noun} {unmet.value}: "
            f"build with {flags}"
        )
    builder = builder_of(options.kind)
    builder.check(options)
    return builder


def plan_jobs(bundle: Bundle, options: EngineOptions, plan: BuildPlan | None, builder: EngineBuilder) -> list[Job]:
    """One job for each graph, the heaviest first.

    Args:
        bundle: whose graphs are compiled.
        options: what a user chose.
        plan: of the checkpoint that it was built from, for engines that are traced from it.
        builder: of the options' kind.

    Raises:
        BackendError: the checkpoint is needed and was not named.
        BundleError: a graph cannot be read or has no static sizes.
    """
    manifest = bundle.manifest
    weights = manifest.graphs
    holds_weights = engine_traits(options.kind).weights_inside
    jobs = []
    for graph, spec in builder.specs(bundle, options, plan).items():
        name = graph.removesuffix(".onnx").replace("/", "-") + builder.suffix
        job = Job(
            graph=graph,
            file=f"{FOLDER}/{options.kind}/{name}",
            spec=spec,
            components=components_of(manifest, graph, spec),
            weight_bytes=weights[graph],
            size=weights[graph] if holds_weights else _NO_WEIGHTS,
            memory=builder.estimate_memory(spec),
        )
        jobs.append(job)
    return sorted(jobs, key=lambda job: -job.weight_bytes)


def components_of(manifest: Manifest, graph: str, spec: EngineSpec) -> dict[str, Any]:
    """What an engine's bytes follow from, by name; see `engines.cache`.

    The schedule of a fixed reduction is in the graph, and here for whoever reads why something was compiled again. The
    cost and the thresholds of an adaptive one act between engines and are left out: they compile nothing anew.

    Args:
        manifest: of the bundle.
        graph: name of the graph in it.
        spec: of its engine.

    Raises:
        BackendError: the library is not installed.
    """
    place = Path(graph).parent
    library = backend(spec.kind).library
    beside = [name for name in manifest.files if Path(name).parent == place and not name.endswith(".onnx")]
    holds_weights = engine_traits(spec.kind).weights_inside
    fixed = None if manifest.fixed is None else [manifest.reduction.schedule, manifest.fixed]
    components: dict[str, Any] = to_json(
        {
            "graph": manifest.files[graph].sha256,
            "kind": spec.kind,
            "library": library,
            "version": library_version(library),
            "weights": [manifest.files[name].sha256 for name in sorted(beside)] if holds_weights else None,
            "reduction": fixed,
            "code": _code_of(spec.kind),
            "targets": spec.targets,
            "dtype": spec.dtype,
            "capacities": spec.capacities,
            "profiles": spec.profiles,
            "options": spec.options,
        }
    )
    return components


def library_version(library: str) -> str:
    """The installed version of what compiles."""
    distribution = installed_version(library)
    if distribution is None:
        raise BackendError(f"{library} is not installed: {install_command('export')}")
    return distribution[1]


def check_disk(folder: Path, cache: EngineCache, jobs: Sequence[Job], missing: Sequence[Job]) -> None:
    """Refuse disks that cannot take what will be compiled, and what a bundle on another disk copies of the cache."""
    apart = os.stat(cache.folder).st_dev != os.stat(folder).st_dev
    wanted = {cache.folder: missing, folder: jobs if apart else []}
    for place, engines in wanted.items():
        needed = sum(job.size for job in engines) + SPARE * bool(engines)
        free = free_disk(place)
        if needed > free:
            raise StorageError(
                f"engines of about {in_bytes(needed)} go to {place}, {in_bytes(free)} are free: make room, or give "
                "another --engine-cache"
            )


def admitted(jobs: Sequence[Job], limit: int | None, free: int) -> tuple[int, str]:
    """How many builds may run at once, and a note where memory allows fewer than a user wants.

    Args:
        jobs: what is to be built.
        limit: --jobs; None takes one for every CORES_PER_JOB cores.
        free: bytes of memory.

    Raises:
        BackendError: not even the largest alone fits.
    """
    wanted = max(available_cores() // CORES_PER_JOB, 1) if limit is None else limit
    largest = sorted(jobs, key=lambda job: -job.memory)
    room = _MEMORY_SHARE * free
    if largest and largest[0].memory > room:
        raise BackendError(
            f"compiling {largest[0].graph} takes about {in_bytes(largest[0].memory)} of memory, {in_bytes(free)} are "
            "free: compile on a machine with more, or cut the model in more segments with a larger --depth"
        )
    fitting = wanted
    while fitting > 1 and sum(job.memory for job in largest[:fitting]) > room:
        fitting -= 1
    if fitting == wanted or limit is None:
        return fitting, ""
    needed = sum(job.memory for job in largest[:wanted])
    short = f"--jobs {wanted} would take about {in_bytes(needed)} of memory, {in_bytes(free)} are free"
    return fitting, f"{short}: {fitting} at once"


def _code_of(kind: EngineKind) -> str:
    """A hash of the code that makes the network: engines of an older one are not taken for those of a newer."""
    digest = hashlib.sha256()
    for folder in code_folders(kind):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
