"""`ff-export compile`: refusals before anything is written; then real TensorRT-RTX engines, built without a GPU."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framefusion import errors
from framefusion.export.engines import compile as compilation
from framefusion.export.engines import jobs
from framefusion.export.engines.builder import EngineSpec
from framefusion.export.engines.jobs import Job, admitted, components_of
from framefusion.export.engines.tensorrt import build as tensorrt_build
from framefusion.export.options import BuildOptions
from framefusion.installation import install_command
from framefusion.runtime.backends import table
from framefusion.runtime.backends.fit import examine
from framefusion.runtime.backends.tensorrt.library import load_library
from framefusion.runtime.format.engine_record import ProfileRecord
from framefusion.runtime.format.manifest import FixedRecord, Manifest
from framefusion.runtime.format.manifest_file import read_manifest, write_manifest
from framefusion.runtime.machine.gpu import find_gpu
from tests.commands import assert_refused, export
from tests.conftest import made_once
from tests.export.engines.test_child import crash
from tests.patience import PATIENCE

KIND = ("--backend", "tensorrt-rtx")
TARGETS = ("--target-sm", "86,89,120")
PORTABLE = ("--max-input-len", 256, "--buckets", "256", "--depth", 0, "--max-kv-cache-capacity", 288)
ENGINES = 3  # two segments and the tower
GRAPH = "segments/rest/graph.onnx"

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="no wheel for this machine")


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphless(checkpoint: Path, instant_traces: None, tmp_path: Path) -> Path:
    """A bundle that compilations accept until they read a graph."""
    result = export("build", checkpoint, "-o", tmp_path / "b", "--no-check", "--dtype", "float16", *DIALECT, *PORTABLE)
    assert result.exit_code == 0, result.output
    return tmp_path / "b"


DIALECT = ("--dialect", "portable")


def files_of(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_of_another_dialect(bundle: Path) -> None:
    phrases = ("gqa", "portable dialect", "--dialect portable --dtype float16")
    assert_refused(export("compile", bundle, *KIND), errors.BundleError, *phrases)


def test_float32(checkpoint: Path, tmp_path: Path) -> None:
    result = export("build", checkpoint, "-o", tmp_path / "b", *KIND, "--dtype", "float32")
    assert_refused(result, errors.BundleError, "type float32", "--dtype float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["build", "compile"])
def test_a_target_that_no_gpu_has(command: str, checkpoint: Path, graphless: Path, tmp_path: Path) -> None:
    before = files_of(graphless)
    arguments = (checkpoint, "-o", tmp_path / "out") if command == "build" else (graphless,)
    result = export(command, *arguments, *KIND, "--target-sm", "86,33", "--engine-cache", tmp_path / "cache")
    assert_refused(result, errors.BackendError, "--target-sm 3.3", "75,80,86,89,120")
    assert files_of(graphless) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["tensorrt-rtx", "tensorrt"])
def test_a_library_that_is_not_installed(kind: str, graphless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = kind.replace("-", "_")
    monkeypatch.setitem(sys.modules, module, None)
    phrases = (f"{module} is not installed", install_command(kind))
    assert_refused(export("compile", graphless, "--backend", kind), errors.BackendError, *phrases)


@pytest.mark.parametrize("flags", [(), ("--target-sm", "86")])
def test_engines_of_no_kind(graphless: Path, flags: tuple[str, ...]) -> None:
    result = export("compile", graphless, *flags)
    assert result.exit_code != 0
    assert "--backend" in result.stderr


def test_engines_only_without_engines(checkpoint: Path, tmp_path: Path) -> None:
    result = export("build", checkpoint, "-o", tmp_path / "b", "--engines-only")
    assert_refused(result, errors.BudgetError, "say which with --backend")


def test_no_bundle_and_no_readable_graph(graphless: Path, tmp_path: Path) -> None:
    assert_refused(export("compile", tmp_path / "none", *KIND), errors.BundleError, "no bundle at")
    result = export("compile", graphless, *KIND, "--engine-cache", tmp_path / "cache")
    assert_refused(result, errors.BundleError, "no readable ONNX graph")
    assert "engines" not in {path.name for path in graphless.iterdir()}


def test_another_process_writes_the_bundle(graphless: Path) -> None:
    from framefusion.export.writing.staging import LOCK, lock

    with lock(graphless / LOCK):
        assert_refused(export("compile", graphless, *KIND), errors.StorageError, "another build", "wait")


def test_inductor_wants_the_checkpoint(graphless: Path) -> None:
    result = export("compile", graphless, "--backend", "inductor")
    assert_refused(result, errors.BackendError, "--checkpoint")
    result = export("compile", graphless, "--backend", "inductor", "--target-sm", "86")
    assert_refused(result, errors.BackendError, "--target-sm is not for inductor")


def job(memory: int) -> Job:
    return Job(GRAPH, "file", SPEC, {}, 0, 0, memory)


def test_memory_decides_how_many_run_at_once() -> None:
    gigabytes = [job(size * 10**9) for size in (3, 1, 2)]
    assert admitted(gigabytes, 3, 10 * 10**9) == (3, "")
    assert admitted(gigabytes, 3, 6 * 10**9) == (
        2, "--jobs 3 would take about 6 GB of memory, 6 GB are free: 2 at once"
    )  # fmt: skip
    assert admitted(gigabytes, 1, 4 * 10**9) == (1, "")
    assert admitted([], 8, 0) == (8, "")  # all of them are in the cache
    with pytest.raises(errors.BackendError, match=r"takes about 3 GB of memory, 2 GB are free.*larger --depth"):
        admitted(gigabytes, 1, 2 * 10**9)


# --- The key ----------------------------------------------------------------------------------------------------------

SPEC = EngineSpec(
    Path("b") / GRAPH, "tensorrt-rtx", ("8.6", "8.9"), "float16", (288,),
    (ProfileRecord("decode", 2, {"hidden": ((1, 2, 32),)}),), {"optimization_level": 3},
)  # fmt: skip


def altered(manifest: Manifest, name: str) -> Manifest:
    files = {**manifest.files, name: replace(manifest.files[name], sha256="0" * 64)}
    return replace(manifest, files=files)


def fixed(manifest: Manifest) -> Manifest:
    return replace(manifest, fixed=FixedRecord(64, 192, 64, (256, 200), (56,)))


CHANGES: dict[str, Callable[[Manifest, EngineSpec], tuple[Manifest, EngineSpec]]] = {
    "kind": lambda manifest, spec: (manifest, replace(spec, kind="tensorrt")),
    "targets": lambda manifest, spec: (manifest, replace(spec, targets=("8.6",))),
    "dtype": lambda manifest, spec: (manifest, replace(spec, dtype="bfloat16")),
    "capacities": lambda manifest, spec: (manifest, replace(spec, capacities=(304,))),
    "profiles": lambda manifest, spec: (manifest, replace(spec, profiles=())),
    "options": lambda manifest, spec: (manifest, replace(spec, options={"optimization_level": 4})),
    "graph": lambda manifest, spec: (altered(manifest, GRAPH), spec),
    "weights": lambda manifest, spec: (altered(manifest, "segments/rest/weights.bin"), spec),
    "reduction": lambda manifest, spec: (fixed(manifest), spec),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_an_engine_changes_its_key(name: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "library_version", lambda _: "1.7.1.116")  # `tensorrt` is on no machine without a GPU
    manifest = read_manifest(bundle)
    ours, theirs = components_of(manifest, GRAPH, SPEC), components_of(*_with_graph(CHANGES[name](manifest, SPEC)))
    also = {"library"} if name == "kind" else set()
    assert {key for key in ours if ours[key] != theirs[key]} == {name} | also


def _with_graph(changed: tuple[Manifest, EngineSpec]) -> tuple[Manifest, str, EngineSpec]:
    return changed[0], GRAPH, changed[1]


def test_library_and_code_are_in_the_key(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(bundle)
    ours = components_of(manifest, GRAPH, SPEC)
    assert ours["version"] == tensorrt_rtx.__version__
    monkeypatch.setattr(jobs, "library_version", lambda _: "1.8.0")
    traits = replace(table.engine_traits("tensorrt-rtx"), builder=table.engine_traits("inductor").builder)
    rows = [replace(row, engines=traits) if row.name == "tensorrt-rtx" else row for row in table.BACKENDS]
    monkeypatch.setattr(table, "BACKENDS", tuple(rows))  # its engines are built by other code
    theirs = components_of(manifest, GRAPH, SPEC)
    assert {key for key in ours if ours[key] != theirs[key]} == {"version", "code"}


def test_an_adaptive_budget_compiles_nothing_anew(bundle: Path) -> None:
    """Thresholds and cost act between engines; the buckets that follow from the cost are in the profiles."""
    manifest = read_manifest(bundle)
    other = replace(manifest, reduction=replace(manifest.reduction, cost=0.9, similarity_lower_bound=0.1))
    assert components_of(other, GRAPH, SPEC) == components_of(manifest, GRAPH, SPEC)


def test_options_of_a_build_with_engines() -> None:
    options = BuildOptions.chosen(backend="tensorrt-rtx", target_sm=("86",), cost=None)
    assert (options.dialect, options.dtype, options.cost) == ("portable", "float16", 0.3)
    assert BuildOptions.chosen(backend="tensorrt-rtx", dtype="bfloat16").dtype == "bfloat16"
    assert BuildOptions.chosen().engines is None
    assert BuildOptions.chosen(backend="inductor").dialect == "gqa"


# --- Real engines -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def portable(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was not compiled; copy it first."""

    def make(folder: Path) -> None:
        command = ("build", checkpoint, "-o", folder, "--no-check", "--dtype", "float16", *DIALECT, *PORTABLE)
        assert export(*command).exit_code == 0

    return made_once(tmp_path_factory, "portable-bundle", make)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines") / "cache"


