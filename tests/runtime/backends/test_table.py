"""The table of backends: what its rows name is there, and nothing is imported to read it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from framefusion.export.engines.builder import EngineBuilder, builder_of, code_folders
from framefusion.runtime.backends import table
from framefusion.runtime.backends.table import BACKENDS, BackendKind, backend, engine_traits
from tests.versions import needs_torch
from tests.wheel import ROOT

PARAMETERS = {
    "open": ["bundle", "name", "device", "threads"],
    "problem": ["row", "bundle", "machine"],
    "header": ["file", "engine"],
}


def references(row: BackendKind) -> Iterator[tuple[str, str]]:
    yield "open", row.open
    yield "problem", row.problem
    if row.engines is not None:
        yield "header", row.engines.header


@pytest.mark.parametrize("row", BACKENDS, ids=lambda row: f"{row.name} on {'-'.join(row.devices)}")
def test_what_a_row_names_takes_what_it_is_given(row: BackendKind) -> None:
    for field, reference in references(row):
        if reference:
            assert list(inspect.signature(table.load(reference)).parameters) == PARAMETERS[field], reference


def test_a_backend_has_one_row_for_a_device() -> None:
    pairs = [(row.name, device) for row in BACKENDS for device in row.devices]
    assert len(pairs) == len(set(pairs))
    assert len(table.engine_kinds()) == len(set(table.engine_kinds()))
    for name, device in pairs:
        assert device in backend(name, device).devices


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match="no backend onednn for any device; known are tensorrt, tensorrt-rtx, onnx"):
        backend("onednn")
    with pytest.raises(KeyError, match="no backend tensorrt for cpu"):
        backend("tensorrt", "cpu")
    with pytest.raises(KeyError, match="onnxruntime has no engines; tensorrt, tensorrt-rtx, inductor have"):
        engine_traits("onnxruntime")


@needs_torch
def test_builders_have_what_the_main_path_calls() -> None:
    wanted = {name for name in vars(EngineBuilder) if re.match("[a-z]", name)} | set(EngineBuilder.__annotations__)
    for kind in table.engine_kinds():
        made = table.load(engine_traits(kind).builder)
        assert wanted <= set(dir(made)), kind
        assert list(inspect.signature(made).parameters) == ["kind"], kind
    assert builder_of("inductor").suffix == ".pt2"


def test_the_code_in_a_key_is_found_without_importing_it() -> None:
    code = (
        "import sys\n"
        "from framefusion.export.engines.builder import code_folders\n"
        "print(*code_folders('inductor'), 'torch' in sys.modules)\n"
    )
    done = subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, check=True)
    folder, kernels, loaded = done.stdout.split()
    assert folder.endswith("export/engines/inductor")
    assert kernels.endswith("framefusion/ops")  # traced engines hold them; the graphs of a bundle only name the ops
    assert loaded == "False"
    (folder_of_tensorrt,) = code_folders("tensorrt")
    assert {path.name for path in folder_of_tensorrt.glob("*.py")} >= {"build.py", "network.py", "profiles.py"}


def test_the_table_imports_nothing_of_the_package() -> None:
    code = (
        "import sys\n"
        "import framefusion.runtime.backends.table\n"
        "print([name for name in sys.modules if name.startswith('framefusion.runtime.')])\n"
    )
    done = subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['framefusion.runtime.backends', 'framefusion.runtime.backends.table']"
