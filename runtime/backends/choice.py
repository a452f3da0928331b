"""Which backend runs a bundle here: the best of what the bundle holds and this machine can run, or the one asked for.

The order, and what each needs:

    tensorrt             engines that fit the GPU and the installed library
    tensorrt-rtx         the same
    onnxruntime on cuda  the CUDA provider of onnxruntime-gpu, a GPU, and graphs in a type that its kernels have
    inductor             engines that fit this GPU or CPU, and torch
    onnxruntime on cpu   graphs, in a type that the CPU kernels have

Nothing is loaded to decide: see framefusion.runtime.backends.fit. Knows no segment.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from framefusion.errors import BackendError
from framefusion.runtime.backends.base import Backend
from framefusion.runtime.backends.fit import build_command, examine, is_cpu, release
from framefusion.runtime.backends.onnxruntime.backend import CUDA_PROVIDER, OnnxRuntimeBackend, OnnxRuntimeCudaBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.engine_record import EngineKind
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.machine.gpu import GPU, find_gpu
from framefusion.runtime.trust.engines import NOT_VOUCHED, TRUST_ENGINES, distrust, require_vouched

Name = Literal["tensorrt", "tensorrt-rtx", "onnxruntime", "inductor"]
Place = Literal["cuda", "cpu"]
NAMES: tuple[Name, ...] = get_args(Name)
PLACES: tuple[Place, ...] = get_args(Place)
ENGINES: tuple[EngineKind, ...] = get_args(EngineKind)

PROVEN: Mapping[tuple[Name, Place], str] = {("onnxruntime", "cpu"): "prefill.json"}
"""What has run on a device of its kind, and the result under tools/bench/results that shows it, with the device's name.
All else is called experimental."""

PORTABLE_SINCE: Mapping[Place, tuple[int, int]] = {"cpu": (1, 28), "cuda": (1, 29)}
"""The first ONNX Runtime whose Attention over a cache masks lower right. On the CPU 1.24 has no TensorScatter, and 1.25
to 1.27 answer a chunk behind a prefill wrongly without an error (test_dialects.py shows it); on CUDA since
microsoft/onnxruntime#28958."""


@dataclass(frozen=True)
class Machine:
    """What matters of this machine, as far as it can be told without loading anything."""

    gpu: GPU | None
    providers: tuple[str, ...]  # of the installed onnxruntime
    onnxruntime: str | None  # its version
    bindings: bool  # cuda-bindings, which buffers on a GPU need

    @classmethod
    def here(cls) -> Machine:
        """This one."""
        try:
            import onnxruntime

            providers = tuple(onnxruntime.get_available_providers())
            version = onnxruntime.__version__
        except ImportError as error:
            if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None  # Ctrl-C while it was loaded: nothing is missing
            providers = ()
            version = None
        return cls(find_gpu(), providers, version, _has_bindings())


@dataclass(frozen=True)
class Option:
    """A backend on a kind of device, and what keeps it from running a bundle."""

    backend: Name
    device: Place
    problem: str | None = None
    remedy: str | None = None

    @property
    def text(self) -> str:
        """As people say it."""
        return f"onnxruntime on {self.device}" if self.backend == "onnxruntime" else self.backend


@dataclass(frozen=True)
class Choice:
    """What runs a bundle, and why nothing better does."""

    option: Option
    passed_over: tuple[Option, ...] = ()  # better ones, with their problems

    @property
    def experimental(self) -> bool:
        """Whether no committed result shows it on a device of its kind."""
        return (self.option.backend, self.option.device) not in PROVEN

    @property
    def text(self) -> str:
        """One line."""
        reasons: dict[str, list[str]] = {}
        for option in self.passed_over:
            reasons.setdefault(option.problem or "", []).append(option.text)
        line = f"backend: {self.option.text}" + (" (experimental)" if self.experimental else "")
        return "; ".join([line, *(f"not {' or '.join(names)}: {problem}" for problem, names in reasons.items())])

    @property
    def facts(self) -> dict[str, Any]:
        """The same as plain values."""
        passed = [{"backend": o.backend, "device": o.device, "because": o.problem} for o in self.passed_over]
        own = {"name": self.option.backend, "device": self.option.device, "experimental": self.experimental}
        return own | {"passed_over": passed}

    def open(self, bundle: Bundle, threads: int = 0) -> Backend:
        """The backend.

        Args:
            bundle: what was chosen for.
            threads: of one operator on the CPU; 0 takes the physical cores.

        Raises:
            BackendError: it cannot run after all: too little free memory, say.
        """
        if self.option.backend == "onnxruntime":
            return _open_onnxruntime(bundle, self.option.device, threads)
        if self.option.backend == "inductor":
            from framefusion.runtime.backends.inductor.backend import InductorBackend

            return InductorBackend(bundle, self.option.device, threads)
        from framefusion.runtime.backends.tensorrt.backend import TensorRTBackend

        return TensorRTBackend(bundle, self.option.backend)


def choose(
    bundle: Bundle, backend: Name | None = None, device: Place | None = None, machine: Machine | None = None
) -> Choice:
    """The best backend for a bundle.

    Args:
        bundle: read and verified.
        backend: the one to take; None takes the best.
        device: where it is to run; None takes the best.
        machine: None takes this one.

    Raises:
        BackendError: what was asked for, or everything, is impossible; with the reason and what mends it.
        TrustError: engines were asked for that nobody vouches for.
    """
    if backend in ENGINES:
        require_vouched(bundle, backend)
    unvouched = [kind for kind in ENGINES if distrust(bundle, kind) is not None]
    found = list(options(bundle.folder, bundle.manifest, machine or Machine.here(), unvouched))
    asked = [o for o in found if backend in (None, o.backend) and device in (None, o.device)]
    for index, option in enumerate(asked):
        if option.problem is None:
            return Choice(option, tuple(asked[:index]))
    wish = " ".join(f"--{flag} {value}" for flag, value in (("backend", backend), ("device", device)) if value)
    if not asked:
        raise BackendError(f"{wish}: there is no such backend; leave out one of the two")
    reasons = "; ".join(f"{option.text}: {option.problem} ({option.remedy})" for option in asked)
    raise BackendError(f"{wish + ': ' if wish else ''}nothing can run this bundle here. {reasons}")


