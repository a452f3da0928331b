"""Which backend runs a bundle: told from a manifest and a description of a machine, so any machine can be described."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import BackendError
from framefusion.runtime.backends import choice, table
from framefusion.runtime.backends.choice import Choice, Option, choose
from framefusion.runtime.backends.fit import NO_ENGINE, NO_GPU, installed_version
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.commands import flags
from framefusion.runtime.format.engine_record import EngineKind, EngineRecord
from framefusion.runtime.format.manifest import FileRecord
from framefusion.runtime.machine.gpu import GPU
from framefusion.runtime.machine.machine import Machine
from framefusion.runtime.pipeline import Pipeline
from tests.commands import assert_refused, run
from tests.wheel import ROOT

RESULTS = ROOT / "tools/bench/results"
CPU_ONLY = Machine(None, ("CPUExecutionProvider",), "1.31.0", bindings=False)
RTX = GPU("NVIDIA GeForce RTX 4090", "8.9", 24 << 30, (13, 0))
WITH_GPU = Machine(RTX, ("CUDAExecutionProvider", "CPUExecutionProvider"), "1.31.0", bindings=True)
NO_VALIDITY = "tests.runtime.no_such_library"


def engine(kind: EngineKind, graph: str, targets: tuple[str, ...], library: str, version: str) -> EngineRecord:
    file = f"engines/{kind}/{graph.replace('/', '-')}.engine"
    return EngineRecord(kind, graph, file, library, version, targets, "float16", "key", (), (), (16,), 1)


@pytest.fixture(name="bundle")
def opened(bundle: Path) -> Bundle:
    return Bundle(bundle, verify=False)


def with_model(bundle: Bundle, **model: Any) -> Bundle:
    return bundle.with_manifest(model=replace(bundle.manifest.model, **model))


def compiled(bundle: Bundle, folder: Path, kind: EngineKind, *targets: str, library: str = "numpy") -> Bundle:
    """The bundle with an engine for each of its graphs; `library` stands for one that is installed."""
    found = installed_version(library)
    version = found[1] if found else "1.0"
    engines = tuple(engine(kind, graph, targets, library, version) for graph in bundle.graphs)
    files = dict(bundle.manifest.files)
    for record in engines:
        path = folder / record.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345678")
        files[record.file] = FileRecord(8, "0" * 64)
    other = bundle.with_manifest(engines=engines, files=files)
    other.folder = folder
    return other


def test_a_machine_without_gpu_takes_the_cpu_and_says_why_nothing_better(bundle: Bundle) -> None:
    chosen = choose(bundle, machine=CPU_ONLY)
    assert (chosen.option.backend, chosen.option.device, chosen.experimental) == ("onnxruntime", "cpu", False)
    assert chosen.text == (
        "backend: onnxruntime on cpu; not tensorrt or tensorrt-rtx or onnxruntime on cuda: there is no NVIDIA GPU "
        "here; not inductor: no such engine in the bundle"
    )
    assert [(each["backend"], each["device"]) for each in chosen.facts["passed_over"]] == [
        ("tensorrt", "cuda"), ("tensorrt-rtx", "cuda"), ("onnxruntime", "cuda"), ("inductor", "cpu"),
    ]  # fmt: skip


def test_the_cuda_provider_is_taken_where_it_is_listed(bundle: Bundle) -> None:
    half = with_model(bundle, dtype="float16")
    chosen = choose(half, machine=WITH_GPU)
    assert (chosen.option.device, chosen.experimental) == ("cuda", True)
    assert chosen.text.startswith("backend: onnxruntime on cuda (experimental); not tensorrt or tensorrt-rtx: ")
    without = replace(WITH_GPU, providers=("CPUExecutionProvider",))
    assert choose(half, machine=without).option.device == "cpu"


@pytest.mark.parametrize(
    ("machine", "changes", "problem"),
    [
        (CPU_ONLY, {}, "there is no NVIDIA GPU here"),
        (replace(WITH_GPU, providers=("CPUExecutionProvider",)), {}, "has no CUDAExecutionProvider"),
        (replace(WITH_GPU, bindings=False), {}, "cuda-bindings is not installed"),
        (WITH_GPU, {}, "GroupQueryAttention has no CUDA kernel in float32"),
        (
            replace(WITH_GPU, onnxruntime="1.25.1"),
            {"dialect": "portable"},
            "onnxruntime 1.25.1 lack portable attention",
        ),
        (WITH_GPU, {"files": {}}, "the bundle has engines only"),
    ],
)
def test_what_keeps_the_cuda_provider_from_a_bundle(
    bundle: Bundle, machine: Machine, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(BackendError, match=problem):
        choose(bundle.with_manifest(**changes), "onnxruntime", "cuda", machine)


def test_engines_that_fit_come_first(bundle: Bundle, tmp_path: Path) -> None:
    both = compiled(bundle, tmp_path, "tensorrt-rtx", "8.6", "8.9")
    chosen = choose(both, machine=WITH_GPU)
    assert (chosen.option.backend, chosen.experimental) == ("tensorrt-rtx", True)
    assert [option.backend for option in chosen.passed_over] == ["tensorrt"]


def test_engines_for_another_gpu_are_passed_over_and_refused_when_forced(bundle: Bundle, tmp_path: Path) -> None:
    other = compiled(bundle, tmp_path, "tensorrt-rtx", "8.6")
    chosen = choose(other, machine=WITH_GPU)
    assert (chosen.option.backend, chosen.option.device) == ("onnxruntime", "cpu")  # float32 has no CUDA kernel
    assert "not tensorrt-rtx: it was built for 8.6 and NVIDIA GeForce RTX 4090 is 8.9" in chosen.text
    with pytest.raises(BackendError, match=r"--backend tensorrt-rtx: .* built for 8.6 .*--target-sm 86,89"):
        choose(other, "tensorrt-rtx", machine=WITH_GPU)


def test_engines_of_another_library_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    absent = compiled(bundle, tmp_path, "tensorrt-rtx", "8.9", library=NO_VALIDITY)
    with pytest.raises(BackendError, match=f"{NO_VALIDITY} 1.0 that built it is not installed"):
        choose(absent, "tensorrt-rtx", machine=WITH_GPU)


def test_truncated_engines_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    cut = compiled(bundle, tmp_path, "tensorrt-rtx", "8.9")
    (tmp_path / cut.manifest.engines[0].file).write_bytes(b"123")
    with pytest.raises(BackendError, match="is truncated, 3 of 8 bytes"):
        choose(cut, "tensorrt-rtx", machine=WITH_GPU)


def test_inductor_engines_for_the_cpu_need_no_gpu(bundle: Bundle, tmp_path: Path) -> None:
    here = compiled(bundle, tmp_path, "inductor", "cpu")
    assert choose(here, machine=CPU_ONLY).option == Option("inductor", "cpu")


def test_bfloat16_runs_on_no_cpu(bundle: Bundle) -> None:
    brain = with_model(bundle, dtype="bfloat16")
    assert choose(brain, machine=WITH_GPU).option == Option("onnxruntime", "cuda")
    with pytest.raises(BackendError, match=r"nothing can run this bundle here\. .*the bundle is in bfloat16"):
        choose(brain, machine=CPU_ONLY)


@pytest.mark.parametrize("version", ["1.24.1", "1.27.0"])
def test_portable_attention_that_is_wrong_on_the_cpu_is_refused(bundle: Bundle, version: str) -> None:
    old = replace(CPU_ONLY, onnxruntime=version)
    portable = bundle.with_manifest(dialect="portable")
    assert choose(bundle, machine=old).option == Option("onnxruntime", "cpu")
    with pytest.raises(BackendError, match=rf"onnxruntime {version} lack .* \(pip install 'onnxruntime>=1\.28'"):
        choose(portable, machine=old)
    assert choose(portable, machine=replace(CPU_ONLY, onnxruntime="1.28.0")).option == Option("onnxruntime", "cpu")


def test_a_place_that_a_backend_does_not_have(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="--backend tensorrt --device cpu: there is no such backend"):
        choose(bundle, "tensorrt", "cpu", CPU_ONLY)


def test_the_flags_name_every_backend_and_device() -> None:
    assert flags.BACKENDS == (
        "auto",
        "tensorrt",
        "tensorrt-rtx",
        "onnxruntime",
        "inductor",
        "openvino",
        "openvino-bf16",
        "openvino-int8-kv",
    )
    assert flags.DEVICES == ("auto", "cuda", "cpu")
    assert table.engine_kinds() == ("tensorrt", "tensorrt-rtx", "inductor")


def proven() -> dict[tuple[str, str], str]:
    """Backend and device -> the result that shows it."""
    return {(row.name, device): file for row in table.BACKENDS for device, file in row.results.items()}


def shown_by(result: Any) -> set[tuple[str, str]]:
    """Backends and devices that a result says it ran: one, several in turn, or that of a server."""
    if not isinstance(result, dict):
        return set()
    ran = [result, *result.get("contenders", {}).values()]
    shown = {(each["backend"]["name"], each["backend"]["device"]) for each in ran if "backend" in each}
    if "server_backend" in result:
        shown.add((result["server_backend"], "cuda" if result["machine"]["gpu"] else "cpu"))
    return shown


def test_what_is_called_proven_has_a_result_with_a_device() -> None:
    for (name, place), file in proven().items():
        result = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        assert (name, place) in (shown_by(result) or {("onnxruntime", "cpu")})
        assert result["machine"]["gpu" if place == "cuda" else "cpu"], file


def test_every_committed_result_of_a_backend_is_named() -> None:
    shown = set[tuple[str, str]]()
    for path in RESULTS.glob("*.json"):
        shown |= shown_by(json.loads(path.read_text(encoding="utf-8")))
    assert ("inductor", "cpu") in shown
    assert shown <= set(proven()), "name the result in its row of the table: it is no longer experimental"


def test_the_pipeline_opens_the_choice(bundle: Bundle) -> None:
    pipeline = Pipeline(bundle, threads=1, choice=choose(bundle, "onnxruntime", "cpu"))
    assert isinstance(pipeline.backend, OnnxRuntimeBackend)
    assert pipeline.choice is not None
    assert pipeline.choice.option == Option("onnxruntime", "cpu")
    given = Pipeline(bundle, pipeline.backend)
    assert given.choice is None


def test_the_command_prints_the_choice_and_refuses_the_impossible(bundle: Bundle) -> None:
    arguments = ["generate", bundle.folder, "--prompt", "What?", "--max-new-tokens", 1, "--no-verify"]
    facts = json.loads(run(*arguments, "--json").stdout)
    assert facts["backend"]["name"] == "onnxruntime"
    assert facts["backend"]["text"] in run(*arguments, "--verbose").stderr.splitlines()
    assert "backend" not in run(*arguments).stderr  # what is ordinary is not said
    assert_refused(run(*arguments, "--backend", "inductor"), BackendError, "no such engine in the bundle", "ff-export")


def test_engines_that_the_graphs_are_not_fit_for_take_another_bundle(bundle: Bundle) -> None:
    machine = replace(WITH_GPU, providers=())
    with pytest.raises(BackendError, match=r"ff-export build CHECKPOINT -o FOLDER --backend tensorrt-rtx") as refused:
        choose(bundle, "tensorrt-rtx", machine=machine)
    assert "its graphs have dialect gqa in float32" in str(refused.value)
    assert "ff-export compile" not in str(refused.value)


def test_what_is_ordinary_is_what_wants_a_gpu_or_engines() -> None:
    absent = (Option("tensorrt", "cuda", NO_GPU[0]), Option("inductor", "cpu", NO_ENGINE))
    assert Choice(Option("onnxruntime", "cpu"), absent).ordinary
    assert not Choice(Option("onnxruntime", "cpu"), (*absent, Option("inductor", "cpu", "it is wrong here"))).ordinary
    assert Choice(Option("inductor", "cpu"), absent).ordinary
    assert not Choice(Option("inductor", "cuda"), absent).ordinary  # experimental


def test_reasons_of_several_are_said_once() -> None:
    passed = (
        Option("tensorrt", "cuda", "a", "x"),
        Option("tensorrt-rtx", "cuda", "b", "x"),
        Option("inductor", "cpu", "a", "x"),
    )
    chosen = Choice(Option("onnxruntime", "cpu"), passed)
    assert chosen.text == "backend: onnxruntime on cpu; not tensorrt or inductor: a; not tensorrt-rtx: b"


def test_a_row_is_experimental_on_each_device_that_no_result_shows() -> None:
    shown = {
        (row.name, device): not choice.Choice(Option(row.name, device)).experimental
        for row in table.BACKENDS
        for device in row.devices
    }
    assert {where for where, is_shown in shown.items() if is_shown} == {
        ("inductor", "cpu"), ("onnxruntime", "cpu"), ("openvino", "cpu"), ("openvino-bf16", "cpu"),
    }  # fmt: skip
