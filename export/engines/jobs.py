"""What each engine of a bundle is compiled from, its key, and what the machine must have for it. Compiles nothing.

What builds an engine is a module of this folder with SUFFIX, `estimate_memory`, `build_engine` and a spec a graph:
everything that decides an engine's bytes beside the content of its graph and weights.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from framefusion.console.messages import in_bytes
from framefusion.errors import BackendError, BundleError, StorageError
from framefusion.export.engines.cache import EngineCache
from framefusion.export.machine import free_disk
from framefusion.export.options import ENGINE_DIALECT, ENGINE_DTYPES, EngineOptions
from framefusion.export.writing.staging import SPARE
from framefusion.runtime.backends.fit import installed_version
from framefusion.runtime.backends.tensorrt.library import load_library
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.engine_record import EngineKind
from framefusion.runtime.format.manifest import Manifest
from framefusion.storage.records import to_json

if TYPE_CHECKING:
    from framefusion.export.plan.build_plan import BuildPlan

FOLDER = "engines"
CORES_PER_JOB = 2  # a builder keeps about that many busy
_MEMORY_SHARE = 0.9  # of the free memory that builds may take by their estimates


class Kind(NamedTuple):
    """What differs between the kinds, seen from here."""

    folder: str  # folder beside this module: build.py is the builder, and all its modules decide an engine's bytes
    library: str  # module that compiles and runs it
    from_onnx: bool  # compiled from the graphs of the portable dialect; else traced from the checkpoint's configuration
    weights_inside: bool  # else an engine is given the bundle's own files of weights


KINDS: Mapping[EngineKind, Kind] = {
    "tensorrt-rtx": Kind("tensorrt", "tensorrt_rtx", True, True),
    "tensorrt": Kind("tensorrt", "tensorrt", True, True),
    "inductor": Kind("inductor", "torch", False, False),
}
_NO_WEIGHTS = 1 << 25  # bytes of an engine without any, at most


@dataclass
class Job:
    """One engine to be."""

    graph: str
    file: str
    spec: Any
    targets: tuple[str, ...]
    components: Mapping[str, Any]
    weight_bytes: int  # of the graph
    size: int  # of the engine, expected
    memory: int  # bytes at the peak of its build, estimated
    share: float = 0.0  # of the build that is done, told by its thread

    @property
    def label(self) -> str:
        """A few characters for a line of progress: "segments/rest", "segments/rest decode"."""
        path = Path(self.graph)
        return f"{path.parent} {path.stem}".removesuffix(" graph")


def check_options(options: EngineOptions, dialect: str, dtype: str) -> None:
    """Refuse what engines cannot be compiled of, or this machine cannot compile, before anything is written.

    Raises:
        BundleError: the graphs are of another dialect or type.
        BackendError: a package, a compiler or a GPU is missing, or a target is unknown.
    """
    kind = KINDS[options.kind]
    wrong = kind.from_onnx and next(
        (f"{name} {value}" for name, value, fitting in _wanted(dialect, dtype) if value not in fitting), None
    )
    if wrong:
        raise BundleError(
            f"{options.kind} engines are compiled from graphs of the {ENGINE_DIALECT} dialect in "
            f"{' or '.join(ENGINE_DTYPES)}, these have {wrong}: build with --dialect {ENGINE_DIALECT} "
            f"--dtype {ENGINE_DTYPES[0]}"
        )
    if kind.from_onnx:
        load_library(options.kind).check_targets(options.targets)
    elif options.targets:
        raise BackendError(
            f"--target-sm is not for {options.kind}, which compiles for the machine it runs on: leave it"
        )
    builder_of(options.kind)


def _wanted(dialect: str, dtype: str) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    return ("dialect", dialect, (ENGINE_DIALECT,)), ("type", dtype, ENGINE_DTYPES)


def builder_of(kind: EngineKind) -> Any:
    """The module that builds engines of a kind."""
    try:
        return importlib.import_module(f"framefusion.export.engines.{KINDS[kind].folder}.build")
    except ImportError as error:
        raise BackendError(f"{error.name or error} is not installed: pip install 'framefusion-aot[export]'") from None


def plan_jobs(bundle: Bundle, options: EngineOptions, plan: BuildPlan | None) -> list[Job]:
    """One job for each graph, the heaviest first."""
    manifest = bundle.manifest
    kind = KINDS[options.kind]
    builder = builder_of(options.kind)
    targets = options.targets
    if kind.from_onnx:
        targets = load_library(options.kind).check_targets(targets)
        specs = _onnx_specs(bundle, builder, options.kind, targets)
    elif plan is None:
        raise BackendError(
            f"{options.kind} traces the graphs from the checkpoint's configuration: say with --checkpoint which one "
            f"{bundle.folder} was built from"
        )
    else:
        specs = builder.specs(bundle.folder, manifest, plan, options.device)
    weights = {manifest.vision.graph: manifest.vision.weight_bytes}
    for segment in manifest.segments:
        weights |= dict.fromkeys(segment.graphs, segment.weight_bytes)
    jobs = []
    for graph, spec in specs.items():
        file = f"{FOLDER}/{options.kind}/{graph.removesuffix('.onnx').replace('/', '-')}{builder.SUFFIX}"
        size = weights[graph] if kind.weights_inside else _NO_WEIGHTS
        parts = components_of(manifest, graph, spec)
        jobs.append(
            Job(graph, file, spec, tuple(spec.targets), parts, weights[graph], size, builder.estimate_memory(spec))
        )
    return sorted(jobs, key=lambda job: -job.weight_bytes)


def _onnx_specs(bundle: Bundle, builder: Any, kind: EngineKind, targets: Sequence[str]) -> dict[str, Any]:
    folder = bundle.folder
    manifest = bundle.manifest
    specs = {
        graph: builder.segment_spec(folder, manifest, segment, graph, kind, targets)
        for segment in manifest.segments
        for graph in segment.graphs
    }
    return specs | {manifest.vision.graph: builder.tower_spec(folder, manifest, kind, targets)}


def components_of(manifest: Manifest, graph: str, spec: Any) -> dict[str, Any]:
    """What an engine's bytes follow from, by name; see `engines.cache`.

    The schedule of a fixed reduction is in the graph, and here for whoever reads why something was compiled again. The
    cost and the thresholds of an adaptive one act between engines and are left out: they compile nothing anew.
    """
    place = Path(graph).parent
    kind = KINDS[spec.kind]
    beside = [name for name in manifest.files if Path(name).parent == place and not name.endswith(".onnx")]
    fixed = None if manifest.fixed is None else [manifest.reduction.schedule, manifest.fixed]
    parts = {
        "graph": manifest.files[graph].sha256,
        "kind": spec.kind,
        "library": kind.library,
        "version": library_version(kind.library),
        "weights": [manifest.files[name].sha256 for name in sorted(beside)] if kind.weights_inside else None,
        "reduction": fixed,
        "code": _code_of(kind),
    }
    told = ("targets", "dtype", "capacities", "profiles", "options")
    plain: dict[str, Any] = to_json(parts | {name: getattr(spec, name) for name in told})
    return plain


def library_version(library: str) -> str:
    """The installed version of what compiles."""
    found = installed_version(library)
    if found is None:
        raise BackendError(f"{library} is not installed: pip install 'framefusion-aot[export]'")
    return found[1]


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


def admitted(jobs: Sequence[Job], asked: int | None, free: int) -> tuple[int, str]:
    """How many builds may run at once, and a word where memory allows fewer than were asked.

    Raises:
        BackendError: not even the largest alone.
    """
    wanted = max((os.cpu_count() or 1) // CORES_PER_JOB, 1) if asked is None else asked
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
    if fitting == wanted or asked is None:
        return fitting, ""
    needed = sum(job.memory for job in largest[:wanted])
    short = f"--jobs {wanted} would take about {in_bytes(needed)} of memory, {in_bytes(free)} are free"
    return fitting, f"{short}: {fitting} at once"


def _code_of(kind: Kind) -> str:
    """A hash of the code that makes the network: engines of an older one are not taken for those of a newer."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent / kind.folder).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
