"""Does a compiled engine fit this machine? By the manifest and, where there is a GPU, by the engine's library.

Nothing is loaded: the file's size, the library's version, the targets, the driver and the memory are compared, then the
library reads the engine's header. What agrees may still fail when it is loaded; what does not agree certainly would.
"""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import packages_distributions
from importlib.metadata import version as version_of
from pathlib import Path

from framefusion.errors import BackendError
from framefusion.installation import install_command
from framefusion.runtime.backends import table
from framefusion.runtime.backends.table import BackendKind
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.bundle_files import sha256_of
from framefusion.runtime.format.engine_record import EngineKind, EngineRecord
from framefusion.runtime.format.manifest import FLOAT_BYTES, FileRecord, Manifest
from framefusion.runtime.machine import cpu
from framefusion.runtime.machine.gpu import GPU, find_gpu
from framefusion.runtime.machine.machine import Machine

_WITH = "with: "  # before the command that compiles engines again
_RELEASE = 3  # numbers of a version that two builds of one release share

Problem = tuple[str, str]
"""What is wrong, with its figures; and what mends it."""

NO_ENGINE = "no such engine in the bundle"
NO_GPU: Problem = ("there is no NVIDIA GPU here", "run on a machine with a GPU and its driver")


def no_bindings() -> Problem:
    """What buffers on a GPU need is missing."""
    return "cuda-bindings is not installed", install_command("gpu")


def no_int8_caches(what: str, manifest: Manifest) -> Problem | None:
    """What keeps a backend with caches of floats alone from a bundle."""
    if manifest.kv_cache is None:
        return None
    return (
        f"the bundle's KV caches are in {manifest.kv_cache.dtype}, which {what} is not shown to run",
        "take --backend onnxruntime on the CPU; or build the bundle again without --kv-cache-dtype, which --backend "
        "openvino-int8-kv runs with caches of 8 bits",
    )


@dataclass(frozen=True)
class Fit:
    """What is known of one engine on one machine."""

    engine: EngineRecord
    problem: str | None  # None where nothing speaks against it
    remedy: str | None
    gpu: GPU | None
    damaged: bool = False  # the file itself is missing, truncated or altered

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against loading it; on a machine without a GPU only the manifest was read."""
        return self.problem is None

    @property
    def text(self) -> str:
        """One line: "fits ...", "rebuild because ...; with: ...", or "does not run: ..." where compiling is no help."""
        if self.problem is not None:
            is_mended_by_compiling = (self.remedy or "").startswith(_WITH)
            return f"{'rebuild because' if is_mended_by_compiling else 'does not run:'} {self.problem}; {self.remedy}"
        targets = ", ".join(self.engine.targets)
        if self.gpu is None and not is_cpu(self.engine):
            return f"fits {targets}; there is no GPU here to ask"
        return f"fits {'this CPU' if self.gpu is None or is_cpu(self.engine) else self.gpu.name} (built for {targets})"


def is_cpu(engine: EngineRecord) -> bool:
    """Whether it runs on a CPU."""
    return all(target.startswith("cpu") for target in engine.targets)


def examine(folder: Path, manifest: Manifest, *, gpu: GPU | None = None, hashes: bool = False) -> list[Fit]:
    """One Fit for each engine of a bundle.

    Args:
        folder: the bundle.
        manifest: its manifest.
        gpu: what engines are to run on; None for a machine without one (see `find_gpu`).
        hashes: read every engine and compare its hash, too.
    """
    return [_examine(folder, manifest, engine, gpu, hashes) for engine in manifest.engines]


def engine_problem(row: BackendKind, bundle: Bundle, machine: Machine) -> Problem | None:
    """What keeps the engines of a backend from running a bundle: the first thing that speaks against one of them."""
    manifest = bundle.manifest
    engines = tuple(engine for engine in manifest.engines if engine.kind == row.name)
    if not all(map(is_cpu, engines)) or "cpu" not in row.devices:
        if machine.gpu is None:
            return NO_GPU
        if row.cuda_buffers and not machine.bindings:
            return no_bindings()
    if not engines:
        return NO_ENGINE, first_engines(bundle.folder, manifest, row.name)
    for fit in examine(bundle.folder, replace(manifest, engines=engines), gpu=machine.gpu):
        if fit.problem is not None:
            return fit.problem, fit.remedy or "compile it again"
    return None


def require_fit(folder: Path, manifest: Manifest, kind: EngineKind, gpu: GPU | None = None) -> None:
    """Refuse engines of a kind that cannot run here.

    Raises:
        BackendError: the bundle holds none, there is no GPU, or an engine does not fit; with what mends it.
    """
    engines = [engine for engine in manifest.engines if engine.kind == kind]
    gpu = find_gpu() if gpu is None else gpu
    if not engines:
        raise BackendError(f"{folder} holds no {kind} engine: {first_engines(folder, manifest, kind)}")
    if gpu is None and not is_cpu(engines[0]):
        graphs = all(segment.prefill in manifest.files for segment in manifest.segments)
        remedy = "run the bundle with --backend onnxruntime" if graphs else NO_GPU[1]
        raise BackendError(f"{kind} engines need an NVIDIA GPU and its driver, this machine has none: {remedy}")
    for engine in engines:
        fit = _examine(folder, manifest, engine, gpu, hashes=False)
        if not fit.fits:
            raise BackendError(f"{engine.file} cannot run here: {fit.problem}; {fit.remedy}")


def other_files(manifest: Manifest) -> dict[str, FileRecord]:
    """Files that are no engine: an engine that is damaged is compiled again, and nothing else is refused for it."""
    compiled = {engine.file for engine in manifest.engines}
    return {name: record for name, record in manifest.files.items() if name not in compiled}


def compile_command(folder: Path, manifest: Manifest, kind: EngineKind, targets: Sequence[str] = ()) -> str:
    """The command that makes engines for some compute capabilities; of none the library chooses."""
    numbers = ",".join(target.replace(".", "") for target in targets if re.fullmatch(r"\d+\.\d", target))
    command = f"ff-export compile {shlex.quote(str(folder))} --backend {kind}"
    command += f" --target-sm {numbers}" if numbers else ""
    return f"{command} --checkpoint {_checkpoint(manifest)}" if table.engine_traits(kind).traced else command


def first_engines(folder: Path, manifest: Manifest, kind: EngineKind) -> str:
    """How a bundle without engines of a kind comes to them: compiled of its graphs, where those are fit for it."""
    traits = table.engine_traits(kind)
    if manifest.kv_cache is not None:
        return (
            f"its graphs have KV caches in {manifest.kv_cache.dtype}, {kind} takes floats: build another bundle "
            f"without --kv-cache-dtype, {build_command(manifest)} --backend {kind}"
        )
    fits = (not traits.dialects or manifest.dialect in traits.dialects) and (
        not traits.dtypes or manifest.model.dtype in traits.dtypes
    )
    if not fits:  # whatever else the build was given stands in the bundle's README.md
        return (
            f"its graphs have dialect {manifest.dialect} in {manifest.model.dtype}, {kind} takes "
            f"{' or '.join(traits.dialects)} in {' or '.join(traits.dtypes)}: build another bundle, "
            f"{build_command(manifest)} --backend {kind}"
        )
    return compile_command(folder, manifest, kind)


def build_command(manifest: Manifest) -> str:
    """The command that builds a bundle of the same checkpoint, without its options."""
    return f"ff-export build {_checkpoint(manifest)} -o FOLDER"


def one_row(graph: str, manifest: Manifest | None) -> str:
    """Why a graph that is not free in its rows is not, and what mends that; None knows of no bundle."""
    command = "" if manifest is None else f", {build_command(manifest)}, with what its README.md says"
    return f"{graph} takes one row, as it was built before there were batches: rebuild the bundle{command}"


def _checkpoint(manifest: Manifest) -> str:
    """What a command calls the checkpoint: its id; folders are another machine's."""
    source = manifest.source
    return "CHECKPOINT" if source is None or not source.on_hub else source.name


