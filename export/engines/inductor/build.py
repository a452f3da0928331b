"""Engines by torch's inductor, compiled ahead of time: the torch graphs themselves, for CPUs and GPUs of any kind.

A graph is traced from the checkpoint's configuration, because ONNX is no input of inductor: config.json and the headers
of the tensors are read, no weight is. One engine takes every number of tokens and cache slots, so prefill, chunks and
decode share it; the caches are inputs that it writes to in place. The custom ops are replaced by their own kernels in
plain torch, and attention over a cache by a masked one whose shapes follow from the inputs alone, so no Python runs
later. Weights stay outside: the parameters are views of the bundle's own files, and the package only says where each
lies (runtime/backends/inductor/backend.py). Segments of one structure therefore compile to one engine.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic_shapes
from torch.nn.attention import SDPBackend, sdpa_kernel

from framefusion.errors import BackendError, BundleError
from framefusion.export.engines.builder import EngineFacts, EngineSpec, Share
from framefusion.export.engines.inductor.attention import FORMS
from framefusion.export.engines.inductor.choice import Geometry, choose
from framefusion.export.engines.inductor.graph import export, flattened, kinds_of
from framefusion.export.engines.inductor.join import join_products
from framefusion.export.engines.inductor.step import BATCHED, Step, product_form, replacements
from framefusion.export.graphs.decoder import Segment
from framefusion.export.graphs.graph_plan import EXAMPLE_LENGTH, GraphModule, Role, Signature
from framefusion.export.plan.build_plan import WEIGHTS, BuildPlan
from framefusion.runtime.backends.inductor.backend import KIND, PLACES, load_package
from framefusion.runtime.backends.inductor.step import MODEL, STEP, TENSORS
from framefusion.runtime.format.engine_record import EngineKind, TensorRecord
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.machine import cpu
from framefusion.storage.records import to_json

if TYPE_CHECKING:
    from framefusion.export.options import EngineOptions
    from framefusion.runtime.bundle import Bundle

SUFFIX = ".pt2"
DEVICES = ("cpu", "cuda")
_PEAK = 1_000_000_000  # bytes of a process with torch, and of the compiler it starts, measured: 0.47 GB each
JOINED = ("cuda",)
"""Devices for which query, key and value are one product, and gate and up: see join.py."""
MAX_AUTOTUNE = "max_autotune"  # among the options of an engine, where it was asked for: tokens it was tuned for
TUNED_TOKENS = 1024
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
"""Kernels of attention that an engine may call: none of them writes the scores of all pairs out."""
_NO_KERNEL = ("No viable backend", "No available kernel")
_ONE = threading.Lock()  # inductor's settings are the process's


@dataclass(frozen=True, eq=False, kw_only=True)
class InductorSpec(EngineSpec):
    """What an engine is compiled from: one takes every number of tokens and slots, so it has no profiles.

    Attributes:
        module: makes that of the graph, on the meta device.
        role: of the graph. One that decodes and has the option STEP is compiled as a step of several rows, too.
    """

    module: Callable[[], GraphModule]
    role: Role = "vision"

    @property
    def device(self) -> str:
        """As torch names it."""
        return self.targets[0].split()[0]


class InductorBuilder:
    """See `EngineBuilder`: engines by torch's inductor. One thread compiles at a time, in processes of the compiler.

    Args:
        kind: of the engines; there is one.
    """

    suffix = SUFFIX

    def __init__(self, kind: EngineKind) -> None:
        self._kind = kind

    def check(self, options: EngineOptions) -> None:
        """See `EngineBuilder.check`; the compiler and the device are looked for by `specs`."""
        if options.targets:
            raise BackendError(
                f"--target-sm is not for {self._kind}, which compiles for the machine it runs on: leave it"
            )
        if options.variant:
            raise BackendError(f"--variant is not for {self._kind}, whose networks are all of one kind: leave it")
        if options.max_batch_size is not None:
            raise BackendError(f"--max-batch-size is for TensorRT, {self._kind} has no such limit: leave it")
        if options.max_autotune and options.device == DEVICES[0]:
            raise BackendError(
                "--max-autotune is for GPUs: on a CPU torch's own products are the fastest, and the others repack "
                "weights, which no engine holds: leave it"
            )

    def specs(self, bundle: Bundle, options: EngineOptions, plan: BuildPlan | None) -> dict[str, InductorSpec]:
        """See `EngineBuilder.specs`; the checkpoint is needed."""
        if plan is None:
            raise BackendError(
                f"{self._kind} traces the graphs from the checkpoint's configuration: say with --checkpoint which one "
                f"{bundle.folder} was built from"
            )
        return specs(bundle.folder, bundle.manifest, plan, options.device, max_autotune=options.max_autotune)

    def estimate_memory(self, spec: EngineSpec) -> int:
        """Bytes at the peak of a build, the same for every graph: weights are mapped and never read."""
        return _PEAK

    def build(self, spec: EngineSpec, target: Path, timing_cache: bytes | None, progress: Share) -> EngineFacts:
        """See `build_engine`; nothing is timed."""
        assert isinstance(spec, InductorSpec)
        return build_engine(spec, target, progress)


def specs(
    folder: Path, manifest: Manifest, plan: BuildPlan, device: str = DEVICES[0], *, max_autotune: bool = False
) -> dict[str, InductorSpec]:
    """What to compile for each graph of a bundle.

    Args:
        folder: the bundle.
        manifest: its manifest.
        plan: of the checkpoint that it was built from, with the options in its manifest.
        device: what the engines are to run on; the machine has it.
        max_autotune: time several kernels for each product, and keep the fastest; of the record and the key then.

    Raises:
        BackendError: there is no C++ compiler, or no such device.
    """
    target, options = target_of(device)
    if max_autotune:
        options[MAX_AUTOTUNE] = TUNED_TOKENS
    model = manifest.model
    heads = plan.config.num_heads, model.num_kv_heads, model.head_dim
    attention = attention_options(Geometry(*heads, getattr(torch, model.dtype), device))
    if device in JOINED:
        attention["products"] = "joined"
    step = {STEP: product_form(getattr(torch, model.dtype), device)} if device in BATCHED else {}
    options_of = {"vision": {}, "prefill": attention, "decode": attention | step, "both": attention | step}
    return {
        graph.name: InductorSpec(
            *(folder / graph.name, KIND, (target,), model.dtype),
            options=options | options_of[graph.role],
            module=graph.module,
            role=graph.role,
        )
        for graph in plan.graphs
    }


def attention_options(geometry: Geometry) -> dict[str, Any]:
    """The form of attention that is taken on a device, and whether it is shown caches that are cut.

    Raises:
        BackendError: see `choose`.
    """
    form = choose(geometry)
    return {"attention": form, "caches": "cut" if FORMS[form].is_cut else "whole"}


def build_engine(spec: InductorSpec, target: Path, progress: Share) -> EngineFacts:
    """Trace, compile and package one graph.

    Raises:
        BackendError: the C++ compiler failed, with what it said.
        BundleError: the graph has other weights than the checkpoint's configuration says.
    """
    start = time.monotonic()
    with _alone():
        progress(0.0)
        # 1. The module over the bundle's weights, whose places the package says.
        module = spec.module()
        dtype = getattr(torch, spec.dtype)
        places = give_weights(module, spec.graph, dtype, spec.device, join="products" in spec.options)
        metadata = {PLACES: json.dumps(places)}
        tune = MAX_AUTOTUNE in spec.options
        programs: dict[str, torch.export.ExportedProgram] = {}
        compiled: dict[str, list[str]] = {}
        # 2. The graph, for any number of tokens of one row: a prompt, a part of one.
        if STEP not in spec.options or spec.role != "decode":
            tokens = spec.options.get(MAX_AUTOTUNE, EXAMPLE_LENGTH)
            programs[MODEL] = export(module, dtype, spec.device, spec.options.get("attention", "masked"), tokens)
            compiled[MODEL] = _compile(programs[MODEL], metadata, max_autotune=tune)
            progress(0.5)
        # 3. A token of each of several rows, over the same weights.
        if STEP in spec.options:
            assert isinstance(module, Segment)
            step = Step(module)
            others = replacements(spec.options[STEP])
            programs[STEP] = export(step, dtype, spec.device, others=others)
            tensors = json.dumps(to_json(_records(flattened(step.signature()), spec)))
            compiled[STEP] = _compile(programs[STEP], metadata | {TENSORS: tensors})
        # 4. One file of them, which has its name when it is whole.
        unfinished = target.with_name(target.name + SUFFIX)  # torch wants the suffix
        try:
            _package(compiled, unfinished)
            if tune:
                _require_own_weights(unfinished, places, spec.device)
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
    progress(1.0)
    return EngineFacts(
        size=target.stat().st_size,
        sha256=None,  # torch writes the file
        targets=spec.targets,
        tensors=_records(flattened(module.signature()), spec),
        layer_kinds=kinds_of(programs.get(MODEL) or programs[STEP]),
        seconds=time.monotonic() - start,
    )


def give_weights(
    module: nn.Module, graph: Path, dtype: torch.dtype, device: str = "cpu", *, join: bool = False
) -> dict[str, Any]:
    """Give a module the bundle's own weights as views of its file, and say where each lies.

    Another device than the CPU gets memory of that size without the values, which no compilation reads, and so do
    weights that are joined: several places, whose last axes stand side by side.

    Raises:
        BundleError: the graph has other parameters.
    """
    initializers = ir.load(graph).graph.initializers
    flat = torch.from_numpy(np.memmap(graph.parent / WEIGHTS, mode="c", dtype=np.uint8))
    places: dict[str, Any] = {}
    for name, parameter in list(module.named_parameters()):
        value = initializers[name].const_value if name in initializers else None
        if not isinstance(value, ir.ExternalTensor) or tuple(value.shape) != tuple(parameter.shape):
            raise BundleError(
                f"{graph} has no {name} {tuple(parameter.shape)}: give the checkpoint that it was built from"
            )
        begin = value.offset or 0
        end = (value.offset or 0) + (value.length or 0)
        view = flat[begin:end].view(dtype).view(parameter.shape)
        _set(module, name, view if device == "cpu" else torch.empty_like(view, device=device))
        places[f"module.{name}"] = [begin, list(parameter.shape)]
    for name, parts in (join_products(module) if join else {}).items():
        _set(module, name, torch.empty(module.get_parameter(name).shape, dtype=dtype, device=device))
        places[f"module.{name}"] = [places.pop(f"module.{part}") for part in parts]
    return {"file": WEIGHTS, "tensors": places}


def _set(module: nn.Module, name: str, values: Tensor) -> None:
    """Give a parameter values."""
    (*path, last) = name.split(".")
    setattr(module.get_submodule(".".join(path)), last, nn.Parameter(values, requires_grad=False))


@contextmanager
def _alone() -> Iterator[None]:
    """The settings of a trace and a compilation, which are the process's, for one thread at a time."""
    sizes: Any = symbolic_shapes
    with _ONE, torch.no_grad(), warnings.catch_warnings(), sizes.patch(backed_size_oblivious=True):
        warnings.simplefilter("ignore")  # torch warns of its own code
        yield  # one token and one slot are sizes like others, which is what the patch says


