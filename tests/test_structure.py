"""The figures of tools/structure.py and the graph of tools/syntax.py, on tiny code bases and on this one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from framefusion.export.families import FAMILIES as ROWS
from tools.structure import FAMILIES, CodeBase, backend_edits, checkout, details, family_edits, main, measured
from tools.syntax import (
    Module,
    arrows,
    assignments,
    banned_identifiers,
    circles,
    function_lines,
    graph_of,
    import_graph,
    is_swap,
    is_tuple_assignment,
    merged,
    read_modules,
    type_hints,
)

ROOT = Path(__file__).parents[1]
Write = Callable[[dict[str, str]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write files into an empty checkout whose folders are packages and whose links are there; returns its root."""

    def write(files: dict[str, str]) -> Path:
        for top in ("framefusion", "export", "runtime"):
            (tmp_path / top).mkdir(exist_ok=True)
        for name in ("export", "runtime"):
            (tmp_path / "framefusion" / name).symlink_to(f"../{name}")
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path

    return write


@pytest.fixture
def module(write: Write) -> Callable[[str], Module]:
    """A module of the runtime with the given text."""

    def module(text: str) -> Module:
        (only,) = read_modules(write({"runtime/a.py": text}))
        return only

    return module


@pytest.fixture(scope="module")
def here() -> tuple[Module, ...]:
    """The modules of this repository."""
    return read_modules(ROOT)


# --- Modules --------------------------------------------------------------------------------------------------------


def test_modules_are_called_as_imports_call_them_and_links_are_not_followed(write: Write) -> None:
    files = ("framefusion/__init__.py", "framefusion/a.py", "export/__init__.py", "export/b/__init__.py")
    root = write(dict.fromkeys((*files, "runtime/c/d/e.py"), ""))
    assert {module.name: module.folder for module in read_modules(root)} == {
        "framefusion": "framefusion",
        "framefusion.a": "framefusion",
        "framefusion.export": "framefusion.export",
        "framefusion.export.b": "framefusion.export.b",
        "framefusion.runtime.c.d.e": "framefusion.runtime.c.d",
    }
    assert [module.top for module in read_modules(root)] == [
        "framefusion",
        "framefusion",
        "export",
        "export",
        "runtime",
    ]


@pytest.mark.slow
def test_a_copy_with_real_folders_in_place_of_the_links_has_the_same_graph(
    tmp_path: Path, here: tuple[Module, ...]
) -> None:
    shutil.copytree(ROOT / "framefusion", tmp_path / "framefusion", ignore=shutil.ignore_patterns("__pycache__"))
    assert not (tmp_path / "framefusion" / "export").is_symlink()
    assert import_graph(tmp_path) == graph_of(here)


# --- Imports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "import framefusion.runtime.b",
        "import framefusion.runtime.b as name",
        "from framefusion.runtime.b import name",
        "from framefusion.runtime.b import *",
        "from framefusion.runtime import b",
        "from framefusion.runtime import b as name",
        "from . import b",
        "from .b import name",
        "if TYPE_CHECKING:\n    from framefusion.runtime.b import name",
        "try:\n    import framefusion.runtime.b\nexcept ImportError:\n    pass",
        "def f():\n    from framefusion.runtime import b",
        "class A:\n    async def f(self):\n        from framefusion.runtime.b import name",
    ],
)
def test_every_kind_of_import_is_an_arrow_and_may_close_a_circle(write: Write, line: str) -> None:
    files = {"runtime/__init__.py": "", "runtime/a.py": line, "runtime/b.py": "import framefusion.runtime.a"}
    graph = import_graph(write(files))
    assert graph["framefusion.runtime.a"] == {"framefusion.runtime.b"}
    assert circles(graph) == [["framefusion.runtime.a", "framefusion.runtime.b"]]


