"""Engines of the building blocks by TensorRT or TensorRT-RTX, compiled on the spot and run as those of a bundle are.

What `ff-run doctor --engines` proves where there is no bundle: this library on this GPU, with the networks that it
would be given, each case of the proof as a profile. Knows no bundle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from framefusion.errors import BackendError
from framefusion.export.engines.builder import EngineSpec
from framefusion.export.engines.tensorrt.build import build_engine
from framefusion.export.engines.tensorrt.profiles import DECODE_TOKENS, graph_axes
from framefusion.runtime.backends.base import BlockGraph, empty_cache
from framefusion.runtime.backends.buffer import Buffer, float_type
from framefusion.runtime.backends.cuda.device import CudaDevice
from framefusion.runtime.backends.fit import NO_GPU
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.backends.table import Device
from framefusion.runtime.backends.tensorrt.backend import ALIGNMENT, TensorRTSegment
from framefusion.runtime.backends.tensorrt.engine import Loader, RunTarget
from framefusion.runtime.backends.tensorrt.library import PLAIN, Library, load_library, plain_options
from framefusion.runtime.format.engine_record import EngineKind, EngineRecord, ProfileRecord
from framefusion.runtime.format.manifest import SegmentRecord
from framefusion.runtime.machine.gpu import find_gpu
from framefusion.runtime.proof.blocks import cases

DTYPE = "float16"


def block_graphs(kind: EngineKind, device: Device, folder: Path) -> Iterator[BlockGraph]:
    """An engine for the GPU at hand, and what runs it.

    Args:
        kind: of the engine.
        device: "cuda".
        folder: an empty one for what is compiled, kept while the backend is in use.

    Raises:
        BackendError: the library does not load, there is no GPU, or the library builds for none like it.
    """
    library = load_library(kind)
    gpu = find_gpu()
    if gpu is None:
        raise BackendError(f"{NO_GPU[0]}: {NO_GPU[1]}")
    spec = block_spec(library, library.check_targets((gpu.capability,)))
    path = folder / f"blocks-{DTYPE}.engine"
    facts = build_engine(spec, path, library=library.with_new_messages())
    record = EngineRecord(
        spec.kind, spec.graph.name, path.name, library.module.__name__, library.version, spec.targets, DTYPE, "",
        spec.profiles, facts.tensors, spec.capacities, 0, spec.options,
    )  # fmt: skip
    yield BlockGraph(library.variants[0], DTYPE, BlockEngine(library, path, record))


def block_spec(library: Library, targets: tuple[str, ...]) -> EngineSpec:
    """A profile for each length of the cases, over whole caches: the lengths alone say what is there."""
    graph = Path(cases.__file__).with_name(cases.graph_name("portable", DTYPE))
    axes = graph_axes(graph)
    lengths = {case.inputs["hidden"].shape[1] for case in cases.block_cases(float_type(DTYPE))}
    sizes = {"capacity_0": cases.CAPACITY}
    profiles = []
    for tokens in sorted(lengths, reverse=True):
        shapes = {
            name: (tuple(axis if isinstance(axis, int) else (sizes | {"tokens": tokens})[axis] for axis in shape),)
            for name, shape in axes.items()
        }
        name = "decode" if tokens < DECODE_TOKENS else f"prefill {tokens}"
        profiles.append(ProfileRecord(name, tokens, shapes))
    options = plain_options(one_length=True) if library.variants[0] == PLAIN else {}
    return EngineSpec(graph, library.kind, targets, DTYPE, (cases.CAPACITY,), tuple(profiles), options)


class BlockEngine:
    """One engine behind the interface of a backend, as far as building blocks need it.

    Args:
        library: loaded.
        path: the engine.
        record: of it.
    """

    def __init__(self, library: Library, path: Path, record: EngineRecord) -> None:
        self.device = CudaDevice(float_type(DTYPE).type)
        self._engine = Loader(library).load(path, record)
        size = self._engine.workspace
        self._workspace = self.device.empty((size + ALIGNMENT,), np.uint8)
        address = -(-self._workspace.address // ALIGNMENT) * ALIGNMENT
        self.run_target = RunTarget(self.device.stream, address, size)

    def cache(self, record: SegmentRecord, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> SegmentCache:
        """Caches of zeros of these very shapes."""
        return empty_cache(self.device, shapes, dtype)

    def bind(
        self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], cache: SegmentCache | None
    ) -> TensorRTSegment:
        """See `Backend.bind`."""
        return TensorRTSegment(self._engine, inputs, outputs, cache, self)