def gpu_memory(manifest: Manifest, kind: EngineKind) -> int:
    """Bytes that the engines of a kind hold on a device at least: themselves and the caches; no activations."""
    model = manifest.model
    engines = {e.graph: e for e in manifest.engines if e.kind == kind}
    files = sum(manifest.files[engine.file].size for engine in engines.values() if engine.file in manifest.files)
    slot = 2 * model.num_kv_heads * model.head_dim * FLOAT_BYTES[model.dtype]
    for segment in manifest.segments:  # an engine without weights of its own is given the bundle's
        if segment.prefill in engines and not engines[segment.prefill].weight_bytes:
            files += segment.weight_bytes
    caches = 0
    for segment in manifest.segments:  # a fixed prefill and its decode graph share the caches
        of_segment = [engines[graph] for graph in segment.graphs if graph in engines]
        caches += max((slot * sum(engine.capacities) for engine in of_segment), default=0)
    return files + caches


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Distributions by the modules they provide; reading them takes a second where many are installed."""
    return packages_distributions()


def installed_version(library: str) -> tuple[str, str] | None:
    """Distribution and version that provide a module, without importing it; None where nothing does."""
    names = _distributions().get(library)
    return None if not names else (names[0], version_of(names[0]))


def _examine(folder: Path, manifest: Manifest, engine: EngineRecord, gpu: GPU | None, hashes: bool) -> Fit:
    """The first thing that speaks against an engine; what is cheapest to ask comes first."""
    rebuild = _rebuild(folder, manifest, engine, gpu)
    damage = next(_file(folder, manifest, engine, rebuild, hashes), None)
    problem, remedy = damage or next(_reasons(folder, manifest, engine, gpu, rebuild), (None, None))
    return Fit(engine, problem, remedy, gpu, damaged=damage is not None)


def _reasons(
    folder: Path, manifest: Manifest, engine: EngineRecord, gpu: GPU | None, rebuild: str
) -> Iterator[Problem]:
    yield from _library(engine, rebuild)
    if is_cpu(engine):
        yield from _processor(engine, rebuild)
    elif gpu is not None:
        yield from _device(manifest, engine, gpu, rebuild)
        yield from _header(folder, engine, rebuild)


def _rebuild(folder: Path, manifest: Manifest, engine: EngineRecord, gpu: GPU | None) -> str:
    if engine.graph not in manifest.files:
        return "its graph was left out (--engines-only): build the bundle again, or compile the one it was made of"
    targets = [*engine.targets]
    if gpu is not None and gpu.capability not in targets:
        targets.append(gpu.capability)
    return f"{_WITH}{compile_command(folder, manifest, engine.kind, targets)}"


def _file(folder: Path, manifest: Manifest, engine: EngineRecord, rebuild: str, hashes: bool) -> Iterator[Problem]:
    path = folder / engine.file
    record = manifest.files.get(engine.file)
    if record is None or not path.is_file():
        yield f"{engine.file} is missing", rebuild
        return
    size = path.stat().st_size
    if size != record.size:
        state = "truncated" if size < record.size else "altered"
        yield f"{engine.file} is {state}, {size} of {record.size} bytes", rebuild
    elif hashes and sha256_of(path) != record.sha256:
        yield f"{engine.file} is altered, its sha256 is not the manifest's", rebuild


def _library(engine: EngineRecord, rebuild: str) -> Iterator[Problem]:
    """Engines are promised to load in the release that wrote them and in no other."""
    installed = installed_version(engine.library)
    if installed is None:
        extra = table.backend(engine.kind).extra
        install = install_command(extra) if extra else f"install {engine.library} {engine.version}"
        yield f"{engine.library} {engine.version} that built it is not installed", install
        return
    package, version = installed
    oldest = table.engine_traits(engine.kind).oldest
    if release(version) < oldest:
        extra = table.backend(engine.kind).extra
        yield (
            f"{engine.library} {version} is installed, and {'.'.join(map(str, oldest))} is the oldest that runs any",
            install_command(extra, upgrade=True) if extra else f"install {engine.library} {engine.version}",
        )
    if release(version) != release(engine.version):
        yield (
            f"it was built by {engine.library} {engine.version} and {version} is installed, which loads only its own",
            f"{rebuild}; or pip install '{package}=={engine.version.partition('+')[0]}'",
        )


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version that must agree: 1.7.1.116 -> (1, 7, 1)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:_RELEASE])


def _processor(engine: EngineRecord, rebuild: str) -> Iterator[Problem]:
    """A CPU is "cpu", its architecture and the compiler's name of its instructions, which the options list."""
    machine = engine.targets[0].split()[1:2]
    required = set(engine.options.get("cpu_features", ()))
    if machine and machine[0] != platform.machine():
        yield f"it was built for {engine.targets[0]} and this CPU is {platform.machine()}", rebuild
    elif lacking := sorted(required - cpu.features()):
        yield f"it was built for a CPU with {', '.join(lacking)} and this one has not", rebuild


