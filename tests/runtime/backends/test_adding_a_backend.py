"""Adding a backend is a row and two modules: one that no machine has is compiled, inspected, chosen and run by its row.

The modules are single_file/backend.py beside this test and tests/export/engines/single_file/build.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import BackendError, BundleError
from framefusion.runtime.backends import table
from framefusion.runtime.backends.table import BACKENDS, BackendKind, EngineTraits
from framefusion.runtime.format.manifest_file import read_manifest
from tests.commands import assert_refused, export, run
from tests.versions import needs_torch
from tests.wheel import ROOT

NAME = "single-file"
ROW = BackendKind(
    NAME,
    ("cpu",),
    library="onnxruntime",
    open="tests.runtime.backends.single_file.backend:open_backend",
    engines=EngineTraits(
        builder="tests.export.engines.single_file.build:SingleFileBuilder", needs="needs onnxruntime of this version"
    ),
)
ASKED = ("--prompt", "What is shown?", "--max-new-tokens", 4, "--json")


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "BACKENDS", (ROW, *BACKENDS))


@pytest.fixture(scope="module")
def compiled(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines of the row, compiled as `ff-export compile --backend single-file` does."""
    from framefusion.export.engines.compile import compile_bundle
    from framefusion.export.options import EngineOptions, Resources

    folder = tmp_path_factory.mktemp("single-file") / "bundle"
    shutil.copytree(bundle, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "BACKENDS", (ROW, *BACKENDS))
        compile_bundle(folder, EngineOptions(NAME), Resources(jobs=1, cache=folder.parent / "cache"))
    return folder


def test_the_flags_of_both_commands_name_it() -> None:
    code = f"""
import click
from framefusion.runtime.backends import table
from framefusion.runtime.backends.table import BackendKind, EngineTraits
table.BACKENDS = ({ROW!r}, *table.BACKENDS)
from framefusion.export.commands.cli import ff_export
from framefusion.runtime.commands.cli import ff_run
for command in (ff_export.commands["compile"], ff_run.commands["generate"]):
    (flag,) = (parameter for parameter in command.params if parameter.name == "backend")
    print(list(flag.type.choices))
"""
    done = subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, check=True)
    assert [NAME in line for line in done.stdout.splitlines()] == [True, True]


@needs_torch
def test_a_manifest_may_hold_its_engines_and_no_row_no_engines(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = read_manifest(compiled).engines
    assert {(engine.kind, engine.library) for engine in engines} == {(NAME, "onnxruntime")}
    assert all(engine.file.startswith(f"engines/{NAME}/") for engine in engines)
    monkeypatch.setattr(table, "BACKENDS", BACKENDS)
    assert_refused(export("inspect", compiled), BundleError, "expected one of tensorrt", f"found '{NAME}'")


@needs_torch
def test_inspection_says_what_it_needs(compiled: Path) -> None:
    result = export("inspect", compiled)
    assert result.exit_code == 0, result.output
    assert f"{NAME} engines, float32, by onnxruntime" in result.stdout
    assert "needs onnxruntime of this version" in result.stdout
    facts: dict[str, Any] = json.loads(export("inspect", compiled, "--json").stdout)
    assert [engines["experimental"] for engines in facts["engines"]] == [True]


@needs_torch
def test_it_is_chosen_and_answers_as_onnxruntime_does(compiled: Path, bundle: Path) -> None:
    ours = json.loads(run("generate", compiled, *ASKED).stdout)
    theirs = json.loads(run("generate", compiled, *ASKED, "--backend", "onnxruntime").stdout)
    assert ours["backend"]["name"] == NAME
    assert theirs["backend"]["name"] == "onnxruntime"
    assert ours["token_ids"] == theirs["token_ids"]
    without = json.loads(run("generate", bundle, *ASKED).stdout)["backend"]
    assert {"backend": NAME, "device": "cpu", "because": "no such engine in the bundle"} in without["passed_over"]


@needs_torch
def test_engines_of_another_release_are_passed_over(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from framefusion.runtime.backends.choice import choose
    from framefusion.runtime.bundle import Bundle

    opened = Bundle(compiled, verify=False)
    old = opened.with_manifest(engines=tuple(replace(engine, version="1.0.0") for engine in opened.manifest.engines))
    chosen = choose(old)
    assert chosen.option.backend == "onnxruntime"
    assert "it was built by onnxruntime 1.0.0" in chosen.text
    with pytest.raises(BackendError, match=f"compile .* --backend {NAME}"):
        choose(old, NAME)