def test_relative_imports_climb_from_the_folder_of_a_module_and_from_a_package_itself(write: Write) -> None:
    files = {
        "export/b/__init__.py": "from .c import x\nfrom ..d import y\n",
        "export/b/c.py": "from .. import d\nfrom . import nothing_but_a_name\n",
        "export/d.py": "from .b.c import x\nfrom ..export.b import c\n",
    }
    assert import_graph(write(files)) == {
        "framefusion.export.b": {"framefusion.export.b.c", "framefusion.export.d"},
        "framefusion.export.b.c": {"framefusion.export.b", "framefusion.export.d"},
        "framefusion.export.d": {"framefusion.export.b.c"},
    }


def test_a_package_and_a_module_that_asks_it_for_a_name_are_a_circle(write: Write) -> None:
    files = {
        "runtime/p/__init__.py": "from framefusion.runtime.p.a import A",
        "runtime/p/a.py": "from framefusion.runtime.p import NAME",
        "runtime/b.py": "from framefusion.runtime.p.a import A",  # passes through the package: no arrow to it
    }
    graph = import_graph(write(files))
    assert circles(graph) == [["framefusion.runtime.p", "framefusion.runtime.p.a"]]
    assert graph["framefusion.runtime.b"] == {"framefusion.runtime.p.a"}


def test_no_circle_of_imports_is_found_where_there_is_none(write: Write) -> None:
    files = {
        "runtime/a.py": "import numpy\nimport framefusion.runtime.b\nimport framefusion.runtime.c",
        "runtime/b.py": "import framefusion.runtime.c\nNAME = 'framefusion.runtime.a'",
        "runtime/c.py": "import runtime.a\nfrom export import a",  # other packages, whatever they are
    }
    graph = import_graph(write(files))
    assert graph["framefusion.runtime.c"] == set()
    assert circles(graph) == []


def test_circles_are_largest_groups_each_once() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d", "f"}, "f": set[str](), "g": {"a", "f"}}
    assert circles(graph) == [["a", "b", "c"], ["d", "e"]]


def test_arrows_are_found_between_packages_and_not_between_names_that_begin_alike() -> None:
    graph = {"a": {"b.c"}, "a.x": {"b", "bc"}, "ab": {"b"}, "b": set[str](), "b.c": {"a"}, "bc": set[str]()}
    assert arrows(graph, "a", "b") == ["a -> b.c", "a.x -> b"]
    assert arrows(graph, "b", "a") == ["b.c -> a"]


def test_merged_nodes_keep_the_arrows_that_leave_them() -> None:
    graph = {"a.x": {"a.y", "b.x"}, "a.y": {"b.y"}, "b.x": set[str](), "b.y": {"a.x"}}
    assert merged(graph, lambda name: name[0]) == {"a": {"b"}, "b": {"a"}}


def test_no_module_of_this_repository_loses_its_imports(here: tuple[Module, ...]) -> None:
    """A module in which a search for lines finds an import from framefusion has an arrow."""
    graph = graph_of(here)
    for module in here:
        lines = (ROOT / module.path).read_text(encoding="utf-8").splitlines()
        if any(line.strip().startswith(("from framefusion.", "import framefusion.")) for line in lines):
            assert graph[module.name], module.path


# --- What a module holds --------------------------------------------------------------------------------------------


def test_tuples_on_both_sides_of_an_assignment_are_counted(module: Callable[[str], Module]) -> None:
    text = "a, b = x, y\na, b = b, a\nself.a, b = (c := 1), 2\n"
    others = "a, b = f()\na = x, y\na = b = 1\n[a, b] = rows\nd: int = 1\nd += 1\nfor a, b in x, y: pass\n"
    nodes = assignments(module(text + others))
    assert [node.lineno for node in nodes if is_tuple_assignment(node)] == [1, 2, 3]
    assert [node.lineno for node in nodes if is_swap(node)] == [2]
    assert len(nodes) == 7


NAMES = """\
import told as x
from a import b as seen, told

class Asked:
    made: int

def f(_own, *, words=1):
    try:
        return g(told=_own.settled)
    except E as asked:
        match x:
            case On(one):
                pass

told_by = "told"  # told
One = "seen"
"""