@pytest.fixture
def copy(portable: Path, tmp_path: Path) -> Path:
    shutil.copytree(portable, tmp_path / "bundle")
    return tmp_path / "bundle"


def report_of(*command: object) -> dict[str, Any]:
    result = export(*command, "--json")
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def checksums(folder: Path) -> Iterator[tuple[str, bool]]:
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        yield name, hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


@pytest.mark.slow
def test_engines_for_three_targets(copy: Path, shared_cache: Path) -> None:
    command = ("compile", copy, *KIND, *TARGETS, "--engine-cache", shared_cache)
    is_new = not shared_cache.exists()  # else a test before this one left the engines
    report = report_of(*command)
    manifest = read_manifest(copy)
    assert len(manifest.engines) == ENGINES == len(report["engines"])
    for engine, row in zip(manifest.engines, report["engines"], strict=True):
        path, record = copy / engine.file, manifest.files[engine.file]
        assert (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) == (record.size, record.sha256)
        assert (row["file"], row["bytes"], row["sha256"]) == (engine.file, record.size, record.sha256)
        assert (engine.targets, engine.version) == (("8.6", "8.9", "12.0"), tensorrt_rtx.__version__)
        assert record.size > engine.weight_bytes == row["weight_bytes"]
    rest = next(engine for engine in manifest.engines if engine.graph == GRAPH)
    steps = [(f"decode {rows} rows", 1) for rows in (2, 4, 8)]
    assert [(profile.name, profile.tokens) for profile in rest.profiles] == [
        ("prefill 256", 256),
        ("decode", 2),
        *steps,
    ]
    assert {tensor.name for tensor in rest.tensors} >= {"hidden", "kv_len", "past_key_0", "present_value_0", "logits"}
    assert report["peak_memory_bytes"] > 10**8
    assert (report["cache"]["hits"] == 0) == is_new
    stored = json.loads((copy / "engines/tensorrt-rtx/report.json").read_text())
    assert stored == {name: value for name, value in report.items() if name != "bundle"}
    sums = dict(checksums(copy))
    assert all(sums.values())
    assert set(sums) == {*manifest.files, "manifest.json"}
    # again: everything is there
    again = report_of(*command)
    assert [row["cache"] for row in again["engines"]] == ["hit"] * ENGINES
    assert read_manifest(copy).engines == manifest.engines
    # one target fewer: the nearest is named
    fewer = report_of("compile", copy, *KIND, "--target-sm", "86,89", "--engine-cache", shared_cache)
    assert {row["cache"] for row in fewer["engines"]} == {"miss: targets 8.6,8.9,12.0 -> 8.6,8.9"}


