"""What compiles engines of a kind: the interface of a builder, what it is given and what it gives back.

The main path (compile.py, jobs.py) knows only these. A row of runtime/backends/table.py names the class; the modules
beside that class decide the bytes of its engines. Knows no library.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from framefusion.errors import BackendError
from framefusion.installation import install_command
from framefusion.runtime.backends.table import engine_traits, load
from framefusion.runtime.format.engine_record import EngineKind, ProfileRecord, TensorRecord
from framefusion.runtime.format.manifest import FileRecord

if TYPE_CHECKING:
    from framefusion.export.options import EngineOptions
    from framefusion.export.plan.build_plan import BuildPlan
    from framefusion.runtime.bundle import Bundle

_KERNELS = "framefusion.ops"

Share = Callable[[float], None]
"""Called with how much of a build is done, 0 to 1; what it raises ends the build and is raised again."""


@dataclass(frozen=True)
class EngineSpec:
    """Everything that decides an engine's bytes, beside the content of its graph and the version of the library.

    Attributes:
        graph: ONNX file of the bundle, over its weights.
        kind: of the engine.
        targets: compute capabilities, "8.6"; or one device in full, "cpu x86_64 avx512". None takes the library's own
            choice.
        dtype: of weights, activations and caches.
        capacities: slots of each layer's KV cache; none where an engine takes any.
        profiles: sets of input shapes in the order of the engine; none where one engine takes every shape.
        options: what else the library is given.
    """

    graph: Path
    kind: EngineKind
    targets: tuple[str, ...]
    dtype: str
    capacities: tuple[int, ...] = ()
    profiles: tuple[ProfileRecord, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineFacts:
    """What came of a build.

    Attributes:
        size: bytes of the engine.
        sha256: of the engine, where it was hashed while it was written.
        targets: what it was built for.
        tensors: inputs and outputs, named and typed as in the graph.
        layer_kinds: layers of the network of each kind.
        seconds: of the build.
        timing_cache: what the library measured, for the next build; None where it has no such cache.
        peak_memory: most bytes of the process that built it; 0 where that was the caller's.
    """

    size: int
    sha256: str | None
    targets: tuple[str, ...]
    tensors: tuple[TensorRecord, ...]
    layer_kinds: Mapping[str, int]
    seconds: float
    timing_cache: bytes | None = None
    peak_memory: int = 0

    @property
    def file(self) -> FileRecord | None:
        """The engine's identity, where its hash is known."""
        return None if self.sha256 is None else FileRecord(self.size, self.sha256)


class EngineBuilder(Protocol):
    """What compiles the engines of one kind: its class is called with the kind. Several threads build at once.

    Attributes:
        suffix: of an engine's file name, with its dot.
    """

    suffix: str

    def check(self, options: EngineOptions) -> None:
        """Refuse what cannot be compiled on this machine, before anything is written.

        Raises:
            BackendError: a target is unknown, or a compiler or a device is missing.
        """

    def specs(self, bundle: Bundle, options: EngineOptions, plan: BuildPlan | None) -> Mapping[str, EngineSpec]:
        """What to compile for each graph of a bundle, by the graph's name.

        Args:
            bundle: with its graphs.
            options: what a user chose.
            plan: of the checkpoint that it was built from; None where nobody named that.

        Raises:
            BackendError: the checkpoint is needed, or a target is unknown.
            BundleError: a graph cannot be read or has no static sizes.
        """

    def estimate_memory(self, spec: EngineSpec) -> int:
        """Bytes of this machine's memory at the peak of a build, to be compared with what is free before it starts."""

    def build(self, spec: EngineSpec, target: Path, timing_cache: bytes | None, progress: Share) -> EngineFacts:
        """Compile one graph into a file, which has its name only when it is whole.

        Args:
            spec: one of `specs`.
            target: the file; its folder exists.
            timing_cache: of an earlier build; left unused where the library has no such cache.
            progress: called with the share that is done.

        Raises:
            BackendError: the library refuses the graph, or a compiler failed.
            BundleError: the graph cannot be read.
            StorageError: the file cannot be written.
        """


def builder_of(kind: EngineKind) -> EngineBuilder:
    """The builder of a kind of engines; what it needs is imported now.

    Raises:
        BackendError: a package is missing, or its library does not load or is too old.
    """
    try:
        make = load(engine_traits(kind).builder)
    except ImportError as error:
        raise BackendError(f"{error.name or error} is not installed: {install_command('export')}") from None
    builder: EngineBuilder = make(kind)
    return builder


def code_folders(kind: EngineKind) -> tuple[Path, ...]:
    """The folders of the code that decides the bytes of a kind's engines, beside what their graphs already show.

    Engines that are traced from torch hold the kernels of our ops, which the graphs of a bundle only name.
    """
    traits = engine_traits(kind)
    builder = _folder_of(traits.builder.partition(":")[0])
    return (builder, _folder_of(_KERNELS)) if traits.traced else (builder,)


def _folder_of(module: str) -> Path:
    """Where a module lies; it is not imported."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{module} is missing"
    assert spec.origin is not None, f"{module} is no file"
    return Path(spec.origin).parent
