"""TensorRT and TensorRT-RTX: the engines of a bundle on an NVIDIA GPU, without torch.

Everything is on one stream of the device. Activations of all engines share one block; caches are allocated once at the
engines' static length and updated in place; a decode step through all segments is captured as one CUDA graph and
replayed. An engine decodes two tokens of a request, because a profile of one token would have its own copy of the
weights: the second is padding; or one token of each of 2, 4, 8 requests, by profiles of so many rows. One run at a
time: contexts and the block for activations are shared.

No GPU has run this yet: its rows of the table of backends name no result.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

from framefusion.console.messages import in_bytes
from framefusion.errors import BackendError
from framefusion.runtime.backends.base import BoundSegment
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.cuda.array import DeviceArray, device_array
from framefusion.runtime.backends.cuda.decode.append import AppendedRows
from framefusion.runtime.backends.cuda.decode.tokens import CudaGreedyTokens
from framefusion.runtime.backends.cuda.device import CudaDevice
from framefusion.runtime.backends.fit import compile_command, require_fit
from framefusion.runtime.backends.kv_cache import SegmentCache, rows_name
from framefusion.runtime.backends.tensorrt.cache_pool import CachePool
from framefusion.runtime.backends.tensorrt.engine import Context, Engine, Loader, RunTarget, Tensor
from framefusion.runtime.backends.tensorrt.library import LibraryKind, load_library
from framefusion.runtime.backends.tensorrt.memory import common_batch_sizes, engine_memory, require_room
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest import SegmentRecord
from framefusion.runtime.machine.gpu import find_gpu
from framefusion.runtime.machine.user_cache import user_cache
from framefusion.runtime.trust.engines import require_vouched

KV_LENGTHS = "kv_len"  # input of every segment
ALIGNMENT = 256  # bytes, of the memory for activations
CAPTURED = 4  # graphs kept: one for each set of buffers that requests happen to get, and one for each size of a batch


class TensorRTBackend:
    """The engines of one kind, checked, loaded and bound.

    Args:
        bundle: read and verified.
        kind: which engines.
        device: where they run; None takes the first GPU, rows in the bundle's own type.
        kernels: folder for kernels that TensorRT-RTX compiles on this GPU; None takes the user's cache folder.

    Raises:
        BackendError: the library is missing, the engines are for another GPU, library or driver, there is no GPU, or it
            has too little memory. Nothing is loaded by then.
        TrustError: nobody vouches for the engines.
    """

    decode_width = 2
    chunk: int | None = None
    host_threads: int | None = None
    continues = False  # no engine has shown yet that a bucket behind a cache gives the same numbers

    def __init__(
        self, bundle: Bundle, kind: LibraryKind, device: CudaDevice | None = None, kernels: Path | None = None
    ) -> None:
        require_vouched(bundle, kind)
        gpu = find_gpu()
        require_fit(bundle.folder, bundle.manifest, kind, gpu)
        assert gpu is not None  # what fits has one
        library = load_library(kind)
        self.name: str = kind
        self.bundle = bundle
        self._gpu = gpu.name
        self.device = device or CudaDevice(bundle.manifest.model.float_type)
        plan = engine_memory(bundle.manifest, kind)
        require_room(plan.one_request, self.device.free_memory(), gpu.name, bundle.manifest)
        self.batch_sizes: Sequence[int] | None = common_batch_sizes(bundle.manifest, kind)
        self._kind: LibraryKind = kind
        self.loader = Loader(library, (kernels or kernel_folder()) / kernel_file(bundle, kind, gpu.name))
        self._engines: dict[str, Engine] = {}
        self._workspace = self.device.empty((0,), np.uint8)
        self._run_target = RunTarget(self.device.stream, 0, 0)
        self._pool = CachePool(self.device, capacities(bundle, kind))
        self._graphs: OrderedDict[object, Callable[[], None]] = OrderedDict()
        self._captures = True

    def open(self, graphs: Sequence[str]) -> None:
        """See `Backend.open`."""
        unloaded = [graph for graph in graphs if graph not in self._engines]
        for graph in unloaded:
            record = self.bundle.engine(graph, self._kind)
            if record is None:
                raise BackendError(f"the bundle has no {self._kind} engine of {graph}: compile it again")
            self._engines[graph] = self.loader.load(self.bundle.folder / record.file, record)
        self._reserve(max((self._engines[graph].workspace for graph in unloaded), default=0))

    def _reserve(self, size: int) -> None:
        """One block for the activations of whichever engine runs."""
        if size <= self._run_target.workspace_bytes:
            return
        plan = replace(engine_memory(self.bundle.manifest, self._kind), weights=0, activations=size + ALIGNMENT)
        require_room(plan.one_request, self.device.free_memory(), self._gpu, self.bundle.manifest)
        self._workspace = self.device.empty((size + ALIGNMENT,), np.uint8)
        self._run_target = RunTarget(self.device.stream, -(-self._workspace.address // ALIGNMENT) * ALIGNMENT, size)
        self.forget_graphs()  # they know the block before
        for engine in self._engines.values():
            engine.forget()

    def cache(self, record: SegmentRecord, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> SegmentCache:
        """See `CachePool.take`."""
        return self._pool.take(record, shapes, dtype)

    def bind(
        self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], cache: SegmentCache | None
    ) -> TensorRTSegment:
        """See `Backend.bind`."""
        if graph not in self._engines:
            self.open([graph])
        return TensorRTSegment(self._engines[graph], inputs, outputs, cache, self)

    @property
    def captured(self) -> int:
        """CUDA graphs that are kept."""
        return len(self._graphs)

    def forget_graphs(self) -> None:
        """Capture anew."""
        self._graphs.clear()

    @property
    def run_target(self) -> RunTarget:
        """Where contexts run now; another one when the memory for activations has grown."""
        return self._run_target

    def batch_refusal(self, graph: str) -> str | None:
        """See `Backend.batch_refusal`: what was compiled says so, and the memory that is free for the slabs."""
        return self._batch_refusal

    @cached_property
    def _batch_refusal(self) -> str | None:
        if not self.batch_sizes:
            command = compile_command(self.bundle.folder, self.bundle.manifest, self._kind)
            return f"the engines of {self.name} decode one row: compile them with several, {command} --max-batch-size 8"
        slabs = engine_memory(self.bundle.manifest, self._kind).slabs
        free = self.device.free_memory()
        if slabs <= free:
            return None
        return (
            f"the caches of {max(self.batch_sizes)} requests take {in_bytes(slabs)}, {self._gpu} has {in_bytes(free)} "
            "free: compile with a smaller --max-batch-size, or build with a smaller --max-kv-cache-capacity"
        )

    def chain(self, segments: Sequence[BoundSegment]) -> Callable[[], None]:
        """Run bound segments in turn: once as they are, then captured as one CUDA graph and replayed.

        Where the same buffers come again with another request, its first step replays the graph of the one before.
        """
        bound = [segment for segment in segments if isinstance(segment, (TensorRTSegment, CudaGreedyTokens))]
        key = tuple(segment.key for segment in bound)

        def plain() -> None:
            for segment in bound:
                segment.run()

        def run() -> None:
            if key in self._graphs:
                self._graphs.move_to_end(key)
                self._graphs[key]()
                return
            plain()  # compiles kernels and allocates: neither may happen while a stream is captured
            if self._captures and all(segment.capturable for segment in bound):
                self._capture(key, plain)

        return run

    def _capture(self, key: object, run: Callable[[], None]) -> None:
        """Keep a run as a graph; where the library does what cannot be captured, steps are run plainly from now on."""
        try:
            self._graphs[key] = self.device.capture(run)
        except BackendError:
            self._captures = False
        if len(self._graphs) > CAPTURED + len(self.batch_sizes or ()):
            self._graphs.popitem(last=False)


def open_backend(bundle: Bundle, name: LibraryKind, device: str, threads: int) -> TensorRTBackend:
    """The engines of one kind on the first GPU; see `TensorRTBackend`."""
    return TensorRTBackend(bundle, name)


class Runner(Protocol):
    """Where engines run: their device, its stream, and the block for activations."""

    @property
    def device(self) -> CudaDevice:
        """Of all buffers."""

    @property
    def run_target(self) -> RunTarget:
        """Of the next run."""


class TensorRTSegment:
    """An engine bound to buffers that this object keeps alive, as `BoundSegment` says."""

    def __init__(
        self,
        engine: Engine,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        cache: SegmentCache | None,
        backend: Runner,
    ) -> None:
        self._backend = backend
        self._cache = cache
        self._token = object()  # what the context remembers of this binding; it must not keep the buffers alive
        available = dict(inputs) | cache_buffers("past", cache)
        required = [tensor for tensor in engine.tensors if tensor.is_input]
        missing = [tensor.name for tensor in required if tensor.name not in available]
        if missing:
            raise BackendError(f"{engine.record.file} wants {', '.join(missing)}: compile the bundle again")
        self.inputs = {tensor.name: device_array(available[tensor.name]) for tensor in required}
        # 1. The profile of these shapes, and the context that runs it; caches of a plain network follow the profile.
        self._shapes = {name: buffer.shape for name, buffer in self.inputs.items()}
        caches = cache_buffers("past", cache) if engine.is_plain else {}
        self._profile = engine.profile_for({name: s for name, s in self._shapes.items() if name not in caches})
        self._shapes |= engine.cache_shapes(self._profile, {name: self._shapes[name] for name in caches})
        self._context: Context = engine.context(self._profile)
        # 2. Buffers of all outputs, also of those that nobody wants: an engine writes every one.
        self.outputs = outputs
        written = dict(outputs) | cache_buffers("present", cache)
        results = [tensor.name for tensor in engine.tensors if not tensor.is_input]
        self._buffers = self.inputs | {name: device_array(written[name]) for name in results if name in written}
        for tensor in engine.tensors:
            if tensor.name in self._buffers:
                _check(engine, tensor, self._buffers[tensor.name])
        (rows, appended) = appended_rows(engine, self._shapes, cache, backend.device)
        self._buffers |= {rows_name(name): buffer for name, buffer in rows.items()}
        for name in set(results) - self._buffers.keys():
            size = self._context.output_bytes(name, self._profile, self._shapes, backend.run_target)
            self._buffers[name] = backend.device.empty((size,), np.uint8)
        # 3. Where an engine gives rows, the launch behind it that brings them into the caches.
        self._append = backend.device.append(appended, self.inputs[KV_LENGTHS]) if appended else None
        self._addresses = {name: buffer.address for name, buffer in sorted(self._buffers.items())}

    @property
    def key(self) -> object:
        """Equal for segments whose captured graphs are interchangeable."""
        appended = None if self._append is None else self._append.key
        return id(self._context), self._profile, tuple(self._addresses.items()), appended

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can be captured of it."""
        return self._context.capturable(self._backend.run_target.stream)

    def run(self) -> None:
        """Enqueue a run."""
        self._context.run(self._token, self._profile, self._shapes, self._addresses, self._backend.run_target)
        if self._append is not None:
            self._append.run()


