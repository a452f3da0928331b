"""Whether an engine fits a machine, told from its record: every reason, its figures and what mends it.

Records and files are made here, GPUs are described, and no library is asked: with a real GPU the engine's header is
(`gpu`). What the driver says is read from a library of a few lines of C with the driver's functions.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import BackendError, BundleError
from framefusion.runtime.backends import fit as engines
from framefusion.runtime.backends.fit import examine, gpu_memory, installed_version, release, require_fit
from framefusion.runtime.bundle import Bundle, file_record
from framefusion.runtime.format.engine_record import EngineRecord
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.format.manifest_file import read_manifest, write_manifest
from framefusion.runtime.machine.gpu import GPU, find_gpu

VERSION = "1.7.1.116"
GRAPH = "segments/rest/graph.onnx"
RTX = GPU("NVIDIA GeForce RTX 3060", "8.6", 12 * 10**9, (13, 0))


def record(**changes: Any) -> EngineRecord:
    plain: dict[str, Any] = {
        "kind": "tensorrt-rtx", "graph": GRAPH, "file": "engines/tensorrt-rtx/segments-rest-graph.engine",
        "library": "tensorrt_rtx", "version": VERSION, "targets": ("8.6", "8.9"), "dtype": "float16", "key": "k",
        "profiles": (), "tensors": (), "capacities": (528, 528), "weight_bytes": 4,
    }  # fmt: skip
    return EngineRecord(**{**plain, **changes})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, str]]:
    """Libraries as if they were installed: what a test of versions cannot have from a package index."""
    found = {"tensorrt_rtx": ("tensorrt_rtx_cu13", VERSION), "torch": ("torch", "2.13.0+cpu")}
    found["tensorrt"] = ("tensorrt", "10.2.0")
    monkeypatch.setattr(engines, "installed_version", found.get)
    monkeypatch.setattr(engines, "_header", lambda *_: iter(()))  # no GPU here that a library could ask
    return found


@pytest.fixture
def folder(bundle: Path, tmp_path: Path) -> Path:
    """A bundle with one engine, of which only the record is real."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    path = folder / record().file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"engine")
    manifest = read_manifest(folder)
    files = {**manifest.files, record().file: file_record(path)}
    write_manifest(folder, replace(manifest, engines=(record(),), files=files))
    return folder


def said(folder: Path, gpu: GPU | None = RTX, hashes: bool = False, **changes: Any) -> str:
    manifest: Manifest = replace(read_manifest(folder), engines=(record(**changes),))
    (fit,) = examine(folder, manifest, gpu=gpu, hashes=hashes)
    assert fit.fits == fit.text.startswith("fits")
    return fit.text


@pytest.mark.usefixtures("installed")
def test_what_fits(folder: Path) -> None:
    assert said(folder) == "fits NVIDIA GeForce RTX 3060 (built for 8.6, 8.9)"
    assert said(folder, gpu=None) == "fits 8.6, 8.9; there is no GPU here to ask"
    assert said(folder, hashes=True).startswith("fits")
    assert said(folder, version="1.7.1.90").startswith("fits")  # another build of the same release


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("gpu", "changes", "phrases"),
    [
        (RTX, {"targets": ("8.9",)}, ("built for 8.9 and NVIDIA GeForce RTX 3060 is 8.6", "--target-sm 89,86")),
        (RTX, {"version": "1.7.0.2"}, ("1.7.0.2", VERSION, "--target-sm 86,89", "'tensorrt_rtx_cu13==1.7.0.2'")),
        (replace(RTX, cuda=(12, 8)), {}, ("the driver knows CUDA 12.8", "needs 13", "update the NVIDIA driver")),
        (replace(RTX, memory=10**5), {}, ("take 0.0 GB", "has 0.0 GB", "--max-kv-cache-capacity")),
        (None, {"version": "1.6.0.1"}, ("1.6.0.1", "ff-export compile", "--backend tensorrt-rtx")),
        (
            None,
            {"kind": "tensorrt", "library": "tensorrt"},
            ("tensorrt 10.2.0 is installed, and 10.3", "install -U"),
        ),
        (None, {"library": "tensorrt_none"}, ("tensorrt_none 1.7.1.116", "is not installed")),
        (None, {"graph": "gone.onnx", "version": "1.6"}, ("--engines-only", "build the bundle again")),
        (None, {"targets": ("cpu mips64 x",), "library": "torch", "version": "2.13.0"}, ("this CPU is",)),
    ],
    ids=["target", "release", "driver", "memory", "no-gpu", "too-old", "library", "engines-only", "processor"],
)
def test_what_does_not_fit(folder: Path, gpu: GPU | None, changes: dict[str, Any], phrases: tuple[str, ...]) -> None:
    text = said(folder, gpu=gpu, **changes)
    assert text.startswith("rebuild because ") == ("; with: ff-export compile " in text)
    assert text.startswith(("rebuild because ", "does not run: "))
    assert [word for word in phrases if word not in text] == []


