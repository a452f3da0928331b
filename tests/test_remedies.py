"""What messages tell people to type exists: each command with its flags, each extra, each target of make."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
import tomllib

from framefusion.export.commands.cli import ff_export
from framefusion.runtime.commands.cli import ff_run
from tests.wheel import ROOT

PROGRAMS: dict[str, click.Group] = {"ff-run": ff_run, "ff-export": ff_export}
COMMAND = re.compile(r"\b(ff-run|ff-export) ([a-z]\w*)((?: (?!ff-)[^\s,;:()`']+)*)")
WORTH_PARSING = re.compile(r"ff-run|ff-export|[\"' ]--[a-z]|framefusion-aot\[|install_command")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z_-]*[a-z](?![\w-])")
FOREIGN = {
    *("--atol", "--model"),  # of optimum-cli
    *("--batch_size", "--num_fewshot", "--gen_kwargs"),  # of lmms-eval
    *("--std", "--gpu-architecture", "--version"),  # of compilers
    *("--onnxrt", "--load-inputs"),  # of polygraphy
    "--safe_serialization",  # of DeepSpeed's zero_to_fp32.py
}
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])


@cache
def modules() -> list[Path]:
    """Those that may name a command, a flag or an extra: the others need not be parsed."""
    folders = [ROOT / name for name in ("export", "runtime")]
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    core = ROOT / "framefusion"
    paths += [path for path in core.rglob("*.py") if path.relative_to(core).parts[0] not in ("export", "runtime")]
    return sorted(path for path in paths if WORTH_PARSING.search(path.read_text(encoding="utf-8")))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def texts() -> list[tuple[str, int, str]]:
    """Every text of the package that is no docstring, with X for what is filled in: file, line, text."""
    found = []
    for path in modules():
        tree = tree_of(path)
        skipped = {id(constant) for constant in docstrings(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                skipped |= {id(value) for value in node.values}
                text = "".join(str(value.value) if isinstance(value, ast.Constant) else "X" for value in node.values)
                found.append((str(path.relative_to(ROOT)), node.lineno, text))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
                found.append((str(path.relative_to(ROOT)), node.lineno, node.value))
    return found


def docstrings(tree: ast.Module) -> Iterator[ast.AST]:
    """Texts that stand by themselves: nobody who runs a command reads them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, (ast.Constant, ast.JoinedStr)):
            yield node.value
            yield from ast.walk(node.value)


def flags_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


ALL_FLAGS = {flag for group in PROGRAMS.values() for command in group.commands.values() for flag in flags_of(command)}


def test_there_is_something_to_test() -> None:
    found = [match for _, _, text in texts() for match in COMMAND.finditer(text)]
    assert len(found) > 10
    assert {match[1] for match in found} == set(PROGRAMS)


def test_every_command_in_a_text_exists_with_its_flags() -> None:
    wrong = []
    for path, line, text in texts():
        for program, name, rest in COMMAND.findall(text):
            command = PROGRAMS[program].commands.get(name)
            if command is None:
                wrong.append(f"{path}:{line} {program} {name}")
            else:
                unknown = set(FLAG.findall(rest)) - flags_of(command)
                wrong += [f"{path}:{line} {program} {name} {flag}" for flag in sorted(unknown)]
    assert wrong == []


def test_every_flag_in_a_text_is_one_of_a_command() -> None:
    wrong = [
        f"{path}:{line} {flag}"
        for path, line, text in texts()
        for flag in FLAG.findall(text)
        if flag not in ALL_FLAGS | FOREIGN
    ]
    assert wrong == []


def test_extras_are_installed_by_the_one_function_that_knows_how() -> None:
    """Where this package came from decides the command, so no text has it written out."""
    written_out = [f"{path}:{line}" for path, line, text in texts() if "framefusion-aot[" in text]
    assert written_out == []


def test_every_extra_that_is_named_exists() -> None:
    from framefusion.runtime.backends.cuda.driver import EXTRA, EXTRA_CUDA_12
    from framefusion.runtime.backends.table import BACKENDS
    from framefusion.runtime.trust.signatures import SIGNING

    named = {EXTRA, EXTRA_CUDA_12, SIGNING, *(row.extra for row in BACKENDS if row.extra)}
    for path in modules():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "install_command":
                named |= {str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)}
    assert {"export", "gpu", "signing", "tensorrt-rtx"} <= named
    assert named <= EXTRAS


def test_no_page_installs_from_an_index_that_does_not_have_it() -> None:
    """The package is on none: pages install from a clone, and whoever has it from elsewhere knows from where."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    assert [page.name for page in pages if "framefusion-aot[" in page.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_every_command_of_a_help_text_exists(program: str) -> None:
    wrong = []
    for name, command in PROGRAMS[program].commands.items():
        with click.Context(command, info_name=name) as context:
            text = " ".join(command.get_help(context).split())
        for other, called, _ in COMMAND.findall(text):
            if called not in PROGRAMS[other].commands:
                wrong.append(f"{program} {name}: {other} {called}")
    assert wrong == []
