"""The table of backends, the best first: what runs a bundle, and what compiles engines for it.

A row is data. It names functions as "module:attribute" and imports nothing, so a flag, a check of a manifest and
`--help` read it while no library is loaded; what a row names is imported by `load` when it is wanted. Flags, the choice
of a backend, the kinds of engines that a manifest may hold, and what compiles them follow from these rows: adding a
backend is a row and its folders. Knows no bundle, no machine and no library.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Device = Literal["cuda", "cpu"]
DEVICES: tuple[Device, ...] = get_args(Device)


@dataclass(frozen=True)
class EngineTraits:
    """What engines of a kind are compiled from, and what they need where they run.

    Attributes:
        builder: class of an `export.engines.builder.EngineBuilder`. All modules beside its own decide an engine's
            bytes: they are part of its key.
        needs: what has to be installed where the engines run, for `ff-export inspect`.
        traced: compiled from torch's graphs, traced from the checkpoint's configuration; else from the bundle's. Then
            the code of our ops is part of the key, too.
        weights_inside: an engine holds its weights; else it is given the bundle's own files of weights.
        dialects: of graphs that an engine can be compiled from, the usual one first; () takes any.
        dtypes: of these graphs, the usual one first; () takes any.
        quantized: it compiles linear maps with weights in 4 or 8 bits.
        oldest: version of the library that builds and runs any of them; () takes any.
        blocks: function (kind, device, folder) -> iterator of `base.BlockGraph`: engines of the building blocks,
            compiled here, for `ff-run doctor --engines`. "" where none are.
        header: function (file, record) -> why the library refuses an engine by its first bytes, and whether compiling
            it again mends that, or None. "" where no library reads headers.
    """

    builder: str
    needs: str
    traced: bool = False
    weights_inside: bool = True
    dialects: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    quantized: bool = False
    oldest: tuple[int, ...] = ()
    blocks: str = ""
    header: str = ""


@dataclass(frozen=True)
class BackendKind:
    """A backend. One that needs something else on each kind of device has a row for each.

    Attributes:
        name: what a user says, `--backend NAME`; its engines are of the kind NAME and lie in engines/NAME.
        devices: where it runs. With several, engines run where they were compiled for.
        library: the module that runs it. A manifest that names another one for its engines is refused.
        open: function (bundle, name, device, threads) -> `base.Backend`.
        problem: function (row, bundle, machine) -> why it cannot run the bundle there and what mends that, or None.
        extra: of this package, installs the library; None where it is installed by its own name.
        cuda_buffers: on a GPU its buffers are those of backends/cuda, which need cuda-bindings.
        engines: of its own; None where it runs the bundle's graphs themselves.
        results: device -> file of tools/bench/results that shows it on a device of that kind, with the device's name.
            Without one it is called experimental there.
        computes: type of its products, where that is not the bundle's: then limits of errors are those of that type,
            and it is never taken by itself.
        caches: type of its KV caches, where that is not the bundle's: then limits of errors are those of a type of 8
            bits, and it is never taken by itself.
        wrong_once: device and version where it answered wrongly without an error. Such a backend is never taken by
            itself on a device that has not reproduced the bundle's golden: framefusion.runtime.proof.
        blocks: function (device, machine, folder) -> iterator of `base.BlockGraph`: the graphs of building blocks that
            it can run here. "" where it runs engines, which are compiled first.
        machine_problem: function (row, machine) -> what this machine lacks, whatever is to run, or None; of those that
            have blocks.
    """

    name: str
    devices: tuple[Device, ...]
    library: str
    open: str
    problem: str = "framefusion.runtime.backends.fit:engine_problem"
    extra: str | None = None
    cuda_buffers: bool = True
    engines: EngineTraits | None = None
    results: Mapping[Device, str] = field(default_factory=dict)
    computes: str = ""
    caches: str = ""
    wrong_once: str = ""
    blocks: str = ""
    machine_problem: str = ""


_BACKENDS = "framefusion.runtime.backends"
_ENGINES = "framefusion.export.engines"

BACKENDS: tuple[BackendKind, ...] = (
    BackendKind(
        "tensorrt",
        ("cuda",),
        library="tensorrt",
        open=f"{_BACKENDS}.tensorrt.backend:open_backend",
        extra="tensorrt",
        engines=EngineTraits(
            builder=f"{_ENGINES}.tensorrt.build:TensorRTBuilder",
            blocks=f"{_ENGINES}.tensorrt.blocks:block_graphs",
            needs="needs tensorrt of this version and an NVIDIA driver; no torch",
            dialects=("portable",),
            dtypes=("float16", "bfloat16"),
            oldest=(10, 3),
        ),
    ),
    BackendKind(
        "tensorrt-rtx",
        ("cuda",),
        library="tensorrt_rtx",
        open=f"{_BACKENDS}.tensorrt.backend:open_backend",
        extra="tensorrt-rtx",
        engines=EngineTraits(
            builder=f"{_ENGINES}.tensorrt.build:TensorRTBuilder",
            blocks=f"{_ENGINES}.tensorrt.blocks:block_graphs",
            needs="needs tensorrt_rtx of this release and an NVIDIA driver; no torch",
            dialects=("portable",),
            dtypes=("float16", "bfloat16"),
            quantized=True,
            header=f"{_BACKENDS}.tensorrt.fit:header_problem",
        ),
    ),
    BackendKind(
        "onnxruntime",
        ("cuda",),
        library="onnxruntime",
        open=f"{_BACKENDS}.onnxruntime.backend:open_backend",
        problem=f"{_BACKENDS}.onnxruntime.fit:cuda_problem",
        blocks=f"{_BACKENDS}.onnxruntime.blocks:block_graphs",
        machine_problem=f"{_BACKENDS}.onnxruntime.fit:machine_problem",
        wrong_once="compute capability 9.0 by onnxruntime-gpu 1.31.1",
    ),
    BackendKind(
        "inductor",
        ("cuda", "cpu"),
        library="torch",
        open=f"{_BACKENDS}.inductor.backend:open_backend",
        extra="export",
        cuda_buffers=False,
        engines=EngineTraits(
            builder=f"{_ENGINES}.inductor.build:InductorBuilder",
            blocks=f"{_ENGINES}.inductor.blocks:block_graphs",
            needs="needs libtorch of this version (pip install torch)",
            traced=True,
            weights_inside=False,
        ),
        results={"cpu": "backends.json"},
    ),
    BackendKind(
        "onnxruntime",
        ("cpu",),
        library="onnxruntime",
        open=f"{_BACKENDS}.onnxruntime.backend:open_backend",
        problem=f"{_BACKENDS}.onnxruntime.fit:cpu_problem",
        blocks=f"{_BACKENDS}.onnxruntime.blocks:block_graphs",
        machine_problem=f"{_BACKENDS}.onnxruntime.fit:machine_problem",
        results={"cpu": "prefill.json"},
    ),
    BackendKind(
        "openvino",
        ("cpu",),
        library="openvino",
        open=f"{_BACKENDS}.openvino.backend:open_backend",
        problem=f"{_BACKENDS}.openvino.fit:problem",
        extra="openvino",
        blocks=f"{_BACKENDS}.openvino.blocks:block_graphs",
        machine_problem=f"{_BACKENDS}.openvino.fit:machine_problem",
        results={"cpu": "backends.json"},
    ),
    BackendKind(
        "openvino-bf16",
        ("cpu",),
        library="openvino",
        open=f"{_BACKENDS}.openvino.backend:open_backend",
        problem=f"{_BACKENDS}.openvino.fit:problem",
        extra="openvino",
        computes="bfloat16",
        blocks=f"{_BACKENDS}.openvino.blocks:block_graphs_in_bf16",
        machine_problem=f"{_BACKENDS}.openvino.fit:machine_problem",
        results={"cpu": "backends.json"},
    ),
    BackendKind(
        "openvino-int8-kv",
        ("cpu",),
        library="openvino",
        open=f"{_BACKENDS}.openvino.backend:open_backend",
        problem=f"{_BACKENDS}.openvino.fit:problem",
        extra="openvino",
        caches="uint8",
        blocks=f"{_BACKENDS}.openvino.blocks:block_graphs_with_codes",
        machine_problem=f"{_BACKENDS}.openvino.fit:machine_problem",
    ),
)


def backend_names() -> tuple[str, ...]:
    """The names of all backends, each once."""
    return tuple(dict.fromkeys(row.name for row in BACKENDS))


def engine_kinds() -> tuple[str, ...]:
    """The names of those that run engines of their own."""
    return tuple(row.name for row in BACKENDS if row.engines is not None)


def backend(name: str, device: str | None = None) -> BackendKind:
    """The row of a backend: the one for a kind of device, or the first.

    Raises:
        KeyError: there is none.
    """
    for row in BACKENDS:
        if row.name == name and device in (None, *row.devices):
            return row
    raise KeyError(f"no backend {name} for {device or 'any device'}; known are {', '.join(backend_names())}")


def engine_traits(kind: str) -> EngineTraits:
    """What engines of a kind are.

    Raises:
        KeyError: there are none of this kind.
    """
    traits = backend(kind).engines
    if traits is None:
        raise KeyError(f"{kind} has no engines; {', '.join(engine_kinds())} have")
    return traits


def load(reference: str) -> Any:
    """What "module:attribute" names; the module is imported now and not before."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
