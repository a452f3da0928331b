"""Whether the installed OpenVINO can run a bundle's graphs on this machine. Loads no library."""

from __future__ import annotations

from framefusion.installation import install_command
from framefusion.runtime.backends.fit import Problem, no_int8_caches, release
from framefusion.runtime.backends.table import BackendKind
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.machine import cpu
from framefusion.runtime.machine.machine import Machine

LEAST = (2026, 3, 0)
"""The first release that reads RMSNormalization, RotaryEmbedding and MultiHeadAttention; all since were tested."""
_PRODUCTS = ("avx512_bf16", "amx_bf16")  # instructions, as Linux names them


def machine_problem(row: BackendKind, machine: Machine) -> Problem | None:
    """What this machine lacks, whatever is to run: the package, or products in bf16."""
    if machine.openvino is None:
        return "openvino is not installed", install_command("openvino")
    if release(machine.openvino) < LEAST:
        least = ".".join(map(str, LEAST))
        return f"openvino {machine.openvino} is installed, {least} is the first that reads such graphs", (
            f"pip install -U 'openvino>={least}'"
        )
    return _no_bf16() if row.computes == "bfloat16" else None


def problem(row: BackendKind, bundle: Bundle, machine: Machine) -> Problem | None:
    """What keeps OpenVINO from a bundle: the machine, the dialect, the mode, or products in bf16."""
    lacking = machine_problem(row, machine)
    return lacking or _graph_problem(row, bundle.manifest)


def _graph_problem(row: BackendKind, manifest: Manifest) -> Problem | None:
    if not all(segment.prefill in manifest.files for segment in manifest.segments):
        return "the bundle has engines only", "build it without --engines-only"
    if manifest.dialect != "gqa":
        return (
            f"OpenVINO has no TensorScatter, which graphs of the dialect {manifest.dialect} have",
            "build the bundle again with --dialect gqa",
        )
    cached = no_int8_caches("OpenVINO", manifest)
    if cached is not None or "bfloat16" not in (row.computes, manifest.model.dtype):
        return cached
    if manifest.fixed is not None:
        return (
            "OpenVINO computes what decides in a graph in float32 and the rest of this one in bfloat16, and has no "
            "attention between the two",
            "take --backend openvino with a bundle in float32 or float16, or build it with --reduction adaptive",
        )
    return _no_bf16()


def _no_bf16() -> Problem | None:
    if any(name in cpu.features() for name in _PRODUCTS):
        return None
    return (
        f"this CPU has no products in bfloat16 ({' or '.join(_PRODUCTS)})",
        "take --backend openvino with a bundle in float32 or float16",
    )