def test_banned_names_are_counted_wherever_they_stand(module: Callable[[str], Module]) -> None:
    assert sorted(banned_identifiers(module(NAMES))) == [
        *((2, "seen"), (2, "told"), (4, "Asked"), (5, "made"), (7, "_own"), (7, "words")),
        *((9, "_own"), (9, "settled"), (9, "told"), (10, "asked"), (12, "On"), (12, "one")),
    ]


FUNCTIONS = """\
@d
def f():
    'Doc.'

    async def g(): pass
    return g

class A:
    def h(self):
        pass
"""


def test_functions_are_measured_from_def_to_their_end(module: Callable[[str], Module]) -> None:
    sizes = [("runtime/a.py:2 f", 5), ("runtime/a.py:5 g", 1), ("runtime/a.py:9 h", 2)]
    assert sorted(function_lines(module(FUNCTIONS))) == sizes


def test_type_hints_are_those_of_every_parameter_but_the_instance(module: Callable[[str], Module]) -> None:
    text = "class A:\n    def f(self, a: int, /, b: 'Any', *c: Any, d=1, **e: list[Any]) -> None: ...\n"
    assert type_hints(module(text)) == (["int", "'Any'", "", "Any", "list[Any]"], ["None"])


# --- Measures -------------------------------------------------------------------------------------------------------


def test_a_small_code_base_is_measured(write: Write) -> None:
    files = {f"runtime/m{number}.py": "a, b = 1, 2\n" for number in range(8)}
    files |= {
        "runtime/__init__.py": "",
        "runtime/sub/__init__.py": "from framefusion.export import x\n",
        "export/__init__.py": "",
        "export/x.py": '"""X."""\n\nfrom framefusion.runtime import m1, m2, sub\n\na = 1\n',
        "framefusion/y.py": "from typing import Any\n\ndef told(a: Any, b: int) -> dict[str, Any]:\n"
        + "    pass\n" * 60,
        "tests/deep/test_x.py": "\n\n",
    }
    values = measured(CodeBase(write(files)))
    assert (
        values
        | {
            "framefusion: modules / lines": "1 / 63",
            "export: modules / lines": "2 / 5",
            "runtime: modules / lines": "10 / 9",
            "all: modules / lines": "13 / 77",
            "longest file": "63",
            "files above 400 lines": "0",
            "functions": "1",
            "lines of a function: median / p90 / max": "61 / 61 / 61",
            "functions above 60 lines": "1",
            "loose files in framefusion/": "1",
            "loose files in export/": "1",
            "loose files in runtime/": "8",
            "folders": "4",
            "most files in a folder": "8",
            "folders of more than 7 files": "1",
            "arrows between modules": "4",
            "circles of modules (modules in them)": "1 (2)",
            "arrows from runtime to export": "1",
            "arrows between folders": "3",
            "circles of folders (folders in them)": "1 (2)",
            "runtime: entries / arrows between them": "10 / 0",
            "tuple = tuple of all assignments": "88.9% (8 of 9)",
            "banned names": "1",
            "longer names with a banned part": "0",
            "parameters that say Any": "50.0% (1 of 2)",
            "returns that say Any": "100.0% (1 of 1)",
            "tests: files / lines": "1 / 2",
        }
        == values
    )


def test_percentiles_are_the_nearest_rank(write: Write) -> None:
    files = {"runtime/a.py": "".join(f"def f{n}():\n" + "    pass\n" * n for n in range(1, 11))}  # 2 to 11 lines
    values = measured(CodeBase(write(files)))
    assert values["lines of a function: median / p90 / max"] == "6 / 10 / 11"


