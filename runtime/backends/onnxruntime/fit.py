"""Whether the installed ONNX Runtime can run a bundle's graphs on this machine. Opens no session."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from framefusion.runtime.backends.fit import NO_GPU, Problem, no_bindings, no_int8_caches, release
from framefusion.runtime.backends.onnxruntime.backend import CUDA_PROVIDER
from framefusion.runtime.backends.table import BackendKind, Device
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.machine.machine import Machine

PORTABLE_SINCE: Mapping[Device, tuple[int, int]] = {"cpu": (1, 28), "cuda": (1, 29)}
"""The first ONNX Runtime whose Attention over a cache masks lower right. On the CPU 1.24 has no TensorScatter, and 1.25
to 1.27 answer a chunk behind a prefill wrongly without an error (test_dialects.py shows it); on CUDA since
microsoft/onnxruntime#28958."""
INT8_CACHES_SINCE = (1, 27)
"""The first ONNX Runtime whose GroupQueryAttention takes int8 caches on the CPU; 1.26 fails at them."""
ORT_GOES_ON = (3, 11)
"""The oldest Python that ONNX Runtime is still published for; for 3.10 it ended with 1.23."""


def cuda_problem(row: BackendKind, bundle: Bundle, machine: Machine) -> Problem | None:
    """What keeps the CUDA provider from a bundle: a GPU, a package, the graphs, or kernels for their type."""
    lacking = machine_problem(row, machine)
    graphs = _graph_problem(bundle.manifest) or no_int8_caches("ONNX Runtime on CUDA", bundle.manifest)
    return lacking or graphs or _kernel_problem(bundle.manifest, machine.onnxruntime or "0")


def machine_problem(row: BackendKind, machine: Machine) -> Problem | None:
    """What this machine lacks for ONNX Runtime on a row's device, whatever is to run: a GPU, or a package."""
    (device,) = row.devices
    if machine.onnxruntime is None:
        return "onnxruntime is not installed", "pip install onnxruntime"
    if device == "cpu":
        return None
    if machine.gpu is None:
        return NO_GPU
    if CUDA_PROVIDER not in machine.providers:
        return (
            f"the installed onnxruntime has no {CUDA_PROVIDER}",
            "pip uninstall -y onnxruntime && pip install onnxruntime-gpu",
        )
    return None if machine.bindings else no_bindings()


def cpu_problem(row: BackendKind, bundle: Bundle, machine: Machine) -> Problem | None:
    """What keeps the CPU provider from a bundle: the package, the graphs, or kernels for their type."""
    lacking = machine_problem(row, machine)
    if lacking is not None or machine.onnxruntime is None:
        return lacking
    if bundle.manifest.model.dtype == "bfloat16":
        return (
            "the bundle is in bfloat16, the CPU runtime runs float32 and float16",
            "build it again with --dtype float16, or run it on a GPU",
        )
    graphs = _graph_problem(bundle.manifest) or _cache_problem(bundle.manifest, machine.onnxruntime)
    return graphs or _portable_problem(bundle.manifest, machine.onnxruntime, "cpu")


def _cache_problem(manifest: Manifest, version: str) -> Problem | None:
    if manifest.kv_cache is None or release(version) >= INT8_CACHES_SINCE:
        return None
    least = ".".join(map(str, INT8_CACHES_SINCE))
    return (
        f"CPU kernels of onnxruntime {version} have no KV caches in int8",
        f"{_newer('onnxruntime', least)}, or build the bundle again without --kv-cache-dtype",
    )


def _graph_problem(manifest: Manifest) -> Problem | None:
    if all(segment.prefill in manifest.files for segment in manifest.segments):
        return None
    return "the bundle has engines only", "build it without --engines-only"


def _kernel_problem(manifest: Manifest, version: str) -> Problem | None:
    if manifest.dialect == "gqa" and manifest.model.dtype == "float32":
        return (
            "GroupQueryAttention has no CUDA kernel in float32",
            "build with --dtype float16, or with --dialect portable",
        )
    return _portable_problem(manifest, version, "cuda")


def _portable_problem(manifest: Manifest, version: str, device: Device) -> Problem | None:
    if manifest.dialect != "portable" or release(version) >= PORTABLE_SINCE[device]:
        return None
    package = "onnxruntime-gpu" if device == "cuda" else "onnxruntime"
    least = ".".join(map(str, PORTABLE_SINCE[device]))
    return (
        f"{device.upper()} kernels of onnxruntime {version} lack portable attention or mask it wrongly",
        f"{_newer(package, least)}, or build the bundle again with --dialect gqa",
    )


def _newer(package: str, least: str) -> str:
    """What brings a release of ONNX Runtime."""
    if sys.version_info < ORT_GOES_ON:  # pip would find none
        return f"run it with Python {'.'.join(map(str, ORT_GOES_ON))} or newer, for which there is {package} {least}"
    return f"pip install '{package}>={least}'"