@pytest.mark.slow
def test_check_and_inspect_tell_of_the_engines(copy: Path, shared_cache: Path) -> None:
    report_of("compile", copy, *KIND, *TARGETS, "--engine-cache", shared_cache)
    checked = report_of("check", copy)
    assert all(row["fits"] and row["text"].startswith("fits") for row in checked["engines"])
    (facts,) = report_of("inspect", copy)["engines"]
    assert facts["bytes"] - facts["weight_bytes"] == facts["beyond_weights"] > 0
    assert facts["one_token_profile_bytes"] < facts["weight_bytes"]
    assert "experimental" in export("inspect", copy).output
    damaged = copy / read_manifest(copy).engines[0].file
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(content[:-1])
    result = export("check", copy)
    assert_refused(result, errors.BundleError, "1 of 3 engines cannot run here")
    assert f"truncated, {len(content) - 1} of {len(content)} bytes; with: ff-export compile {copy}" in result.stdout
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "sha256 is not the manifest's" in export("check", copy).stdout
    mended = report_of("compile", copy, *KIND, *TARGETS, "--engine-cache", shared_cache)
    assert mended["cache"]["hits"] == ENGINES
    assert export("check", copy).exit_code == 0
    manifest = read_manifest(copy)
    write_manifest(copy, replace(manifest, engines=tuple(replace(e, version="1.6.9.1") for e in manifest.engines)))
    result = export("check", copy)
    assert_refused(result, errors.BackendError, "3 of 3 engines cannot run here")
    assert f"built by tensorrt_rtx 1.6.9.1 and {tensorrt_rtx.__version__} is installed" in result.stdout


