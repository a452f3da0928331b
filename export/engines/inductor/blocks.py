"""Engines of the building blocks by inductor, compiled on the spot and run as those of a bundle are.

What `ff-run doctor --engines` proves where there is no bundle: this torch, its compiler, and the form of attention that
`compile` would choose here. Knows no bundle.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from numpy.typing import DTypeLike

from framefusion.export.engines.inductor.build import InductorSpec, attention_options, build_engine, target_of
from framefusion.export.engines.inductor.choice import Geometry
from framefusion.export.graphs.tracing.blocks import Blocks
from framefusion.export.plan.build_plan import WEIGHTS
from framefusion.runtime.backends.base import BlockGraph, Device
from framefusion.runtime.backends.buffer import Buffer, float_type
from framefusion.runtime.backends.host import HOST
from framefusion.runtime.backends.inductor.backend import KIND, Engine, InductorSegment, load_package, slotwise_cache
from framefusion.runtime.backends.inductor.device import TorchDevice, load_torch
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.backends.table import Device as DeviceName
from framefusion.runtime.format.engine_record import EngineKind, EngineRecord
from framefusion.runtime.format.manifest import SegmentRecord
from framefusion.runtime.proof.blocks import cases

DTYPES: Mapping[str, tuple[str, ...]] = {"cpu": ("float32",), "cuda": ("bfloat16",)}  # half a minute each
_NO_WEIGHTS = bytes(64)


def block_graphs(kind: EngineKind, device: DeviceName, folder: Path) -> Iterator[BlockGraph]:
    """An engine in each type, and what runs it.

    Args:
        kind: of the engines; there is one.
        device: where they are to run.
        folder: an empty one for what is compiled, kept while the backends are in use.

    Raises:
        BackendError: no engine can be compiled here, with the reason.
    """
    for dtype in DTYPES[device]:
        yield BlockGraph("", dtype, BlockEngine(compiled(device, dtype, folder), device, dtype, folder))


def compiled(device: DeviceName, dtype: str, folder: Path) -> EngineRecord:
    """An engine of the blocks in a folder, and its record."""
    target, options = target_of(device)
    geometry = Geometry(cases.HEADS, cases.KV_HEADS, cases.HEAD_DIM, getattr(torch, dtype), device)
    # 1. The graph beside weights of no byte that counts: every weight of the blocks is an input.
    name = cases.graph_name("portable", dtype)
    shutil.copy(Path(cases.__file__).with_name(name), folder / name)
    (folder / WEIGHTS).write_bytes(_NO_WEIGHTS)
    # 2. As a segment of a bundle is compiled, with the form of attention that is measured here.
    spec = InductorSpec(
        *(folder / name, KIND, (target,), dtype),
        options=options | attention_options(geometry),
        module=lambda: Blocks().to("meta"),
    )
    file = f"blocks-{dtype}.pt2"
    facts = build_engine(spec, folder / file, lambda _: None)
    return EngineRecord(
        KIND, name, file, "torch", torch.__version__, (target,), dtype, "", (), facts.tensors, (), 0, spec.options
    )


class BlockEngine:
    """One engine behind the interface of a backend, as far as building blocks need it.

    Args:
        record: of it.
        device: that it was compiled for.
        dtype: of it.
        folder: where it lies.
    """

    def __init__(self, record: EngineRecord, device: DeviceName, dtype: str, folder: Path) -> None:
        self.device: Device = HOST if device == "cpu" else TorchDevice(device, float_type(dtype).type)
        self._engine = Engine(load_torch(), record, load_package(folder / record.file, device), {})

    def cache(self, record: SegmentRecord, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> SegmentCache:
        """See `InductorBackend.cache`."""
        return slotwise_cache(self.device, shapes, dtype)

    def bind(
        self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], cache: SegmentCache | None
    ) -> InductorSegment:
        """See `Backend.bind`."""
        return InductorSegment(self._engine, inputs, outputs, cache)