def _compile(
    program: torch.export.ExportedProgram, metadata: Mapping[str, str], *, max_autotune: bool = False
) -> list[str]:
    """The files of a model, in torch's own cache."""
    settings = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.metadata": dict(metadata),
        "cpp.dynamic_threads": True,  # as many as the machine has that runs it, not this one
        "max_autotune": max_autotune,  # what it found is in torch's own cache, for the next compilation
    }
    (arguments, keywords) = program.example_inputs
    with _compiler_errors(), sdpa_kernel(FUSED):
        module: Any = program.module(check_guards=False)
        files: Any = torch._inductor.aot_compile(module, arguments, keywords, options=settings)
    return list(files)


def _package(models: dict[str, list[str]], target: Path) -> None:
    """Put the files of models, by name, into one package."""
    package = importlib.import_module("torch._inductor.package")  # seconds that a refusal need not wait for
    package.package_aoti(str(target), models)


def _require_own_weights(package: Path, places: Mapping[str, Any], device: str) -> None:
    """Refuse kernels that were chosen for weights in another layout: an engine is given those of the bundle alone.

    Raises:
        BackendError: there are such.
    """
    others = set(load_package(package, device).get_constant_fqns()) - set(places["tensors"])
    if others:
        named = ", ".join(sorted(others)[:3])
        raise BackendError(
            f"--max-autotune chose kernels that repack weights ({named}), which no engine holds: leave it"
        )


