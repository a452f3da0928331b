"""TensorRT's runtime for machines without a GPU: engines that run their ONNX graph on the emulated GPU's memory.

The module's names, types and flags are those of the tensorrt_rtx that is installed; only what needs a GPU is another:
a plan names a graph of a portable bundle, ONNX Runtime runs it, and the run is enqueued on a stream of the emulated
driver (../cuda/emulated): it happens when the host waits for it, at the addresses it was told, and can be captured.
Stricter than the library where a mistake would go unnoticed: what was not told, or was told for another profile, is
refused, and each run leaves NaNs in the memory for activations.

With EMULATED_VERSION=10.3.0 it is `tensorrt` of that version instead, whose engines are plain: what that version's
bindings lack is not there, and the graphs that are run are the rewritten ones.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

from framefusion.export.engines.builder import EngineSpec
from framefusion.runtime.backends import fit
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.engine_record import EngineRecord
from framefusion.runtime.format.manifest import FileRecord
from framefusion.storage.records import to_json

OLDER = os.environ.get("EMULATED_VERSION")
REAL = "tensorrt_rtx"
NAME, KIND = ("tensorrt", "tensorrt") if OLDER else (REAL, "tensorrt-rtx")
VARIANT = "plain" if OLDER else "attention"
LACKING = (  # in tensorrt.so of 10.3.0
    "CausalMaskKind", "ComputeCapability", "DynamicShapesKernelSpecializationStrategy", "EngineValidity",
    "IAttention", "IAttentionInputLayer", "IKVCacheUpdateLayer", "IRuntimeCache", "IRuntimeConfig", "IStreamWriter",
)  # fmt: skip
CAPABILITY = "8.7"  # of the emulated GPU
WORKSPACE = 3 << 16
HEADER = b"emulated"
_TYPES = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(uint8)": ("UINT8", np.uint8),
}  # of ONNX Runtime -> of TensorRT, of numpy
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_kept: list[Any] = []  # what the driver may still call


def compile_for_emulation(bundle: Bundle, folder: Path, max_batch_size: int | None = None) -> Bundle:
    """A portable bundle with an emulated engine for each graph; the engines are written to `folder`."""
    from framefusion.export.engines.tensorrt.profiles import segment_spec, tower_spec

    manifest = bundle.manifest
    specs = {manifest.vision.graph: tower_spec(bundle.folder, manifest, KIND, (CAPABILITY,), VARIANT)}
    for segment in manifest.segments:
        for graph in segment.graphs:
            specs[graph] = segment_spec(
                bundle.folder, manifest, segment, graph, KIND, (CAPABILITY,), VARIANT, max_batch_size
            )
    found = fit.installed_version(NAME)
    assert found is not None
    engines, files = [], dict(manifest.files)
    for graph, spec in specs.items():
        path = folder / f"{graph.replace('/', '-')}.engine"
        write_plan(spec, path, spec.graph.parent)
        files[str(path)] = FileRecord(path.stat().st_size, "0" * 64)
        engines.append(
            EngineRecord(
                kind=KIND,
                graph=graph,
                file=str(path),
                library=NAME,
                version=found[1],
                targets=(CAPABILITY,),
                dtype=manifest.model.dtype,
                key=graph,
                profiles=spec.profiles,
                tensors=(),
                capacities=spec.capacities,
                weight_bytes=1,
                options=spec.options,
            )
        )
    return bundle.with_manifest(engines=tuple(engines), files=files)


def write_plan(spec: EngineSpec, path: Path, beside: Path) -> None:
    """What stands for an engine; the graph that is parsed is written into a folder, with the weights of the graph."""
    plan = {"graph": str(_parsed(spec, beside)), "profiles": to_json(spec.profiles)}
    path.write_bytes(HEADER + json.dumps(plan).encode())


def _parsed(spec: EngineSpec, beside: Path) -> Path:
    """The graph that the library would be given, over the same weights."""
    from framefusion.export.engines.tensorrt.network import plain_graph, static_caches
    from framefusion.export.engines.tensorrt.profiles import most_rows

    one_row = most_rows(spec.profiles) == 1
    if OLDER:
        content = plain_graph(spec.graph, len(spec.capacities), spec.options["one_length"], one_row=one_row)
    else:
        content = static_caches(spec.graph, spec.capacities, one_row=one_row)
    parsed = beside / f"{spec.graph.stem}.{VARIANT}.onnx"
    parsed.write_bytes(content)
    return parsed


def install() -> Any:
    """Put the emulation in the module's place; returns it."""
    real: Any = importlib.import_module(REAL)
    if OLDER:  # no such distribution is installed
        fit.installed_version = lambda library: (NAME, str(OLDER))

    class Module(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if OLDER and name in LACKING:
                raise AttributeError(name)
            return getattr(real, name)

    module: Any = Module(NAME)
    module.Runtime = Runtime
    if OLDER:
        module.__version__ = OLDER
    module.caches = []
    sys.modules[NAME] = module
    Runtime.module = module
    return module


class Runtime:
    module: Any = None
    engine_header_size = len(HEADER)

    def __init__(self, log: Any) -> None:
        self.log = log

    def get_engine_validity(self, header: Any) -> tuple[Any, int]:
        validity = self.module.EngineValidity
        return (validity.VALID, 0) if bytes(header[: len(HEADER)]) == HEADER else (validity.INVALID, 32)

    def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
        content = bytes(plan)
        if not content.startswith(HEADER):
            self.log.log(self.module.ILogger.Severity.ERROR, "the plan is malformed")
            return None
        return Engine(json.loads(content[len(HEADER) :]), self)


class Engine:
    def __init__(self, plan: Any, runtime: Runtime) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = ort.InferenceSession(plan["graph"], options, providers=["CPUExecutionProvider"])
        self.runtime, self.module, self.plan = runtime, runtime.module, plan
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.all = list({**self.inputs, **self.outputs}.values())
        self.num_io_tensors, self.device_memory_size_v2 = len(self.all), WORKSPACE
        self.num_optimization_profiles = len(plan["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return str(self.all[index].name)

    def get_tensor_mode(self, name: str) -> Any:
        modes = self.module.TensorIOMode
        return modes.INPUT if name in self.inputs else modes.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return self.module.TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self.module.DataType, _TYPES[self._value(name).type][0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else -1 for axis in self._value(name).shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        shapes = self.plan["profiles"][profile]["shapes"][name]
        return [tuple(shape) for shape in (shapes if len(shapes) == 3 else shapes * 3)]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.module)

    def create_execution_context(self, config: Any) -> Context:
        if OLDER:
            assert config == self.module.ExecutionContextAllocationStrategy.USER_MANAGED
            return Context(self, RuntimeCache())
        assert config.strategy == self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        specialised = self.module.DynamicShapesKernelSpecializationStrategy.EAGER
        assert config.dynamic_shapes_kernel_specialization_strategy == specialised
        assert config.cache is not None
        return Context(self, config.cache)

    def _value(self, name: str) -> Any:
        return self.inputs.get(name) or self.outputs[name]


class RuntimeConfig:
    def __init__(self, module: Any) -> None:
        self.module, self.strategy, self.cache = module, None, None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        self.module.caches.append(RuntimeCache())
        made: RuntimeCache = self.module.caches[-1]
        return made

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    def __init__(self) -> None:
        self.kernels: set[str] = set()
        self.loaded: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        self.loaded = set(json.loads(blob))
        self.kernels |= self.loaded
        return True

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.kernels)).encode()


class Context:
    def __init__(self, engine: Engine, cache: RuntimeCache) -> None:
        self.engine, self.cache = engine, cache
        self.active_optimization_profile = 0
        self.memory: tuple[int, int] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        assert size >= self.engine.device_memory_size_v2
        self.memory = address, size

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.active_optimization_profile, self.shapes = profile, {}
        return 0 <= profile < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
        self.shapes[name] = shape
        return all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address > 0 and (name in self.engine.inputs or name in self.engine.outputs)

    def is_stream_capturable(self, stream: int) -> bool:
        return stream != 0

    def get_max_output_size(self, name: str) -> int:
        return 1 << 16

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        told = {*self.shapes} == {*engine.inputs} and {*self.addresses} == {*engine.inputs, *engine.outputs}
        if not told or self.memory is None:
            engine.runtime.log.log(engine.module.ILogger.Severity.ERROR, "not all shapes and addresses are known")
            return False
        self.cache.kernels.add(f"{engine.plan['graph']} {self.active_optimization_profile}")
        shapes, addresses, memory = dict(self.shapes), dict(self.addresses), self.memory

        def run(_: Any) -> None:
            feeds = {name: self._array(name, shape, addresses[name]) for name, shape in shapes.items()}
            for name, found in zip(engine.outputs, engine.session.run(list(engine.outputs), feeds), strict=True):
                ctypes.memmove(addresses[name], np.ascontiguousarray(found).ctypes.data, found.nbytes)
            ctypes.memset(memory[0], 0xFF, memory[1])

        _kept.append(_CALLBACK(run))
        enqueue = ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc
        return int(enqueue(ctypes.c_void_p(stream), _kept[-1], None)) == 0

    def _array(self, name: str, shape: tuple[int, ...], address: int) -> Any:
        dtype = np.dtype(_TYPES[self.engine.inputs[name].type][1])
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape)