@pytest.mark.gpu
def test_the_library_itself_reads_the_header(copy: Path, shared_cache: Path) -> None:
    gpu, known = find_gpu(), load_library("tensorrt-rtx").capabilities
    if gpu is None or gpu.capability not in known:
        pytest.skip(f"tensorrt_rtx knows {', '.join(known)}, not this GPU")
    other = next(target for target in known if target != gpu.capability)
    for target, fits in ((gpu.capability, True), (other, False)):
        report_of("compile", copy, *KIND, "--target-sm", target, "--engine-cache", shared_cache)
        found = examine(copy, read_manifest(copy), gpu=gpu)
        assert {fit.fits for fit in found} == {fits}, found[0].text


@pytest.mark.slow
def test_engines_only(copy: Path, checkpoint: Path, shared_cache: Path) -> None:
    report_of("compile", copy, *KIND, *TARGETS, "--engine-cache", shared_cache, "--engines-only")
    assert not list(copy.rglob("*.onnx"))
    assert not list(copy.rglob("weights.bin"))
    assert export("check", copy).exit_code == 0
    assert "--engines-only" in export("inspect", copy).output
    named = ("was left out", "--engines-only")
    assert_refused(export("compile", copy, *KIND, "--target-sm", "80"), errors.BundleError, *named)
    assert_refused(export("check", copy, "--checkpoint", checkpoint), errors.BundleError, *named)
    built = copy.parent / "built"
    flags = (*KIND, *TARGETS, "--engine-cache", shared_cache, *PORTABLE, "--engines-only", "--no-check")
    report_of("build", checkpoint, "-o", built, *flags)
    assert set(dict(checksums(built))) == {*read_manifest(built).files, "manifest.json"}
    assert not [path for path in built.rglob("*") if path.suffix == ".onnx" or path.name == "weights.bin"]
    assert export("check", built).exit_code == 0


@pytest.mark.slow
def test_a_build_compiles_before_it_publishes(checkpoint: Path, tmp_path: Path, shared_cache: Path) -> None:
    out = tmp_path / "b"
    command = ("build", checkpoint, "-o", out, *KIND, *TARGETS, "--engine-cache", shared_cache, *PORTABLE)
    report = report_of(*command)
    manifest = read_manifest(out)
    assert report["check"]["passed"]
    assert len(manifest.engines) == ENGINES
    assert manifest.model.dtype == "float16"
    assert all(dict(checksums(out)).values())
    assert export("check", out).exit_code == 0
    assert report["bytes"]["engines/tensorrt-rtx"] > sum(engine.weight_bytes for engine in manifest.engines)