def options(
    folder: Path, manifest: Manifest, machine: Machine, unvouched: Collection[EngineKind] = ()
) -> Iterator[Option]:
    """All backends, the best first, each with the first thing that speaks against it.

    Args:
        folder: the bundle.
        manifest: its manifest.
        machine: where it is to run.
        unvouched: kinds of engines that may not be loaded; not even their headers are read.
    """
    kinds: tuple[EngineKind, ...] = ("tensorrt", "tensorrt-rtx")
    for kind in kinds:
        problem = _UNVOUCHED if kind in unvouched else _engine_problem(folder, manifest, kind, machine)
        yield Option(kind, "cuda", *problem)
    yield Option("onnxruntime", "cuda", *_cuda_problem(manifest, machine))
    yield _inductor(folder, manifest, machine, "inductor" in unvouched)
    yield Option("onnxruntime", "cpu", *_cpu_problem(manifest, machine))


Problem = tuple[str, str] | tuple[()]
_NO_GPU = ("there is no NVIDIA GPU here", "run on a machine with a GPU and its driver")
_UNVOUCHED = (NOT_VOUCHED, f"say {TRUST_ENGINES} where you trust the bundle's source, or compile it here")
_NO_BINDINGS = ("cuda-bindings is not installed", "pip install 'framefusion-aot[gpu]'")


def _engine_problem(folder: Path, manifest: Manifest, kind: EngineKind, machine: Machine) -> Problem:
    engines = tuple(engine for engine in manifest.engines if engine.kind == kind)
    if not engines:
        return "no such engine in the bundle", build_command(folder, kind)
    if not all(map(is_cpu, engines)):
        if machine.gpu is None:
            return _NO_GPU
        if kind != "inductor" and not machine.bindings:
            return _NO_BINDINGS
    for fit in examine(folder, replace(manifest, engines=engines), gpu=machine.gpu):
        if fit.problem is not None:
            return fit.problem, fit.remedy or "compile it again"
    return ()


def _inductor(folder: Path, manifest: Manifest, machine: Machine, unvouched: bool) -> Option:
    engines = [engine for engine in manifest.engines if engine.kind == "inductor"]
    place: Place = "cpu" if (all(map(is_cpu, engines)) if engines else machine.gpu is None) else "cuda"
    problem = _UNVOUCHED if unvouched else _engine_problem(folder, manifest, "inductor", machine)
    return Option("inductor", place, *problem)


def _cuda_problem(manifest: Manifest, machine: Machine) -> Problem:
    if machine.gpu is None:
        return _NO_GPU
    if CUDA_PROVIDER not in machine.providers:
        return f"the installed onnxruntime has no {CUDA_PROVIDER}", "pip install onnxruntime-gpu in its place"
    if not machine.bindings:
        return _NO_BINDINGS
    return _graph_problem(manifest) or _kernel_problem(manifest, machine.onnxruntime or "0")


def _kernel_problem(manifest: Manifest, version: str) -> Problem:
    dtype = manifest.model.dtype
    if manifest.dialect == "gqa" and dtype == "float32":
        return (
            "GroupQueryAttention has no CUDA kernel in float32",
            "build with --dtype float16, or with --dialect portable",
        )
    return _portable_problem(manifest, version, "cuda")


def _portable_problem(manifest: Manifest, version: str, device: Place) -> Problem:
    if manifest.dialect != "portable" or release(version) >= PORTABLE_SINCE[device]:
        return ()
    package = "onnxruntime-gpu" if device == "cuda" else "onnxruntime"
    least = ".".join(map(str, PORTABLE_SINCE[device]))
    return (
        f"{device.upper()} kernels of onnxruntime {version} lack portable attention or mask it wrongly",
        f"pip install '{package}>={least}', or build with --dialect gqa",
    )


def _cpu_problem(manifest: Manifest, machine: Machine) -> Problem:
    if machine.onnxruntime is None:
        return "onnxruntime is not installed", "pip install onnxruntime"
    if manifest.model.dtype == "bfloat16":
        return (
            "the bundle is in bfloat16, the CPU runtime runs float32 and float16",
            "build it again with --dtype float16, or run it on a GPU",
        )
    return _graph_problem(manifest) or _portable_problem(manifest, machine.onnxruntime, "cpu")


def _graph_problem(manifest: Manifest) -> Problem:
    if all(segment.prefill in manifest.files for segment in manifest.segments):
        return ()
    return "the bundle has engines only", "build it without --engines-only"


def _open_onnxruntime(bundle: Bundle, device: Place, threads: int) -> Backend:
    if device == "cpu":
        return OnnxRuntimeBackend(bundle.folder, threads, manifest=bundle.manifest)
    from framefusion.runtime.backends.cuda.device import CudaDevice

    return OnnxRuntimeCudaBackend(bundle.folder, CudaDevice(bundle.manifest.model.float_type), bundle.manifest)


def _has_bindings() -> bool:
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:  # nothing of CUDA's packages is there
        return False