def test_the_names_behind_the_figures_are_listed(write: Write) -> None:
    files = {f"runtime/deep/m{number}.py": "" for number in range(8)}
    files |= {
        "runtime/a.py": "import framefusion.export.x\n" + "\n" * 400,
        "export/x.py": "import framefusion.runtime.a",
    }
    files |= {"framefusion/f.py": "def f():\n" + "    pass\n" * 60}
    lines = list(details(CodeBase(write(files))))
    assert lines[:5] == [
        "long file: runtime/a.py 401",
        "long function: framefusion/f.py:1 f 61",
        "full folder: framefusion.runtime.deep 8",
        "circle: framefusion.export.x, framefusion.runtime.a",
        "back: framefusion.runtime.a -> framefusion.export.x",
    ]


def test_what_a_family_edits_is_the_files_of_no_family_whose_code_names_it(write: Write) -> None:
    files = {
        "export/families/__init__.py": "from framefusion.export.families import qwen3_vl\n",
        "export/families/llava/row.py": "import qwen3_vl",
        "export/families/qwen3_vl.py": "",
        "runtime/rules.py": "class Qwen3VLRule: ...\n",
        "runtime/table.py": 'RULES = {"qwen3_vl": 1}\n',
        "runtime/prose.py": '"""As Qwen3-VL."""\nx = 1  # qwen3_vl\nx = 2\n"""And qwen3_vl."""\n',
        "runtime/flag.py": 'help = f"of {x} (Qwen3-VL)"\n',
        "runtime/older.py": 'NAME = "qwen2_vl"\n',
    }
    code = CodeBase(write(files))
    edits = ["export/families/__init__.py", "runtime/flag.py", "runtime/rules.py", "runtime/table.py"]
    assert family_edits(code, "qwen3_vl") == edits
    assert measured(code)["qwen3_vl: folders / files / edits elsewhere"] == "1 / 1 / 4"


def test_what_a_backend_edits_is_the_files_of_no_backend_with_its_literal(write: Write) -> None:
    files = {
        "runtime/backends/tensorrt/engine.py": 'KIND = "tensorrt-rtx"\n',
        "export/engines/tensorrt_build.py": 'KIND = "tensorrt-rtx"\n',
        "runtime/table.py": 'KINDS: tuple[Literal["tensorrt-rtx"], ...] = ("tensorrt-rtx",)\n',
        "runtime/library.py": 'MODULE = "tensorrt_rtx"\n',
        "runtime/message.py": '"""tensorrt-rtx"""\nTEXT = "install tensorrt-rtx first"\nimport onnxruntime\n',
    }
    code = CodeBase(write(files))
    assert backend_edits(code, "tensorrt-rtx") == ["runtime/library.py", "runtime/table.py"]
    assert backend_edits(code, "onnxruntime") == []


def test_every_row_of_the_families_has_a_pattern() -> None:
    pattern = "|".join(FAMILIES.values())
    assert [row.name for row in ROWS if not re.search(pattern, row.name)] == []


# --- Commits --------------------------------------------------------------------------------------------------------


def git(root: Path, *arguments: str) -> None:
    names = ("-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
    subprocess.run(("git", "-C", root, *names, *arguments), check=True, capture_output=True)


def test_a_commit_is_compared_with_the_working_tree(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    root = write({"runtime/a.py": "x = 1\n", "runtime/gone.py": "\n", "tests/test_a.py": "\n"})
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    (root / "runtime" / "gone.py").unlink()
    (root / "runtime" / "a.py").write_text("def f():\n    pass\n", encoding="utf-8")
    main(["--root", str(root), "--compare", "HEAD"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | HEAD | working tree |"
    assert "| runtime: modules / lines | 2 / 2 | 1 / 2 |" in lines
    assert "| tests: files / lines | 1 / 1 | 1 / 1 |" in lines


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nowhere cannot be read: git ended with"):
        main(["--root", str(tmp_path), "--revision", "nowhere"])
    with pytest.raises(SystemExit, match="holds no module below framefusion, export, runtime"):
        main(["--root", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_a_commit_of_this_repository_can_be_measured() -> None:
    with checkout(ROOT, "HEAD") as root:
        assert root != ROOT
        values = measured(CodeBase(root))
    assert int(values["arrows between modules"]) > 500
    assert values["arrows from runtime to export"] == "0"
