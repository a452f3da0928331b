"""Engines that torch's inductor compiled ahead of time (.pt2), for CPUs and for GPUs where TensorRT does not run.

libtorch runs them: torch is imported when the first one is opened, and by nothing before. An engine holds no weight; it
is given those of the bundle's own files, memory-mapped on the CPU, so they are on the disk and in memory once, and
segments of one structure share one engine. No GPU has run this yet.

A package's metadata says where its weights lie (PLACES): {"file": beside the graph, "tensors": {name: [offset,
shape]}}, or several of them for a weight whose last axis holds theirs side by side.
Inputs and outputs are those of the engine's record, in its order; caches are inputs that are written to. They lie in
memory slot after slot, [C, Hkv, hd], so that an engine can be shown only the slots that are taken, without a copy:
attention costs what the tokens cost and not what the cache could hold. Engines of a GPU are shown whole caches where
their attention reads the lengths itself (option "caches"): a step then has the shapes of every other one, and is
replayed as one CUDA graph.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from framefusion.errors import BackendError, BundleError
from framefusion.runtime.backends.base import BoundSegment, Device, empty_cache
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.cuda.decode.checked import CheckedGraphs
from framefusion.runtime.backends.fit import compile_command, require_fit
from framefusion.runtime.backends.host import HostBackend
from framefusion.runtime.backends.inductor.device import TorchDevice, as_tensor, load_torch
from framefusion.runtime.backends.inductor.step import (
    MODEL,
    STEP,
    is_slotwise,
    shown_names,
    step_record,
    whole_blocks,
)
from framefusion.runtime.backends.inductor.tokens import tensor_of
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.bundle_files import place
from framefusion.runtime.format.engine_record import EngineKind, EngineRecord
from framefusion.runtime.format.manifest import SegmentRecord
from framefusion.runtime.machine.cpu import default_threads
from framefusion.runtime.trust.engines import require_vouched
from framefusion.storage.bounded_json import parse_json

KIND: EngineKind = "inductor"
PLACES = "framefusion.places"
_CPU = "cpu"


class _Place(NamedTuple):
    """Where a weight lies in a file of weights, in bytes, and its shape."""

    offset: int
    shape: list[int]


class InductorBackend(HostBackend):
    """The inductor engines of a bundle.

    Args:
        bundle: what holds them.
        device: what they were compiled for, "cpu" or "cuda".
        threads: of the CPU; 0 leaves torch's number, or as many as this process has cores.

    Raises:
        BackendError: torch or an engine is missing, or an engine is of another torch, processor or device.
        TrustError: nobody vouches for the engines, which are shared libraries.
    """

    name: str = KIND

    def __init__(self, bundle: Bundle, device: str = _CPU, threads: int = 0) -> None:
        require_vouched(bundle, KIND)
        require_fit(bundle.folder, bundle.manifest, KIND)
        self._bundle = bundle
        self._device_name = device
        self._torch = load_torch()
        self._graphs: CheckedGraphs | None
        if device == _CPU:
            super().__init__()
            most = 0 if threads else default_threads()
            if most:
                threads = min(most, self._torch.get_num_threads())  # whoever asked torch for fewer gets fewer
            self.host_threads = threads
            self._graphs = None
        else:
            there = TorchDevice(device, bundle.manifest.model.float_type)
            super().__init__(chunk=None, device=there)  # no mask is computed that a shorter chunk would save
            self.host_threads = None
            self._graphs = CheckedGraphs(there)
        if threads:
            self._torch.set_num_threads(threads)
        self._weights: dict[Path, Any] = {}  # files, mapped
        self._copies: dict[object, Any] = {}  # graphs over one file share its tensors
        self._engines: dict[tuple[str, str], Engine] = {}  # by graph and model

    def open(self, graphs: Sequence[str]) -> None:
        """See `Backend.open`."""
        for graph in graphs:
            for model in self._models(graph):
                self.engine(graph, model)

    def engine(self, graph: str, model: str = MODEL) -> Engine:
        """A model of a graph's engine, loaded."""
        if (graph, model) not in self._engines:
            self._engines[graph, model] = self._load(self._record(graph), model)
        return self._engines[graph, model]

    def _record(self, graph: str) -> EngineRecord:
        record = self._bundle.engine(graph, KIND)
        if record is None:
            raise BackendError(f"{self._bundle.folder} holds no {KIND} engine of {graph}: compile it again")
        return record

    def _models(self, graph: str) -> tuple[str, ...]:
        """What the engine of a graph holds: a graph that decodes and does nothing else is a step alone."""
        if STEP not in self._record(graph).options:
            return (MODEL,)
        prefills = {segment.prefill for segment in self._bundle.manifest.segments}
        return (MODEL, STEP) if graph in prefills else (STEP,)

    def batch_refusal(self, graph: str) -> str | None:
        """See `Backend.batch_refusal`: the engine's record says whether it holds a step of several rows."""
        if STEP in self._models(graph):
            return None
        if self._device_name != _CPU:
            return f"{self.name}'s engines of a GPU decode one row at a time, no GPU has run a batch of them yet"
        command = compile_command(self._bundle.folder, self._bundle.manifest, KIND)
        return (
            f"{self._record(graph).file} takes one row, as it was compiled before there were batches: compile it "
            f"again, {command}"
        )

    def _load(self, record: EngineRecord, model: str) -> Engine:
        path = self._bundle.folder / record.file
        if record.targets[0].split()[0] != self._device_name:
            raise BackendError(
                f"{record.file} was compiled for {record.targets[0]}, {self._device_name} was requested: run it "
                f"there, or compile with --device {self._device_name}"
            )
        try:
            package = load_package(path, self._device_name, model)
            metadata = package.get_metadata()
            places = parse_json(metadata[PLACES].encode())
            if model == STEP:
                record = step_record(record, metadata)
            tensors = self._tensors(self._weights_of(record.graph, places["file"]), places["tensors"], record.dtype)
            package.load_constants(tensors, check_full_update=True, user_managed=True)
        except (RuntimeError, KeyError, ValueError, TypeError, OSError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise BundleError(
                f"{path} cannot be loaded by torch {self._torch.__version__} ({reason}): compile it again"
            ) from error
        return Engine(self._torch, record, package, tensors)

    def _weights_of(self, graph: str, name: str) -> Path:
        """The file of weights that a package names: beside its graph, within the bundle, and listed."""
        beside = str(PurePosixPath(graph).parent / name)
        if beside not in self._bundle.manifest.files:
            raise ValueError(f"its weights are in {beside!r:.80}, which the manifest does not list")
        return place(self._bundle.folder, beside)

    def _tensors(self, path: Path, places: Mapping[str, Any], dtype: str) -> dict[str, Buffer]:
        """The weights of an engine by name, each at one place of a file, or at several, side by side."""
        return {
            name: self._tensor(path, tuple(_Place(*piece) for piece in pieces), name, dtype)
            for name, pieces in ((name, [at] if isinstance(at[0], int) else at) for name, at in places.items())
        }

    def _tensor(self, path: Path, pieces: tuple[_Place, ...], name: str, dtype: str) -> Buffer:
        """Views of a file: mapped on the CPU, which reads what is used; copies on a GPU, one for all graphs."""
        torch = self._torch
        if path not in self._weights:  # private pages: nothing is written
            self._weights[path] = torch.from_numpy(np.memmap(path, mode="c", dtype=np.uint8))
        flat = self._weights[path]
        kind = getattr(torch, dtype)
        views = []
        for offset, shape in pieces:
            size = math.prod(shape) * kind.itemsize
            if min((offset, *shape)) < 0 or offset + size > len(flat):
                raise ValueError(f"{name!r:.60} lies at {offset} with shape {shape}, the file has {len(flat)} bytes")
            views.append(flat[offset : offset + size].view(kind).view(shape))
        if len(pieces) == 1 and self._device_name == _CPU:
            view: Buffer = views[0]
            return view
        key = path, repr(pieces), dtype
        if key not in self._copies:
            there = [view.to(self._device_name) for view in views]
            self._copies[key] = there[0] if len(there) == 1 else torch.cat(there, -1)
        copied: Buffer = self._copies[key]
        return copied

    def cache(self, record: SegmentRecord, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> SegmentCache:
        """Caches of zeros, slot after slot in memory: [B, C, Hkv, hd] as [B, Hkv, C, hd]; whole blocks for a step."""
        if STEP in self._models(record.decode):
            shapes = [(*shape[:2], whole_blocks(shape[2]), *shape[3:]) for shape in shapes]
        return slotwise_cache(self.device, shapes, dtype)

    def bind(
        self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], cache: SegmentCache | None
    ) -> InductorSegment:
        """See `Backend.bind`: a token of each row, whose scores nobody wants, is the step's, one row's as well."""
        models = self._models(graph)
        is_step = STEP in models and inputs["hidden"].shape[1] == 1 and not {"similarity", "importance"} & set(outputs)
        return InductorSegment(self.engine(graph, STEP if is_step else MODEL), inputs, outputs, cache)

    def chain(self, segments: Sequence[BoundSegment]) -> Callable[[], None]:
        """See `Backend.chain`: a step is replayed as a CUDA graph where its shapes are those of the next one, too."""
        bound = [segment for segment in segments if isinstance(segment, InductorSegment)]
        if self._graphs is None or any(segment.is_cut for segment in bound):
            return super().chain(segments)
        return self._graphs.chain(bound, segments[len(bound) :])


def open_backend(bundle: Bundle, name: str, device: str, threads: int) -> InductorBackend:
    """The engines of a bundle where they were compiled for; see `InductorBackend`."""
    return InductorBackend(bundle, device, threads)


class Engine:
    """A package with its weights, and what it is bound to by name."""

    def __init__(self, torch: ModuleType, record: EngineRecord, package: Any, tensors: Mapping[str, Buffer]) -> None:
        self.torch = torch
        self.shown = {name: layer for layer, name in enumerate(shown_names(record))}
        self.record = record
        self._package = package
        self._tensors = tensors  # the package has their addresses only
        self.inputs = [tensor for tensor in record.tensors if tensor.mode == "input"]
        self.outputs = [tensor.name for tensor in record.tensors if tensor.mode == "output"]

    def tensor(self, buffer: Buffer) -> Buffer:
        """A buffer of either device as a tensor over its memory."""
        tensor: Buffer = as_tensor(self.torch, buffer) if isinstance(buffer, np.ndarray) else buffer
        return tensor

    def run(self, arguments: list[Buffer]) -> dict[str, Buffer]:
        """Compute the outputs, by name; the caches among the arguments change in place."""
        try:
            return dict(zip(self.outputs, self._package.loader.run(arguments), strict=True))
        except RuntimeError as error:
            shapes = [tuple(argument.shape) for argument in arguments]
            reason = str(error).splitlines()[0]
            raise BackendError(f"{self.record.file} refused inputs of shapes {shapes} ({reason})") from error


class InductorSegment:
    """An engine and the buffers it reads and writes."""

    def __init__(
        self, engine: Engine, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], cache: SegmentCache | None
    ) -> None:
        self._engine = engine
        self.outputs = outputs
        past = {} if cache is None else cache.named("past")
        names = {tensor.name for tensor in engine.inputs}
        self.inputs = {name: buffer for name, buffer in inputs.items() if name in names}
        self._arguments = {name: engine.tensor(buffer) for name, buffer in {**self.inputs, **past}.items()}
        self._targets = {name: engine.tensor(buffer) for name, buffer in outputs.items()}
        self._kv_len = self.inputs.get("kv_len") if past else None
        # the CPU's engines were always shown what is taken alone
        caches = engine.record.options.get("caches", "cut" if isinstance(self._kv_len, np.ndarray) else "whole")
        self.is_cut = self._kv_len is not None and caches == "cut"
        self._check()

    def _check(self) -> None:
        """An engine trusts its inputs: one of another type or size would be read beyond its end."""
        rows = self._arguments["hidden"].shape[0] if self._engine.shown else 1
        for record in self._engine.inputs:
            if record.name in self._engine.shown:
                continue
            tensor = self._arguments[record.name]
            dtype = str(tensor.dtype).removeprefix("torch.")
            shape = tuple(tensor.shape)
            has_rank = len(shape) == len(record.shape)
            fits = has_rank and all(a in (-1, b) for a, b in zip(record.shape, shape, strict=True))
            if self._engine.shown:  # the sizes that are free together
                fits = fits and shape[0] == rows * (len(self._engine.shown) if record.name == "kv_len" else 1)
            if dtype != record.dtype or not fits:
                raise BackendError(
                    f"{record.name} is {dtype} {shape}, {self._engine.record.file} takes {record.dtype} {record.shape}"
                )
            if record.name.startswith("past_") and not is_slotwise(tensor):
                raise BackendError(
                    f"{record.name} does not lie slot after slot in memory, as engines of {KIND} read it"
                )

    def run(self) -> None:
        """See `BoundSegment.run`."""
        if self._engine.shown:
            arguments = self._arguments | self._shown()
        else:
            arguments = self._cut() if self.is_cut else self._arguments
        results = self._engine.run([arguments[record.name] for record in self._engine.inputs])
        for name, target in self._targets.items():
            tensor_of(target).copy_(results[name])

    def _shown(self) -> dict[str, Buffer]:
        """Sizes without memory: of each layer the slots of its longest row, in whole blocks as far as there are any."""
        longest = tensor_of(self._arguments["kv_len"]).view(len(self._engine.shown), -1).amax(1).tolist()
        torch = self._engine.torch
        sizes = {
            name: min(whole_blocks(longest[layer]), self._arguments[f"past_key_{layer}"].shape[2])
            for name, layer in self._engine.shown.items()
        }
        return {name: torch.empty((size, 0), dtype=torch.uint8) for name, size in sizes.items()}

    @property
    def key(self) -> object:
        """Equal for segments whose captured launches are interchangeable."""
        tensors = {**self._arguments, **self._targets}
        places = ((name, tensor_of(each).data_ptr(), tuple(each.shape)) for name, each in sorted(tensors.items()))
        return id(self._engine), tuple(places)

    def _cut(self) -> dict[str, Buffer]:
        """The arguments, of each cache the slots that are taken; lengths on a GPU are waited for."""
        assert self._kv_len is not None
        lengths = tensor_of(self._kv_len).tolist()
        return {
            name: argument[:, :, : lengths[int(name.rsplit("_", 1)[1])]] if name.startswith("past_") else argument
            for name, argument in self._arguments.items()
        }


def load_package(path: Path, device: str, model: str = MODEL) -> Any:
    """A model of a package as torch runs it: without its locks between threads, whose events no CUDA graph can hold."""
    load = importlib.import_module("torch._inductor.package").load_package
    return load(str(path), model, run_single_threaded=device != _CPU)


def slotwise_cache(device: Device, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> SegmentCache:
    """Caches of zeros of these shapes, slot after slot in memory: [B, C, Hkv, hd] as [B, Hkv, C, hd]."""
    cache = empty_cache(device, [(rows, slots, heads, hd) for rows, heads, slots, hd in shapes], dtype)
    keys = [_swapped(buffer) for buffer in cache.keys]
    values = [_swapped(buffer) for buffer in cache.values]
    return SegmentCache(keys, values, cache.lengths)


def _swapped(buffer: Buffer) -> Buffer:
    """[B, C, Hkv, hd] as [B, Hkv, C, hd] over the same memory; arrays and tensors both can."""
    swapped: Buffer = tensor_of(buffer).swapaxes(1, 2)
    return swapped