def _device(manifest: Manifest, engine: EngineRecord, gpu: GPU, rebuild: str) -> Iterator[Problem]:
    if not any(runs_on(target, gpu.capability) for target in engine.targets):
        yield f"it was built for {', '.join(engine.targets)} and {gpu.name} is {gpu.capability}", rebuild
    required = _cuda_of(engine.library)
    if required is not None and gpu.cuda[0] < required:
        yield (
            f"the driver knows CUDA {gpu.cuda[0]}.{gpu.cuda[1]} and {engine.library} needs {required}",
            f"update the NVIDIA driver; or {rebuild}, where a {engine.library} for CUDA {gpu.cuda[0]} is installed",
        )
    needed = gpu_memory(manifest, engine.kind)
    if needed > gpu.memory:
        yield (
            f"engines and caches take {needed / 1e9:.1f} GB and {gpu.name} has {gpu.memory / 1e9:.1f} GB",
            "build the bundle with a smaller --max-kv-cache-capacity, or run it on another GPU",
        )


def runs_on(target: str, capability: str) -> bool:
    """Whether an engine for a target, "8.6" or "cuda 8.6", runs on a device."""
    return target.split()[-1] == capability


def _cuda_of(library: str) -> int | None:
    """Major version of CUDA that the installed build of a library was made for: its package ends in -cu13."""
    distribution = installed_version(library)
    suffix = None if distribution is None else re.search(r"cu(\d+)$", distribution[0])
    return None if suffix is None else int(suffix[1])


def _header(folder: Path, engine: EngineRecord, rebuild: str) -> Iterator[Problem]:
    """What the library says of the engine's first bytes, where it can read them."""
    reference = table.engine_traits(engine.kind).header
    refusal = table.load(reference)(folder / engine.file, engine) if reference else None
    if refusal is not None:
        problem, is_mended_by_compiling = refusal
        yield problem, rebuild if is_mended_by_compiling else "mend the CUDA installation"
