"""Build one TensorRT engine from its specification: without a GPU where the library can (tensorrt-rtx).

The plan goes to its file while it is serialized, hashed on the way; the file has its name only when it is whole.
`TensorRTBuilder` does so in a process of its own, since the library crashes over some networks; an exception from
`progress` ends that process. Within one process it reaches the library as a "stop" of its progress monitor, as Ctrl-C
does, and comes back out of `build_engine`. Knows no bundle, no cache of engines and no runtime.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from framefusion.errors import BackendError, StorageError
from framefusion.export.checkpoints.tensors.hashed_file import HashedFile
from framefusion.export.engines.builder import EngineFacts, EngineSpec, Share
from framefusion.export.engines.child import Call, build_in_child
from framefusion.export.engines.tensorrt.api import (
    Builder,
    BuilderConfig,
    KeepsError,
    Network,
    OptimizationProfile,
    Tensor,
    TimingCache,
)
from framefusion.export.engines.tensorrt.network import parse_spec
from framefusion.export.engines.tensorrt.network_check import inputs_of, layer_kinds, outputs_of
from framefusion.export.engines.tensorrt.profiles import segment_spec, tower_spec, weight_bytes
from framefusion.runtime.backends.table import engine_traits
from framefusion.runtime.backends.tensorrt.library import (
    AMPERE,
    FLOAT8_FROM,
    TYPE_NAMES,
    Library,
    Variant,
    float8_problem,
    is_plain,
    load_library,
)
from framefusion.runtime.format.engine_record import EngineKind, ProfileRecord, TensorRecord

if TYPE_CHECKING:
    from framefusion.export.options import EngineOptions
    from framefusion.export.plan.build_plan import BuildPlan
    from framefusion.runtime.bundle import Bundle
    from framefusion.runtime.format.manifest import Manifest

Result = TypeVar("Result")
BUILD = f"{__name__}:build_engine"
LONG_PHASE = "Computing profile costs"  # of the library
BASE_MEMORY = 300 << 20
PROFILE_MEMORY = 20 << 20
MEMORY_PER_WEIGHT = 2.0


class TensorRTBuilder:
    """See `EngineBuilder`: engines of TensorRT or TensorRT-RTX, whose library is loaded once, here.

    Args:
        kind: of the engines.

    Raises:
        BackendError: the library is not installed, does not load, or is too old.
    """

    suffix = ".engine"

    def __init__(self, kind: EngineKind) -> None:
        self._kind = kind
        self._library = load_library(kind)

    def check(self, options: EngineOptions) -> None:
        """See `EngineBuilder.check`."""
        self._library.check_targets(options.targets)
        self._library.check_variant(options.variant)
        if options.max_autotune:
            raise BackendError(f"--max-autotune is not for {self._kind}, which times kernels by itself: leave it")

    def specs(self, bundle: Bundle, options: EngineOptions, plan: BuildPlan | None) -> dict[str, EngineSpec]:
        """See `EngineBuilder.specs`; the checkpoint is not needed."""
        manifest = bundle.manifest
        variant = self._library.check_variant(options.variant)
        targets = self._targets(manifest, options.targets, variant)
        specs = {
            graph: segment_spec(
                bundle.folder, manifest, segment, graph, self._kind, targets, variant, options.max_batch_size
            )
            for segment in manifest.segments
            for graph in segment.graphs
        }
        return specs | {manifest.vision.graph: tower_spec(bundle.folder, manifest, self._kind, targets, variant)}

    def _targets(self, manifest: Manifest, chosen: Sequence[str], variant: Variant) -> tuple[str, ...]:
        """Compute capabilities that the graphs of a bundle can be compiled for."""
        record = manifest.quantization
        if record is None or not any(form.kind == "float" for form in record.formats):
            return self._library.check_targets(chosen)
        problem = float8_problem(chosen, variant)
        if not engine_traits(self._kind).quantized:
            problem = f"{self._kind} engines are not compiled of weights in 8 bits: take --backend tensorrt-rtx"
        if problem:
            raise BackendError(problem)
        return self._library.check_targets(chosen, FLOAT8_FROM)

    def estimate_memory(self, spec: EngineSpec) -> int:
        """See `estimate_memory`."""
        return estimate_memory(spec)

    def build(self, spec: EngineSpec, target: Path, timing_cache: bytes | None, progress: Share) -> EngineFacts:
        """See `build_engine`; in a process of its own, since the library crashes over some networks.

        Raises:
            CompilerCrashError: it crashed, and nothing is left behind.
        """
        library = f"{self._library.kind} {self._library.version}"
        return build_in_child(Call(BUILD, spec, target, timing_cache), progress, library)


def build_engine(
    spec: EngineSpec,
    target: Path,
    *,
    timing_cache: bytes | None = None,
    progress: Share | None = None,
    library: Library | None = None,
) -> EngineFacts:
    """Build an engine into a file.

    Args:
        spec: what to build.
        target: the file; its folder exists. Replaced in one step, at the end.
        timing_cache: what an earlier build gave; left unused where the library has no such cache.
        progress: called with the share that is done; what it raises ends the build and is raised again.
        library: of the spec's kind, whose messages are of this build alone; None loads it.

    Raises:
        BackendError: the library is missing, cannot build for the targets or the type, or refuses the graph.
        BundleError: the graph cannot be read.
        StorageError: the file cannot be written. In all cases nothing is left behind.
    """
    library = library or load_library(spec.kind)
    targets = library.check_targets(spec.targets)
    check_dtype(spec, targets)
    begun = time.monotonic()
    builder = library.builder()
    parsed = parse_spec(library, builder, spec, targets)  # its parser owns the weights: it stays
    network = parsed.network
    config = _config(library, builder, network, spec, targets)
    cache = _attach_timing_cache(library, config, timing_cache)
    monitor = config.progress_monitor = _monitor(library, progress or (lambda share: None))
    with _new_file(target) as file:
        built = _serialize(library, builder, network, config, file, monitor)
        if not built or not file.position:
            raise BackendError(
                f"{library.kind} {library.version} cannot build {spec.graph} for compute capability "
                f"{', '.join(targets)}: {library.reason()}"
            )
    return EngineFacts(
        size=file.record.size,
        sha256=file.record.sha256,
        targets=targets,
        tensors=_tensors(network),
        layer_kinds=layer_kinds(network),
        seconds=time.monotonic() - begun,
        timing_cache=None if cache is None else bytes(cache.serialize()),
    )


def _serialize(
    library: Library, builder: Builder, network: Network, config: BuilderConfig, file: HashedFile, monitor: KeepsError
) -> bool:
    """Build into a file: piece by piece, or at once where the library (TensorRT before 10.7) has no stream for it."""
    errors: list[KeepsError] = [monitor]
    if hasattr(library.module, "IStreamWriter"):
        writer = _writer(library, file)
        errors.append(writer)
        built = _aside(lambda: builder.build_serialized_network_to_stream(network, config, writer), monitor)
    else:
        plan = _aside(lambda: builder.build_serialized_network(network, config), monitor)
        built = plan is not None
        if plan is not None and monitor.error is None:
            file.write(memoryview(plan))
    for keeper in errors:
        if keeper.error is not None:
            raise keeper.error
    return built


def check_dtype(spec: EngineSpec, targets: tuple[str, ...]) -> None:
    """Refuse a type that the kernels of the targets do not have."""
    dtypes = engine_traits(spec.kind).dtypes
    if spec.dtype not in dtypes:
        raise BackendError(
            f"{spec.kind} has no fused attention in {spec.dtype}: build the bundle with --dtype {' or '.join(dtypes)}"
        )
    old = [target for target in targets if float(target) < AMPERE]
    if old and spec.dtype == "bfloat16":
        raise BackendError(
            f"GPUs of compute capability {', '.join(old)} have no bfloat16: build the bundle with --dtype float16, or "
            "leave them out of --target-sm"
        )


def estimate_memory(spec: EngineSpec) -> int:
    """Bytes of this machine's memory at the peak of a build, to be compared with what is free before it starts."""
    return build_memory(len(spec.profiles), weight_bytes(spec.graph))