def capacities(bundle: Bundle, kind: LibraryKind) -> dict[str, tuple[int, ...]]:
    """Slots of each layer's cache by segment; the prefill graph of the fixed mode and its decode graph share them.

    Raises:
        BackendError: they do not agree.
    """
    slots: dict[str, tuple[int, ...]] = {}
    for segment in bundle.manifest.segments:
        engines = [bundle.engine(graph, kind) for graph in segment.graphs]
        distinct = {engine.capacities for engine in engines if engine is not None}
        if len(distinct) != 1:
            raise BackendError(f"the {kind} engines of segment {segment.name} differ in their caches: compile it again")
        slots[segment.name] = distinct.pop()
    return slots


def kernel_folder() -> Path:
    """Where kernels compiled on this machine are kept: $XDG_CACHE_HOME or ~/.cache."""
    return user_cache("runtime")


def kernel_file(bundle: Bundle, kind: LibraryKind, gpu: str) -> str:
    """One file for a set of engines on a kind of GPU."""
    keys = sorted(engine.key for engine in bundle.manifest.engines if engine.kind == kind)
    return hashlib.sha256("\n".join((gpu, *keys)).encode()).hexdigest()[:32] + ".kernels"


def cache_buffers(prefix: str, cache: SegmentCache | None) -> dict[str, Buffer]:
    """The buffers of a cache under the names of an engine's inputs ("past") or outputs ("present")."""
    return {} if cache is None else cache.named(prefix)


