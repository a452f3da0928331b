"""ff-run doctor: a line for whatever is there, broken, hanging or missing, and never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import CheckFailedError
from framefusion.runtime.backends import table
from framefusion.runtime.proof import doctor
from framefusion.runtime.proof.blocks.child import MARK
from tests.patience import PATIENCE
from tests.versions import needs_torch
from tests.wheel import ROOT


def run_doctor(folder: Path, *flags: str, broken: str = "", code: str = "") -> subprocess.CompletedProcess[str]:
    """The command, with a module of this name in front of the real one."""
    if broken:
        (folder / broken).mkdir()
        (folder / broken / "__init__.py").write_text(code, encoding="utf-8")
    path = os.pathsep.join((str(folder), str(ROOT)))
    environment = os.environ | {"PYTHONPATH": path, "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "80"}
    command = [sys.executable, "-c", "from framefusion.start import ff_run; ff_run()", "doctor", *flags]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def states(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    report = json.loads(done.stdout)
    assert report["schema"] == doctor.SCHEMA
    return {proof["name"]: proof for proof in report["proofs"]}


@pytest.mark.slow
def test_this_machine(tmp_path: Path) -> None:
    done = run_doctor(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime on cpu" in done.stdout
    assert "ready" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "code", "said"),
    [
        ("numpy", "raise ImportError('libopenblas is missing')", "libopenblas is missing"),
        ("onnxruntime", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it crashed (SIGSEGV)"),
        ("onnxruntime", "raise OSError('libstdc++ is too old')", "libstdc++ is too old"),
    ],
    ids=["no numpy", "crash", "cannot be loaded"],
)
def test_a_broken_library_is_a_line(module: str, code: str, said: str, tmp_path: Path) -> None:
    done = run_doctor(tmp_path, "--json", broken=module, code=code)
    assert done.returncode == CheckFailedError.exit_code, done.stderr
    assert "Traceback" not in done.stderr
    proof = states(done)["onnxruntime on cpu"]
    assert proof["state"] == "failed"
    assert said in proof["problem"]
    assert not json.loads(done.stdout)["right"]


@pytest.mark.slow
def test_a_library_that_is_missing_comes_with_its_command(tmp_path: Path) -> None:
    done = run_doctor(
        tmp_path, "--json", broken="onnxruntime", code="raise ModuleNotFoundError('no', name='onnxruntime')"
    )
    proof = states(done)["onnxruntime on cpu"]
    assert (proof["state"], proof["remedy"]) == ("missing", "pip install onnxruntime")
    assert done.returncode == CheckFailedError.exit_code  # it belongs to the base install


@pytest.mark.slow
@needs_torch
def test_an_engine_is_compiled_and_proven_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a minute of a compiler; without one the line says why nothing could be proven, and is no failure."""
    facts = doctor.run_child(("backend", "inductor", "cpu", "engines"), PATIENCE)
    assert facts["state"] == "right", facts
    (graph,) = facts["graphs"]
    assert graph["dtype"] == "float32"
    assert len(graph["checks"]) > 30
    monkeypatch.setenv("CXX", "no-such-compiler")
    facts = doctor.run_child(("backend", "inductor", "cpu", "engines"), PATIENCE)
    assert facts["state"] == "unproven"
    assert "no engine could be compiled here to prove it: inductor needs a C++ compiler" in facts["problem"]


@pytest.mark.slow
def test_what_hangs_is_ended() -> None:
    facts = doctor.run_child(("device", "cpu"), 0.01)
    assert facts["state"] == "failed"
    assert "did not end within 0.01 s" in facts["problem"]


def test_what_a_library_prints_is_no_result() -> None:
    line = f'{MARK}{{"state": "right"}}'
    assert doctor._last_object(f"loading\n{line}\nbye") == {"state": "right"}
    assert doctor._last_object(f"{MARK}{{}}") == {}
    assert doctor._last_object("loading\n") is None
    assert doctor._ended(-11, "") == doctor._failed("it crashed (SIGSEGV)")
    assert "exit code 3 (no disk)" in doctor._ended(3, "warning\nno disk\n")["problem"]


def test_what_is_not_there_is_not_wrong() -> None:
    def sound(state: str, backend: str | None = "tensorrt", device: str = "cuda") -> bool:
        return doctor._is_sound({"state": state, "backend": backend, "device": device})

    assert all(sound(state) for state in ("right", "absent", "missing", "unproven"))
    assert not sound("wrong")
    assert not sound("failed")
    assert not sound("missing", "onnxruntime", "cpu")
    assert sound("missing", "inductor", "cpu")


def test_engines_are_compiled_where_that_is_asked_for_alone() -> None:
    jobs = dict(doctor._jobs(has_gpu=True, engines=True))
    assert jobs["inductor on cuda"] == ("backend", "inductor", "cuda", "engines")
    assert jobs["onnxruntime on cpu"] == ("backend", "onnxruntime", "cpu")
    assert doctor._of_job("x", jobs["inductor on cuda"], {})["device"] == "cuda"
    assert not any("engines" in arguments for _, arguments in doctor._jobs(has_gpu=True))


def test_every_backend_has_a_line() -> None:
    names = {name for name, _ in doctor._jobs(has_gpu=True)}
    assert {f"{row.name} on {device}" for row in table.BACKENDS for device in row.devices} <= names


def test_a_driver_that_crashes_is_not_a_machine_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_jobs", lambda **_: [])
    monkeypatch.setattr(doctor, "run_child", lambda *_: doctor._failed("it crashed (SIGSEGV)") | {"seconds": 0.1})
    report = doctor.examine()
    assert [(proof["name"], proof["device"], proof["state"]) for proof in report["proofs"]] == [
        ("driver", "cuda", "failed")
    ]
    assert report["gpu"] is None
    assert report["cpu"]["cores"] >= 1
    assert not report["right"]