def build_memory(profiles: int, weights: int) -> int:
    """Bytes of this machine's memory at the peak of a build of a graph with this many profiles and bytes of weights.

    Fitted on TensorRT-RTX 1.7 with eight profiles, fp16: 0.99 GB for 0.47 GB of weights, 9.5 GB for 5.2 GB; and some to
    spare. The graph's own weights are mapped from their file and not counted: the system drops such pages if it must.
    """
    return BASE_MEMORY + PROFILE_MEMORY * profiles + round(MEMORY_PER_WEIGHT * weights)


def _config(
    library: Library, builder: Builder, network: Network, spec: EngineSpec, targets: tuple[str, ...]
) -> BuilderConfig:
    """Targets and profiles, in the order of the specification."""
    config = builder.create_builder_config()
    if library.capabilities:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(library.capabilities[target], index)
    stream_capture = getattr(library.module.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if stream_capture is not None:  # else the library may allocate during a run, which a CUDA graph cannot hold
        config.set_flag(stream_capture)
    if is_plain(spec.options) and hasattr(library.module.BuilderFlag, "TF32"):
        config.clear_flag(library.module.BuilderFlag.TF32)  # the products in fp32 are those that choose tokens
    if "optimization_level" in spec.options:
        config.builder_optimization_level = spec.options["optimization_level"]
    free = [tensor for tensor in inputs_of(network) if -1 in tensor.shape]
    for record in spec.profiles if free else ():
        config.add_optimization_profile(_profile(builder, record, free))
    return config


def _profile(builder: Builder, record: ProfileRecord, free: list[Tensor]) -> OptimizationProfile:
    profile = builder.create_optimization_profile()
    for tensor in free:
        shapes = record.shapes[tensor.name]
        profile.set_shape(tensor.name, *(shapes * 3 if len(shapes) == 1 else shapes))
    return profile


def _tensors(network: Network) -> tuple[TensorRecord, ...]:
    return tuple(
        TensorRecord(
            tensor.name,
            mode,  # type: ignore[arg-type]
            TYPE_NAMES.get(tensor.dtype.name, tensor.dtype.name.lower()),
            tuple(tensor.shape),
        )
        for mode, tensors in (("input", inputs_of(network)), ("output", outputs_of(network)))
        for tensor in tensors
    )


def _attach_timing_cache(library: Library, config: BuilderConfig, content: bytes | None) -> TimingCache | None:
    """The cache that the build reads and extends; None where the library measures nothing."""
    if not library.measures:
        return None
    cache = config.create_timing_cache(content or b"")
    if cache is None or not config.set_timing_cache(cache, False):  # another GPU or version measured it
        cache = config.create_timing_cache(b"")
        assert cache is not None  # of an empty one nothing can be wrong
        config.set_timing_cache(cache, False)
    return cache


@contextlib.contextmanager
def _new_file(target: Path) -> Iterator[HashedFile]:
    """A file beside the target that takes its name when the body has ended without an error, or is removed."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with HashedFile(scratch) as file:
            yield file
        scratch.replace(target)
    except OSError as error:
        raise StorageError(
            f"{target} cannot be written ({error.strerror}): free some space, or choose another folder"
        ) from None
    finally:
        scratch.unlink(missing_ok=True)


def _aside(work: Callable[[], Result], monitor: KeepsError) -> Result:
    """Run `work` beside the main thread: there Ctrl-C would be raised in whatever callback is on, the log's too."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            return future.result()
        except KeyboardInterrupt as error:
            monitor.error = error  # the next step ends the build
            return future.result()


def _writer(library: Library, file: HashedFile) -> KeepsError:
    """What takes the plan piece by piece; an error of the file is kept and ends the build."""

    class Writer(library.module.IStreamWriter):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.module.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, content: memoryview) -> int:
            try:
                return file.write(memoryview(content))
            except OSError as error:
                self.error = error
                return 0  # fewer than were given: the library gives up

    return Writer()


def _monitor(library: Library, progress: Share) -> KeepsError:
    """Follows the library's phases; it stops where `progress` raises, and keeps what was raised.

    Nearly all time goes to one phase, which has the same number of steps for each profile.
    """

    class Monitor(library.module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.module.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._steps = 1
            self._share = 0.0
            self._lock = threading.Lock()  # called from the library's own threads

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if name == LONG_PHASE:
                self._steps = max(steps, 1)

        def step_complete(self, name: str, step: int) -> bool:
            with self._lock:
                if name == LONG_PHASE:
                    self._share = max(self._share, min((step + 1) / self._steps, 1.0))
                try:
                    if self.error is None:
                        progress(self._share)
                except BaseException as error:  # an exception must not cross the library
                    self.error = error
            return self.error is None

        def phase_finish(self, name: str) -> None:
            """Its last step was reported."""

    return Monitor()