@contextmanager
def _compiler_errors() -> Iterator[None]:
    """Turn what inductor raises for a compiler that fails into an error of ours."""
    from torch._inductor import exc

    try:
        yield
    except RuntimeError as error:
        if not any(reason in str(error) for reason in _NO_KERNEL):
            raise
        raise BackendError(
            f"torch {torch.__version__} has no fused attention for a graph of this bundle here, and all pairs of "
            "tokens would lie in memory: take another --dtype, or the backend onnxruntime"
        ) from error
    except (exc.InvalidCxxCompiler, exc.CppCompileError, subprocess.CalledProcessError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise BackendError(
            f"{compiler()} did not compile the engine ({'; '.join(lines[-3:])}): see its own message"
        ) from error


def compiler() -> str:
    """Name and version of the C++ compiler that inductor calls.

    Raises:
        BackendError: there is none.
    """
    name = os.environ.get("CXX", "clang++" if platform.system() == "Darwin" else "g++")
    path = shutil.which(name)
    if path is None:
        raise BackendError(f"inductor needs a C++ compiler and {name} is not there: install it, or set CXX to yours")
    result = subprocess.run((path, "--version"), capture_output=True, text=True, check=False)
    return (result.stdout.splitlines() or [name])[0]


def target_of(device: str) -> tuple[str, dict[str, Any]]:
    """What engines are compiled for here, and the options that decide their bytes: compiler and instructions.

    Raises:
        BackendError: there is no such device, or no compiler.
    """
    if device not in DEVICES:
        raise BackendError(f"device {device!r} is unknown to inductor engines; known are {', '.join(DEVICES)}")
    options: dict[str, Any] = {"compiler": compiler()}
    if device == "cpu":
        target = f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability().lower()}"
        return target, options | {"cpu_features": sorted(cpu.features())}
    if not torch.cuda.is_available():
        raise BackendError(
            f"inductor compiles for the GPU of the machine it runs on, and torch {torch.__version__} finds none: "
            "compile there, or with --device cpu"
        )
    major, minor = torch.cuda.get_device_capability()
    return f"cuda {major}.{minor}", options


def _records(signature: Signature, spec: InductorSpec) -> tuple[TensorRecord, ...]:
    """Inputs and outputs in order; sizes that are free are -1, and outputs have their rank alone."""
    floats = spec.dtype

    def type_and_shape(argument: Tensor, axes: Any) -> tuple[str, tuple[int, ...]]:
        free = axes or {}
        shape = tuple(-1 if axis in free else size for axis, size in enumerate(argument.shape))
        return floats if argument.is_floating_point() else str(argument.dtype).removeprefix("torch."), shape

    inputs = [
        TensorRecord(name, "input", *type_and_shape(argument, axes))
        for name, argument, axes in zip(signature.inputs, signature.arguments, signature.dynamic_shapes, strict=True)
    ]
    kinds = {"logits": "float32", "similarity": "float32", "importance": "float32", "origin": "int64"}
    ranks = {"logits": 2, "similarity": 1, "importance": 1, "origin": 1, "tokens": 2}
    outputs = [
        TensorRecord(name, "output", kinds.get(name, floats), (-1,) * ranks.get(name, 3)) for name in signature.outputs
    ]
    return (*inputs, *outputs)
