"""One compiled engine of tensorrt_rtx or tensorrt: loaded from its file, its profiles, and the contexts that run it.

The two libraries share an API. What TensorRT-RTX has besides is used where the module has it: a runtime cache of the
kernels it compiles on the user's GPU, kernels specialised to each profile, the check of a header. Knows no segment and
no request. No GPU has run this yet.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from framefusion.errors import BackendError, BundleError
from framefusion.runtime.backends.tensorrt.api import CudaEngine, ExecutionContext, RuntimeCache, RuntimeConfig
from framefusion.runtime.backends.tensorrt.library import TYPE_NAMES, Library, is_plain
from framefusion.runtime.format.engine_record import EngineRecord
from framefusion.storage import files

Shape = tuple[int, ...]
DECODE = "decode"  # begins the names of profiles of a step; that of one row has no other name


class Tensor(NamedTuple):
    """An input or output of an engine."""

    name: str
    is_input: bool
    dtype: str  # numpy's name
    shape: Shape  # -1 where a profile decides


class Loader:
    """A library's runtime on the current device, and the kernels it has compiled there before.

    Args:
        library: loaded.
        kernels: file that keeps compiled kernels from one process to the next, where the library compiles any.
    """

    def __init__(self, library: Library, kernels: Path | None = None) -> None:
        self.library = library
        self.module = library.module
        self.runtime = self.module.Runtime(library.messages)
        if self.runtime is None:
            raise BackendError(f"{library.kind} {library.version} does not start ({library.reason()})")
        self._path = kernels
        self._kernels: RuntimeCache | None = None
        self.save: Callable[[], object] = lambda: None  # keep compiled kernels now; else when the process ends

    def load(self, path: Path, record: EngineRecord) -> Engine:
        """Load an engine. The file is mapped, not read: its pages are the system's to drop once they are on the GPU.

        Raises:
            BundleError: the file is missing.
            BackendError: the library refuses it.
        """
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                engine = self.runtime.deserialize_cuda_engine(plan)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise BundleError(f"{path} cannot be read ({error}): copy it again or rebuild") from None
        if engine is None:
            raise BackendError(
                f"{path} cannot be loaded by {record.library} {self.library.version} ({self.library.reason()}): "
                f"compile it with ff-export compile BUNDLE --backend {record.kind}, or run with --backend onnxruntime"
            )
        return Engine(self, engine, record)

    def context(self, engine: CudaEngine) -> ExecutionContext:
        """An execution context without memory of its own."""
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self.module, "IRuntimeCache"):
            context = engine.create_execution_context(strategy)
        else:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            # A captured graph keeps the kernels it was captured with: they must be the specialised ones.
            eager = self.module.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            config.set_runtime_cache(self._compiled(config))
            context = engine.create_execution_context(config)
        if context is None:
            raise BackendError(f"{self.library.kind} gives no context ({self.library.reason()}): free GPU memory")
        return context

    def _compiled(self, config: RuntimeConfig) -> RuntimeCache:
        """The runtime cache that all contexts share; what another environment left is refused by the library."""
        if self._kernels is None:
            self._kernels = kernels = config.create_runtime_cache()
            if self._path is not None:
                saved = self._path.read_bytes() if self._path.is_file() else b""
                if saved:
                    kernels.deserialize(saved)
                # kernels are compiled until the last new shape has run
                self.save = weakref.finalize(self, _save, kernels, self._path, saved)
        return self._kernels


class Engine:
    """A loaded engine and its contexts: one for prefills, whose profile changes, and one for each profile of a step.

    A captured graph reads memory of the context it was captured from, so that context keeps its profile.
    """

    def __init__(self, loader: Loader, engine: CudaEngine, record: EngineRecord) -> None:
        self.loader = loader
        self.engine = engine
        self.record = record
        self.tensors = tuple(map(self._tensor, range(engine.num_io_tensors)))
        inputs = [tensor.name for tensor in self.tensors if tensor.is_input]
        count = engine.num_optimization_profiles
        self.profiles = tuple({name: self._shapes(name, index) for name in inputs} for index in range(count))
        self._contexts: dict[int | None, Context] = {}  # by the profile of a step; None: of prefills

    @property
    def workspace(self) -> int:
        """Bytes of activations that its largest profile needs."""
        return int(self.engine.device_memory_size_v2)

    @property
    def is_plain(self) -> bool:
        """Whether it gives new rows of keys and values, and takes caches as long as its profiles say."""
        return is_plain(self.record.options)

    def cache_shapes(self, profile: int, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """The shapes under which a profile takes caches of these shapes: whole in a step, the first slots in a prefill.

        Raises:
            BackendError: they have fewer slots.
        """
        taken = {name: self.profiles[profile][name][1] for name in shapes}
        if any(taken[name][2] > shape[2] or not _same_but_slots(taken[name], shape) for name, shape in shapes.items()):
            raise BackendError(f"{self.record.file} takes caches of {taken}, got {dict(shapes)}: compile it again")
        return taken

    def profile_for(self, shapes: Mapping[str, Shape]) -> int:
        """The first profile that takes these inputs.

        Raises:
            BackendError: none does.
        """
        for index, profile in enumerate(self.profiles):
            if all(_within(shapes[name], *limits) for name, limits in profile.items() if name in shapes):
                return index
        names = ", ".join(profile.name for profile in self.record.profiles)
        raise BackendError(
            f"{self.record.file} has no profile for inputs of shapes {dict(shapes)} (its profiles: {names}): compile "
            "the bundle again, or run with --backend onnxruntime"
        )

    def context(self, profile: int) -> Context:
        """The context that a profile runs in."""
        is_step = any(record.name.startswith(DECODE) for record in self.record.profiles[profile : profile + 1])
        place = profile if is_step else None
        if place not in self._contexts:
            self._contexts[place] = Context(self.loader.context(self.engine), self)
        return self._contexts[place]

    def forget(self) -> None:
        """See `Context.forget`."""
        for context in self._contexts.values():
            context.forget()

    def _tensor(self, index: int) -> Tensor:
        engine = self.engine
        name = engine.get_tensor_name(index)
        if engine.get_tensor_location(name) != self.loader.module.TensorLocation.DEVICE:
            raise BackendError(
                f"{self.record.file} takes {name} from the host, all buffers are on the GPU: compile it again"
            )
        is_input = engine.get_tensor_mode(name) == self.loader.module.TensorIOMode.INPUT
        dtype = engine.get_tensor_dtype(name).name
        return Tensor(name, is_input, TYPE_NAMES.get(dtype, dtype), tuple(engine.get_tensor_shape(name)))

    def _shapes(self, name: str, profile: int) -> tuple[Shape, Shape]:
        shape = tuple(self.engine.get_tensor_shape(name))
        if -1 not in shape:
            return shape, shape
        least, _, most = self.engine.get_tensor_profile_shape(name, profile)
        return tuple(least), tuple(most)


class Context:
    """An execution context and whose buffers it is set to, so that a loop over the same buffers sets nothing again."""

    def __init__(self, context: ExecutionContext, engine: Engine) -> None:
        self.context = context
        self.engine = engine
        self._caller: object = None

    def run(
        self, caller: object, profile: int, shapes: Mapping[str, Shape], addresses: Mapping[str, int], target: RunTarget
    ) -> None:
        """Enqueue a run.

        Args:
            caller: for whom it runs; the rest is set only where that is another one than last time.
            profile: index of the engine's profile.
            shapes: of all inputs.
            addresses: of all inputs and outputs.
            target: the stream and the memory for activations.
        """
        if self._caller is not caller:
            self._set(profile, shapes, addresses, target)
            self._caller = caller
        if not self.context.execute_async_v3(target.stream):
            self._caller = None
            raise BackendError(f"{self.engine.record.file} did not run ({self.engine.loader.library.reason()})")

    def forget(self) -> None:
        """Have everything set again: the memory for activations has moved."""
        self._caller = None

    def output_bytes(self, name: str, profile: int, shapes: Mapping[str, Shape], target: RunTarget) -> int:
        """Bytes of an output for inputs of these shapes."""
        self.forget()
        self._set(profile, shapes, {}, target)
        return int(self.context.get_max_output_size(name))

    def capturable(self, stream: int) -> bool:
        """Whether a CUDA graph can be captured of it; TensorRT proper does not say: what it captures is tried."""
        query = getattr(self.context, "is_stream_capturable", None)
        return query is None or bool(query(stream))

    def _set(self, profile: int, shapes: Mapping[str, Shape], addresses: Mapping[str, int], target: RunTarget) -> None:
        context = self.context
        context.set_device_memory(target.workspace, target.workspace_bytes)
        done = [context.active_optimization_profile == profile]
        if not done[0]:
            done = [context.set_optimization_profile_async(profile, target.stream)]
        done += [context.set_input_shape(name, shape) for name, shape in shapes.items()]
        done += [context.set_tensor_address(name, address) for name, address in addresses.items()]
        if not all(done):
            file = self.engine.record.file
            reason = self.engine.loader.library.reason()
            raise BackendError(f"{file} refuses inputs of shapes {dict(shapes)} ({reason}): compile the bundle again")


class RunTarget(NamedTuple):
    """Where a context runs."""

    stream: int  # handle
    workspace: int  # address, a multiple of 256
    workspace_bytes: int


def batch_sizes(engine: EngineRecord) -> tuple[int, ...]:
    """Rows that its steps of several may have, ascending; none of an engine that decodes one at a time."""
    steps = [profile.shapes["hidden"] for profile in engine.profiles if profile.name.startswith(f"{DECODE} ")]
    return tuple(sorted(shapes[0][0] for shapes in steps if shapes[0][0] > 1))


def _same_but_slots(taken: Shape, given: Shape) -> bool:
    return (*taken[:2], *taken[3:]) == (*given[:2], *given[3:])


def _within(shape: Shape, least: Shape, most: Shape) -> bool:
    return len(shape) == len(least) and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))


def _save(kernels: RuntimeCache, path: Path, before: bytes) -> None:
    """Keep compiled kernels; whoever cannot write them compiles them again next time."""
    serialized = kernels.serialize()
    if serialized is None or bytes(serialized) == before:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_file(path, bytes(serialized))
    except OSError:
        return