@pytest.mark.slow
def test_too_little_room_is_said_before_the_first_engine(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("compile", copy, *KIND, "--engine-cache", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(compilation, "available_memory", lambda: 10**8)
        assert_refused(export(*command), errors.BackendError, "MB of memory, 100 MB are free")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    assert_refused(export(*command), errors.StorageError, "1 kB are free", "--engine-cache")
    assert not (copy / "engines").exists()


def start(folder: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from framefusion.export.commands.cli import main; main()", "compile", str(folder)]
    command += [*KIND, "--target-sm", "86", "--engine-cache", str(cache), "--json", "--jobs", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_compilations_share_one_cache(portable: Path, tmp_path: Path) -> None:
    folders = [shutil.copytree(portable, tmp_path / name) for name in ("one", "two")]
    both = [start(folder, tmp_path / "cache") for folder in folders]
    reports = [json.loads(process.communicate(timeout=PATIENCE)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(report["cache"]["hits"] for report in reports) == ENGINES  # each was compiled by one of the two
    first, second = (read_manifest(folder) for folder in folders)
    assert [first.files[engine.file] for engine in first.engines] == [
        second.files[engine.file] for engine in second.engines
    ]
    assert [export("check", folder).exit_code for folder in folders] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_compilation_that_ended_early_goes_on(copy: Path, tmp_path: Path, how: signal.Signals) -> None:
    cache, before = tmp_path / "cache", read_manifest(copy)
    first = start(copy, cache)
    deadline = time.monotonic() + PATIENCE
    while len(list((cache / "entries").glob("*.json"))) < 1 and time.monotonic() < deadline:
        time.sleep(0.005)
    first.send_signal(how)
    _, errors_told = first.communicate(timeout=PATIENCE)
    assert first.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    assert "Traceback" not in errors_told
    assert read_manifest(copy) == before  # no engine is named that is not there
    done = len(list((cache / "entries").glob("*.json")))
    second = start(copy, cache)
    report = json.loads(second.communicate(timeout=PATIENCE)[0])
    assert report["cache"]["hits"] == done >= 1
    assert len(read_manifest(copy).engines) == ENGINES
    assert export("check", copy).exit_code == 0
    assert not [path for path in (cache / "building").iterdir() if path.suffix != ".lock"]


@pytest.mark.slow
def test_a_library_that_crashes_is_an_error(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the bundle stays as it was, and nothing unfinished is in the cache."""
    monkeypatch.setattr(tensorrt_build, "BUILD", f"{crash.__module__}:{crash.__name__}")
    before = files_of(copy)
    result = export("compile", copy, *KIND, *TARGETS, "--engine-cache", tmp_path / "cache")
    assert_refused(result, errors.CompilerCrashError, "crashed (SIGSEGV) while it compiled", "--reduction adaptive")
    assert files_of(copy) == before
    assert {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {".lock"}


@pytest.mark.slow
def test_a_killed_build_resumes_with_its_engines(checkpoint: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "b", tmp_path / "cache"
    command = [
        sys.executable,
        "-c",
        "from framefusion.export.commands.cli import main; main()",
        "build",
        str(checkpoint),
    ]
    command += ["-o", str(out), "--no-check", *KIND, "--target-sm", "86", "--engine-cache", str(cache), "--jobs", "1"]
    command += [*map(str, PORTABLE)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while not list((cache / "entries").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    first.wait(timeout=PATIENCE)
    assert not out.exists()
    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "b.partial").rglob("weights.bin")}
    done = len(list((cache / "entries").glob("*.json")))
    subprocess.run(command, check=True, timeout=PATIENCE, capture_output=True)
    report = json.loads((out / "engines/tensorrt-rtx/report.json").read_text())
    assert report["cache"]["hits"] == done
    assert {out / path.relative_to(tmp_path / "b.partial"): time for path, time in weights.items()} == {
        path: path.stat().st_mtime_ns for path in out.rglob("weights.bin")
    }
    assert export("check", out).exit_code == 0
