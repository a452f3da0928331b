"""The whole CUDA side without a GPU: a driver made for it runs kernels.cu, compiled by g++, on the CPU.

emulated/driver.cpp stands in for libcuda.so.1 in processes of their own; cuda-bindings, NVRTC and everything
of ours are the real ones. What this cannot show: speed, the memory model of a GPU, the driver's own behaviour.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from framefusion.installation import install_command
from framefusion.runtime.backends.cuda.kernels import SOURCE
from framefusion.runtime.proof.blocks.child import MARK
from framefusion.runtime.proof.doctor import CHILD
from tests.conftest import made_once
from tests.versions import needs_torch
from tests.wheel import ROOT

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).with_name("emulated") / "driver.cpp"
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-sign-compare")
# Products and sums are rounded one by one, as the kernels ask the GPU's compiler to.
LIBRARY_FLAGS = ("-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wl,-soname,libcuda.so.1")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the driver's library."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")

    def make(folder: Path) -> None:
        folder.mkdir()
        command = (compiler, *FLAGS, *LIBRARY_FLAGS, f'-DKERNELS="{SOURCE}"', DRIVER, "-o", folder / "libcuda.so.1")
        subprocess.run(command, check=True)

    return made_once(tmp_path_factory, "emulated-driver", make)


def run(library: Path, *arguments: object, machine: Mapping[str, object] | None = None) -> str:
    """Run Python on a machine with the emulated GPU; returns what it printed."""
    told = {f"EMULATED_{name}": str(value) for name, value in (machine or {}).items()}
    environment = os.environ | {"LD_LIBRARY_PATH": str(library), "XDG_CACHE_HOME": str(library / "cache")} | told
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def script(library: Path, code: str, **machine: object) -> str:
    opening = (
        "import numpy as np\n"
        "from framefusion.errors import BackendError\n"
        "from framefusion.runtime.backends.cuda.device import CudaDevice\n"
    )
    return run(library, "-c", opening + code, machine=machine).strip()


def refusal(library: Path, before: str = "", **machine: object) -> str:
    attempt = "\ntry: CudaDevice()\nexcept BackendError as error: print(error)\nelse: print('open')"
    return script(library, before + attempt, **machine)


@pytest.mark.parametrize(
    ("machine", "which"),
    [({"CAPABILITY": 87}, ""), ({"CAPABILITY": 75, "POOLS": 0}, "not film"), ({"CAPABILITY": 130}, "not film")],
    ids=["orin", "turing without pools", "newer than the compiler"],
)
def test_the_tests_for_a_gpu_pass(
    library: Path, bundle: Path, machine: Mapping[str, object], which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "emulated")  # so that it finds the bundle that is there, beside its own
    own = bundle.parent / f"emulated-{machine['CAPABILITY']}"
    options = ("-q", "-m", "gpu", "-k", which, "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", own)
    printed = run(library, "-m", "pytest", *options, "tests/gpu/test_cuda_device.py", machine=machine)
    assert "passed" in printed
    assert "skipped" not in printed


@needs_torch
def test_the_benchmark_of_the_kernels_runs(library: Path) -> None:
    """Its figures are those of the CPU and say nothing."""
    few = ("--frames", 3, "--places", 4, "--width", 16, "--rounds", 1)
    figures = json.loads(run(library, "-m", "tools.bench.kernels", *few))
    assert figures["device"] == "Emulated GPU"
    reduces = {f"reduce, {share}% merge" for share in (30, 50, 70)} | {"reduce with tables, 50% merge"}
    assert set(figures["kernels"]) == reduces | {"similarity"}
    assert all(kernel["of_limit"] > 0 for kernel in figures["kernels"].values())


def test_the_emulated_gpu_does_nothing_before_the_host_waits(library: Path) -> None:
    """What makes a wait that is missing visible."""
    printed = script(
        library,
        "device = CudaDevice()\n"
        "mirror = device.mirror((4,), np.float32)\n"
        "device.copy(mirror.buffer, device.upload(np.ones(4, np.float32)))\n"
        "mirror.request()\n"
        "early = mirror.host.copy()\n"
        "print(early.sum(), mirror.pull().sum())",
    )
    assert printed == "0.0 4.0"


def test_pictures_are_uploaded_in_pieces_without_a_wait_and_may_change_at_once(library: Path) -> None:
    """Larger than the pinned memory: its halves serve again, each when its copies are done."""
    printed = script(
        library,
        "from framefusion.runtime.backends.cuda.memory import STAGING\n"
        "device = CudaDevice()\n"
        "waits = []\n"
        "call = device.cuda.call\n"
        "device.cuda.call = lambda name, *given: (waits.append(name), call(name, *given))[1]\n"
        "film = np.arange(STAGING // 2 * 5 + 7, dtype=np.uint32).astype(np.uint8)\n"
        "expected = film.copy()\n"
        "there = device.upload(film)\n"
        "film[:] = 0\n"
        "print(waits.count('cuMemcpyHtoDAsync'), waits.count('cuStreamSynchronize'))\n"
        "print(np.array_equal(device.download(there), expected))",
    )
    assert printed.split() == ["6", "0", "True"]


def test_a_driver_that_is_too_old_is_told_with_both_versions(library: Path) -> None:
    message = refusal(library, CUDA=12040)
    assert message.startswith("the NVIDIA driver of Emulated GPU goes up to CUDA 12.4, the installed cuda-bindings ")
    assert message.endswith(f"update the driver, or {install_command('gpu-cuda12')}")


def test_a_gpu_that_is_too_old_is_told_with_its_capability(library: Path) -> None:
    assert "has compute capability 7.0, the kernels need 7.5 or later" in refusal(library, CAPABILITY=70)


def test_a_gpu_with_too_little_memory_is_told_with_figures(library: Path) -> None:
    code = (
        "try: CudaDevice().empty((3 << 20,), np.uint8)\n"
        "except BackendError as error: print(error)\n"
    )  # fmt: skip
    expected = "Emulated GPU has 2 MiB free of 2, 3 MiB more were needed: sample fewer frames"
    assert script(library, code, MEMORY=2 << 20).startswith(expected)


@pytest.mark.parametrize("pools", [0, 1])
def test_memory_that_waits_to_be_freed_is_had_before_an_error_is(library: Path, pools: int) -> None:
    code = "device = CudaDevice()\nfor _ in range(3): device.empty((5 << 20,), np.uint8)\nprint('had')"
    assert script(library, code, MEMORY=8 << 20, POOLS=pools) == "had"


def test_a_compiler_that_is_too_new_for_the_driver_is_told(library: Path) -> None:
    before = "from framefusion.runtime.backends.cuda import kernels; kernels._nvrtc = lambda *_: (14, 0)"
    assert "nvidia-cuda-nvrtc 14.0 is too new for the driver of Emulated GPU" in refusal(library, before)


@pytest.mark.parametrize("module", ["driver", "nvrtc"])
def test_a_missing_package_names_the_extra(library: Path, module: str) -> None:
    message = refusal(library, f"import sys; sys.modules['cuda.bindings.{module}'] = None")
    assert message.endswith(install_command("gpu"))


def test_nothing_of_torch_is_loaded(library: Path) -> None:
    assert script(library, "import sys; CudaDevice(); print('torch' in sys.modules)") == "False"


def test_a_process_ends_in_peace_with_buffers_left(library: Path) -> None:
    script(library, "device = CudaDevice(); left = device.zeros((4,), np.float32), device.mirror((4,), np.float32)")


def test_the_doctor_finds_the_kernels_right(library: Path) -> None:
    proven = run(library, "-m", CHILD, "device", "cuda", machine={"CAPABILITY": 87})
    facts = json.loads(proven.splitlines()[-1].removeprefix(MARK))
    assert facts["state"] == "right", facts["problem"]
    assert [graph["dtype"] for graph in facts["graphs"]] == ["float16", "bfloat16"]
    assert {check["block"] for graph in facts["graphs"] for check in graph["checks"]} >= {"reduction", "similarity"}


def test_the_doctor_says_what_keeps_a_gpu_from_work(library: Path) -> None:
    proven = run(library, "-m", CHILD, "device", "cuda", machine={"CAPABILITY": 50})
    facts = json.loads(proven.splitlines()[-1].removeprefix(MARK))
    assert facts["state"] == "failed"
    assert "5.0" in facts["problem"]