def appended_rows(
    engine: Engine, shapes: Mapping[str, tuple[int, ...]], cache: SegmentCache | None, device: CudaDevice
) -> tuple[dict[str, DeviceArray], list[AppendedRows]]:
    """What a plain engine gives for its caches, by the caches' names as inputs, and where each row of it belongs.

    Another engine gives nothing.

    Raises:
        BackendError: tokens that a prefill does not see are in the caches.
    """
    given: dict[str, DeviceArray] = {}
    appended: list[AppendedRows] = []
    if not engine.is_plain or cache is None:
        return given, appended
    outputs = {tensor.name: tensor.shape for tensor in engine.tensors if not tensor.is_input}
    for index, (name, buffer) in enumerate(cache_buffers("past", cache).items()):
        target = device_array(buffer)
        if cache.lengths[index // 2] and shapes[name] != target.shape:
            raise BackendError(f"{engine.record.file} cannot continue what is in a cache: prefill it from the start")
        (_, heads, tokens, channels) = outputs[rows_name(name)]
        batch = shapes["hidden"][0]
        shape = (batch, heads, shapes["hidden"][1] if tokens == -1 else tokens, channels)
        given[name] = device.empty(shape, target.dtype)
        for row in range(batch):  # kv_len has the lengths of all rows in the first layer, then in the second
            part = slice(row, row + 1)
            appended.append(AppendedRows(given[name][part], target[part], index // 2 * batch + row))
    return given, appended


def _check(engine: Engine, tensor: Tensor, buffer: DeviceArray) -> None:
    """What is bound by address must be of the engine's type and size: nothing else would notice."""
    alike = [expected in (-1, size) for expected, size in zip(tensor.shape, buffer.shape, strict=False)]
    same = len(buffer.shape) == len(tensor.shape) and all(alike) and buffer.dtype.name == tensor.dtype
    if not same or not buffer.contiguous:
        raise BackendError(
            f"{engine.record.file} has {tensor.name} as {tensor.dtype} {tensor.shape}, got {buffer.dtype} "
            f"{tuple(buffer.shape)}: compile the bundle again"
        )
