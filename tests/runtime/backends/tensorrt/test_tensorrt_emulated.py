"""The TensorRT backend without a GPU: its tests for a GPU over an emulated driver and an emulated library.

What is real: backend, prefill and decode, the CUDA device with its kernels, every name of tensorrt_rtx as installed.
What is not: the engines (ONNX Runtime runs their graphs) and the GPU. So addresses, profiles, order, padding, capture
and refusals are tested here, and no number of TensorRT's own.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.backends.cuda.test_cuda_emulated import library, run  # noqa: F401  (library is a fixture)
from tests.runtime.backends.tensorrt import emulated_tensorrt as emulated
from tests.wheel import ROOT

trt = pytest.importorskip("tensorrt_rtx")

PAIRS = {
    emulated.Runtime: trt.Runtime,
    emulated.Engine: trt.ICudaEngine,
    emulated.RuntimeConfig: trt.IRuntimeConfig,
    emulated.RuntimeCache: trt.IRuntimeCache,
    emulated.Context: trt.IExecutionContext,
}
VALUES = {
    trt.Runtime: ("engine_header_size",),
    trt.ICudaEngine: ("num_io_tensors", "num_optimization_profiles", "device_memory_size_v2"),
    trt.IRuntimeConfig: ("dynamic_shapes_kernel_specialization_strategy",),
    trt.IExecutionContext: ("active_optimization_profile",),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_tests_for_a_gpu_pass(
    library: Path,  # noqa: F811
    bundle: Path,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In fp32 numbers agree to its last bits; in fp16 the tolerances are those for a GPU."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "emulated")  # so that it finds the checkpoint that is there
    monkeypatch.setenv("EMULATED_TENSORRT", dtype)
    scratch = bundle.parent / f"emulated-tensorrt-{dtype}"
    options = ("-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", scratch)
    printed = run(library, "-m", "pytest", *options, "tests/gpu/test_tensorrt.py")
    assert "passed" in printed
    assert "skipped" not in printed


@pytest.mark.slow
def test_plain_engines_of_an_older_library_pass_them(
    library: Path,  # noqa: F811
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefills over short caches, steps over whole ones, and rows that the runtime's own kernel appends."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "emulated")
    monkeypatch.setenv("EMULATED_TENSORRT", "float32")
    monkeypatch.setenv("EMULATED_VERSION", "10.3.0")
    scratch = bundle.parent / "emulated-tensorrt-plain"
    options = ("-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", scratch)
    printed = run(library, "-m", "pytest", *options, "tests/gpu/test_tensorrt.py", "-k", "not kernels_are_kept")
    assert "passed" in printed
    assert "skipped" not in printed


BLOCKS = """
import sys, tempfile
from pathlib import Path
from tests.runtime.backends.tensorrt import emulated_tensorrt as emulated
emulated.install()
from framefusion.export.engines.builder import EngineFacts
from framefusion.export.engines.tensorrt import blocks
from framefusion.runtime.backends.tensorrt.library import Library
from framefusion.runtime.proof.blocks.child import prove_backend
Library.check_targets = lambda library, targets: tuple(targets)  # that of the emulated GPU is none of tensorrt_rtx
def build(spec, path, library):
    emulated.write_plan(spec, path, path.parent)
    return EngineFacts(path.stat().st_size, None, spec.targets, (), {}, 0.0)
blocks.build_engine = build
found = prove_backend(emulated.KIND, "cuda", "engines")
print(found["state"], found["problem"], [(g["dialect"], g["dtype"], len(g["checks"])) for g in found["graphs"]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["", "10.3.0"])
def test_the_doctor_proves_engines_of_the_blocks(
    library: Path,  # noqa: F811
    version: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All cases through the backend's own segments, over caches that the rows are appended to where they are plain."""
    monkeypatch.setenv("EMULATED_VERSION", version)
    kind = "plain" if version else "attention"
    assert run(library, "-c", BLOCKS).strip() == f"right  [('{kind}', 'float16', 44)]"


@pytest.mark.parametrize("ours", PAIRS, ids=lambda kind: kind.__name__)
def test_the_emulation_has_no_call_that_the_library_lacks(ours: type) -> None:
    real = PAIRS[ours]
    for name, function in vars(ours).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            wanted = len(inspect.signature(function).parameters)
            assert wanted in arities(getattr(real, name)), f"{real.__name__}.{name}"
    for name in VALUES.get(real, ()):
        assert hasattr(real, name)


def test_every_call_of_the_backend_is_emulated() -> None:
    """So that what the tests above run is all that a GPU would be asked."""
    source = (ROOT / "runtime/backends/tensorrt/engine.py").read_text(encoding="utf-8")
    called = set(re.findall(r"\b(?:runtime|engine|config|context|kernels)\.([a-z_0-9]+)\(", source))
    known = {name for ours in PAIRS for name in vars(ours)}
    not_theirs = {"context", "forget"}  # of our own classes of these names
    assert called - known - not_theirs == set()
    assert len(called & known) > 15


def arities(bound: Any) -> set[int]:
    """How many arguments the overloads of a bound method take, self included; defaults may be left out."""
    counts = set()
    for signature in re.findall(r"\w+\((self: .*?)\) -> ", bound.__doc__):
        arguments = re.sub(r"<[^>]*>+|\[[^\]]*\]", "", signature).split(", ")
        counts |= set(range(sum(" = " not in each for each in arguments), len(arguments) + 1))
    return counts