@pytest.mark.usefixtures("installed")
def test_a_cpu_without_what_the_compiler_took_for_granted(folder: Path) -> None:
    mine: dict[str, Any] = {
        "kind": "inductor",
        "library": "torch",
        "version": "2.13.0+cpu",
        "targets": (f"cpu {platform.machine()}",),
    }
    assert said(folder, gpu=None, **mine) == f"fits this CPU (built for cpu {platform.machine()})"
    text = said(folder, gpu=None, **mine, options={"cpu_features": ["avx4096"]})
    assert "a CPU with avx4096 and this one has not" in text


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("content", "hashes", "phrases"),
    [
        (b"eng", False, "truncated, 3 of 6 bytes"),
        (b"engines", False, "altered, 7 of 6 bytes"),
        (b"enginf", True, "sha256 is not the manifest's"),
        (None, False, "is missing"),
    ],
    ids=["truncated", "longer", "altered", "missing"],
)
def test_a_damaged_file(folder: Path, content: bytes | None, hashes: bool, phrases: str) -> None:
    path = folder / record().file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    text = said(folder, hashes=hashes)
    assert phrases in text
    assert f"ff-export compile {folder} --backend tensorrt-rtx --target-sm 86,89" in text


@pytest.mark.usefixtures("installed")
def test_require_fit_refuses_in_one_line(folder: Path) -> None:
    manifest = read_manifest(folder)
    require_fit(folder, manifest, "tensorrt-rtx", RTX)
    with pytest.raises(BackendError, match=r"segments-rest-graph.engine cannot run here: it was built for .* is 12.0"):
        require_fit(folder, manifest, "tensorrt-rtx", replace(RTX, capability="12.0"))
    with pytest.raises(BackendError, match=r"holds no tensorrt engine: its graphs .* --backend tensorrt"):
        require_fit(folder, manifest, "tensorrt", RTX)


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU")
def test_no_gpu_is_said_before_anything_else(folder: Path) -> None:
    with pytest.raises(BackendError, match=r"need an NVIDIA GPU.*this machine has none.*--backend onnxruntime"):
        require_fit(folder, read_manifest(folder), "tensorrt-rtx")


def test_memory_counts_weights_and_caches_once(folder: Path) -> None:
    manifest = read_manifest(folder)
    slot = 2 * manifest.model.num_kv_heads * manifest.model.head_dim * 4  # bytes of a key and a value in fp32
    assert gpu_memory(manifest, "tensorrt-rtx") == 6 + 2 * 528 * slot
    outside = replace(manifest, engines=(record(kind="inductor", weight_bytes=0),))
    (rest,) = (segment for segment in manifest.segments if segment.graph == GRAPH)
    assert gpu_memory(outside, "inductor") == 6 + rest.weight_bytes + 2 * 528 * slot


def test_versions() -> None:
    assert release("1.7.1.116") == release("1.7.1") == (1, 7, 1)
    assert release("2.13.0+cpu") == (2, 13, 0)
    assert release("1.7.1") != release("1.7.0.116")
    assert installed_version("numpy") is not None
    assert installed_version("no_such_module") is None


def test_a_bundle_finds_its_engines_and_misses_its_graphs(folder: Path) -> None:
    whole = Bundle(folder, verify=False)
    assert whole.engine(GRAPH, "tensorrt-rtx") == record()
    assert whole.engine(GRAPH, "tensorrt") is None
    whole.require_graphs()
    files = {name: entry for name, entry in whole.manifest.files.items() if name != GRAPH}
    write_manifest(folder, replace(whole.manifest, files=files))
    with pytest.raises(BundleError, match=rf"{GRAPH} was left out \(--engines-only\)"):
        Bundle(folder, verify=False).require_graphs()


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return %(init)s; }
int cuDriverGetVersion(int *v) { *v = 12080; return 0; }
int cuDeviceGet(int *d, int ordinal) { *d = 7; return ordinal; }
int cuDeviceGetAttribute(int *v, int what, int d) { *v = what == 75 ? 8 : what == 76 ? 9 : -1; return d != 7; }
int cuDeviceTotalMem_v2(size_t *v, int d) { *v = 51000000000ull; return d != 7; }
int cuDeviceGetName(char *v, int room, int d) { strncpy(v, "NVIDIA L40", room); return d != 7; }
"""


def driver(folder: Path, values: Mapping[str, Any]) -> str:
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(DRIVER % values)
    subprocess.run(("cc", "-shared", "-fPIC", "-o", str(library), str(source)), check=True)
    return str(library)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_driver_is_asked_as_it_wants_to_be(tmp_path: Path) -> None:
    found = find_gpu(driver(tmp_path, {"init": 0}))
    assert found == GPU("NVIDIA L40", "8.9", 51_000_000_000, (12, 8))
    assert find_gpu(str(tmp_path / "libcuda.so.1"), ordinal=1) is None  # no such device


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_driver_without_a_device_is_no_gpu(tmp_path: Path) -> None:
    assert find_gpu(driver(tmp_path, {"init": 100})) is None  # CUDA_ERROR_NO_DEVICE
    assert find_gpu(str(tmp_path / "no-such-library.so")) is None
