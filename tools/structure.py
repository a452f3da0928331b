"""The structure of this code base in numbers: sizes, folders, imports, names, and how many places an addition touches.

python -m tools.structure                            # the working tree
python -m tools.structure --revision HEAD~3          # a commit
python -m tools.structure --compare HEAD~3           # a commit beside the working tree, as a table
python -m tools.structure --root another/checkout    # any of these for another checkout

Each measure is a function whose docstring says what is counted. What is read, and the graph, is of tools/syntax.py.
tests/test_house.py keeps the three limits below.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from tools.syntax import (
    BANNED_NAMES,
    TOPS,
    arrows,
    assignments,
    banned_identifiers,
    circles,
    function_lines,
    graph_of,
    identifiers,
    is_tuple_assignment,
    merged,
    read_modules,
    type_hints,
)

ROOT = Path(__file__).parents[1]
LONG_FILE = 400  # lines: a file above is long
LONG_FUNCTION = 60  # lines
FULL_FOLDER = 7  # modules beside __init__.py

FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "qwen2_vl": r"qwen2[-_ ]?vl",
        "qwen2_5_vl": r"qwen2[-_. ]?5[-_ ]?vl",
        "qwen3_vl": r"qwen3[-_ ]?vl",
        "llava": r"llava",
        "minicpmv": r"minicpm",
        "nvila": r"nvila",
        "internvl": r"internvl",
    }
)
"""Family -> pattern of its names, in any case: of its rows, classes, functions and modules."""

BACKENDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "onnxruntime": ("onnxruntime",),
        "tensorrt": ("tensorrt",),
        "tensorrt-rtx": ("tensorrt-rtx", "tensorrt_rtx"),
        "inductor": ("inductor",),
        "openvino": ("openvino", "openvino-bf16", "openvino-int8-kv"),
    }
)
"""Kind of a backend -> the literals that mean it."""

Row = tuple[str, str]
"""What is measured, and how much of it there is."""


class CodeBase:
    """A checkout, read once.

    Raises:
        SystemExit: it has no module.
    """

    def __init__(self, root: Path) -> None:
        self.modules = read_modules(root)
        if not self.modules:
            raise SystemExit(f"{root} holds no module below {', '.join(TOPS)}: name the root of a checkout")
        self.graph = graph_of(self.modules)
        self.tests = [_lines(path) for path in (root / "tests").rglob("*.py")]

    @property
    def folders(self) -> dict[str, int]:
        """Package -> the modules that lie in its folder itself, beside `__init__.py`."""
        counts = dict.fromkeys((module.folder for module in self.modules), 0)
        for module in self.modules:
            counts[module.folder] += not module.is_package
        return counts


def _lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


# --- Measures -------------------------------------------------------------------------------------------------------


def module_sizes(code: CodeBase) -> Iterator[Row]:
    """Modules, `__init__.py` included, and their lines, blank ones and comments included."""
    for top in (*TOPS, "all"):
        lines = [module.lines for module in code.modules if top in (module.top, "all")]
        yield f"{top}: modules / lines", f"{len(lines)} / {sum(lines):,}"
    yield "longest file", str(max(module.lines for module in code.modules))
    yield f"files above {LONG_FILE} lines", str(sum(module.lines > LONG_FILE for module in code.modules))


def function_sizes(code: CodeBase) -> Iterator[Row]:
    """Functions and methods, nested ones too, and their lines from `def` to the end. p90 is the nearest rank."""
    lines = sorted(count for module in code.modules for _, count in function_lines(module)) or [0]
    median = lines[(len(lines) - 1) // 2]
    p90 = lines[(9 * len(lines) - 1) // 10]
    yield "functions", f"{sum(map(bool, lines)):,}"
    yield "lines of a function: median / p90 / max", f"{median} / {p90} / {lines[-1]}"
    yield f"functions above {LONG_FUNCTION} lines", str(sum(count > LONG_FUNCTION for count in lines))


def folder_sizes(code: CodeBase) -> Iterator[Row]:
    """Modules that lie in a folder itself, `__init__.py` not counted: of the three top-level folders, and of all."""
    counts = code.folders
    for top, package in TOPS.items():
        yield f"loose files in {top}/", str(counts.get(package, 0))
    yield "folders", str(len(counts))
    yield "most files in a folder", str(max(counts.values()))
    yield f"folders of more than {FULL_FOLDER} files", str(sum(count > FULL_FOLDER for count in counts.values()))


def imports(code: CodeBase) -> Iterator[Row]:
    """Pairs of modules of which the first imports the second: at the top, for types only, or in a function.

    A circle is a largest group of modules that all reach one another along such arrows.
    """
    groups = circles(code.graph)
    yield "arrows between modules", str(_arrows(code.graph))
    yield "circles of modules (modules in them)", f"{len(groups)} ({sum(map(len, groups))})"
    yield "arrows from runtime to export", str(len(arrows(code.graph, TOPS["runtime"], TOPS["export"])))


def folder_imports(code: CodeBase) -> Iterator[Row]:
    """Pairs of folders with an import from a module of the first to one of the second; only files in the folder itself.

    More folders have more arrows; circles of folders do not grow by themselves.
    """
    folder_of = {module.name: module.folder for module in code.modules}
    graph = merged(code.graph, lambda name: folder_of[name])
    groups = circles(graph)
    yield "arrows between folders", str(_arrows(graph))
    yield "circles of folders (folders in them)", f"{len(groups)} ({sum(map(len, groups))})"


def entries(code: CodeBase) -> Iterator[Row]:
    """What a listing of a top-level folder shows: a folder with all below it, and a loose file, are an entry each.

    The arrows are the pairs of entries with an import from the first to the second.
    """
    for top, package in TOPS.items():
        inside = {module.name for module in code.modules if module.top == top}
        below = {name: targets & inside for name, targets in code.graph.items() if name in inside}
        depth = package.count(".") + 2
        graph = merged(below, lambda name, depth=depth: ".".join(name.split(".")[:depth]))  # type: ignore[misc]
        yield f"{top}: entries / arrows between them", f"{len(graph)} / {_arrows(graph)}"


def _arrows(graph: Mapping[str, set[str]]) -> int:
    return sum(map(len, graph.values()))


def tuple_assignments(code: CodeBase) -> Iterator[Row]:
    """Share of `a, b = x, y` in the assignments with `=`; annotated and augmented ones are not counted."""
    nodes = [node for module in code.modules for node in assignments(module)]
    yield "tuple = tuple of all assignments", _share(sum(map(is_tuple_assignment, nodes)), len(nodes))


def banned_names(code: CodeBase) -> Iterator[Row]:
    """Places where an identifier of BANNED_NAMES stands, leading underscores aside; then longer names with such a part.

    An identifier is a name, attribute, parameter, keyword, function, class or import, where it is defined and where it
    is used. Names of other libraries are counted, too.
    """
    names = [name for module in code.modules for _, name in identifiers(module)]
    parts = [name for name in names if name.lstrip("_") not in BANNED_NAMES and BANNED_NAMES & set(name.split("_"))]
    yield "banned names", str(sum(len(banned_identifiers(module)) for module in code.modules))
    yield "longer names with a banned part", str(len(parts))


def any_types(code: CodeBase) -> Iterator[Row]:
    """Share of parameters (`self` and `cls` aside) and of returns whose annotation says `Any`, alone or inside."""
    parameters: list[str] = []
    returns: list[str] = []
    for module in code.modules:
        of_parameters, of_returns = type_hints(module)
        parameters += of_parameters
        returns += of_returns
    yield "parameters that say Any", _share(_say_any(parameters), len(parameters))
    yield "returns that say Any", _share(_say_any(returns), len(returns))


def _say_any(annotations: list[str]) -> int:
    return sum(bool(re.search(r"\bAny\b", annotation)) for annotation in annotations)


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%} ({part:,} of {whole:,})"


def family_places(code: CodeBase) -> Iterator[Row]:
    """For each of FAMILIES: folders with files of its name, those files, and the files of `family_edits`."""
    for family, pattern in FAMILIES.items():
        files = [module.path for module in code.modules if re.search(pattern, module.path)]
        folders = {path.rpartition("/")[0] for path in files}
        edits = family_edits(code, family)
        yield f"{family}: folders / files / edits elsewhere", f"{len(folders)} / {len(files)} / {len(edits)}"


def family_edits(code: CodeBase, family: str) -> list[str]:
    """Files of no family whose code names this one: what a family has to edit besides adding its files.

    A file is a family's when its path names it. The code of a file is its identifiers, imports and string constants:
    comments and docstrings do not count.
    """
    shared = [module for module in code.modules if not re.search("|".join(FAMILIES.values()), module.path)]
    return [module.path for module in shared if re.search(FAMILIES[family], module.code, re.IGNORECASE)]


def backend_places(code: CodeBase) -> Iterator[Row]:
    """For each of BACKENDS: the files of `backend_edits`."""
    for kind in BACKENDS:
        yield f"{kind}: edits elsewhere", str(len(backend_edits(code, kind)))


def backend_edits(code: CodeBase, kind: str) -> list[str]:
    """Files of no backend in which a literal of a kind stands, as a whole string constant.

    A file is a backend's when a part of its path begins with the first word of a kind: engines/tensorrt_build.py,
    backends/tensorrt/engine.py. Messages that name a backend, comments and docstrings do not count.
    """
    path = "|".join(rf"(^|/){name.partition('-')[0]}" for name in BACKENDS)
    shared = [module for module in code.modules if not re.search(path, module.path)]
    return [module.path for module in shared if module.constants & set(BACKENDS[kind])]


def suite_size(code: CodeBase) -> Iterator[Row]:
    """Python files below tests/, fixtures included, and their lines."""
    yield "tests: files / lines", f"{len(code.tests)} / {sum(code.tests):,}"


MEASURES: tuple[Callable[[CodeBase], Iterator[Row]], ...] = (
    *(module_sizes, function_sizes, folder_sizes, imports, folder_imports, entries),
    *(tuple_assignments, banned_names, any_types, family_places, backend_places, suite_size),
)


def measured(code: CodeBase) -> dict[str, str]:
    """Every measure of a checkout, in order: what is measured -> how much of it there is."""
    return {title: value for measure in MEASURES for title, value in measure(code)}


# --- Report ---------------------------------------------------------------------------------------------------------


def table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """A Markdown table: a row for each measure, a column for each checkout."""
    titles = dict.fromkeys(title for values in columns.values() for title in values)
    rows = [("", *columns), ("---", *("---" for _ in columns))]
    rows += [(title, *(values.get(title, "-") for values in columns.values())) for title in titles]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def details(code: CodeBase) -> Iterator[str]:
    """The names behind the figures: what is long or full, circles, arrows from runtime to export, shared files."""
    yield from (f"long file: {module.path} {module.lines}" for module in code.modules if module.lines > LONG_FILE)
    lengths = [length for module in code.modules for length in function_lines(module)]
    yield from (f"long function: {place} {count}" for place, count in lengths if count > LONG_FUNCTION)
    yield from (f"full folder: {name} {count}" for name, count in code.folders.items() if count > FULL_FOLDER)
    yield from (f"circle: {', '.join(names)}" for names in circles(code.graph))
    yield from (f"back: {arrow}" for arrow in arrows(code.graph, TOPS["runtime"], TOPS["export"]))
    yield from (f"{family} is named in: {', '.join(family_edits(code, family))}" for family in FAMILIES)
    yield from (f"{kind} is named in: {', '.join(backend_edits(code, kind))}" for kind in BACKENDS)


@contextmanager
def checkout(root: Path, revision: str | None) -> Iterator[Path]:
    """The Python files of a commit in a temporary folder; without a revision, the working tree itself.

    Raises:
        SystemExit: git cannot give that commit; it has said why.
    """
    if revision is None:
        yield root
        return
    command = ["git", "-C", str(root), "archive", "--format=tar", revision, "*.py"]
    archive = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if archive.returncode:
        raise SystemExit(f"{revision} cannot be read: git ended with {archive.returncode}")
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
        yield Path(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: this one)")
    parser.add_argument("--revision", help="a commit of it (default: the working tree)")
    parser.add_argument("--compare", metavar="REV", help="another commit, shown before it")
    flags = parser.parse_args(arguments)
    columns = {}
    if flags.compare:
        with checkout(flags.root, flags.compare) as root:
            columns[flags.compare] = measured(CodeBase(root))
    with checkout(flags.root, flags.revision) as root:
        code = CodeBase(root)
    columns[flags.revision or "working tree"] = measured(code)
    print(table(columns))
    print(*("", *details(code)), sep="\n")


if __name__ == "__main__":
    main()
