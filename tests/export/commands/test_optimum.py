"""`optimum-cli export framefusion`, run by optimum itself: the flags and the bundle of `ff-export build`."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from framefusion.export.commands.cli import ff_export
from tests.patience import PATIENCE
from tests.wheel import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("optimum") is None or importlib.util.find_spec("optimum.commands.base") is None,
    reason="optimum is not installed: pip install -e '.[dev]'",
)


def optimum_cli(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it, away from this repository."""
    command = [str(Path(sys.executable).parent / "optimum-cli"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)


def parsed(*arguments: str) -> list[str]:
    """What `ff-export` is called with."""
    from framefusion.export.commands.optimum import add_arguments, command_line

    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return command_line(parser.parse_args(arguments))


def test_every_flag_of_build_is_there_and_arrives() -> None:
    given: dict[str, str] = {}
    for parameter in ff_export.commands["build"].params:
        if isinstance(parameter, click.Option) and parameter.name not in ("output", "device"):
            choices = parameter.type.choices if isinstance(parameter.type, click.Choice) else ("3",)
            given[parameter.opts[0]] = "" if parameter.is_flag else str(choices[-1])
    assert {"--reduction", "--cost", "--dtype", "--revision", "--tolerance", "--calibrate", "--force"} <= set(given)
    arguments = parsed(
        "-m", "tiny", "out", "--device", "cpu", *(word for item in given.items() for word in item if word)
    )
    assert arguments[:4] == ["build", "tiny", "-o", "out"]
    assert sorted(arguments[4:]) == sorted(f"{name}={value}" if value else name for name, value in given.items())


def test_optimums_spellings() -> None:
    assert parsed("--model", "tiny", "out", "--atol", "1e-3", "--dtype", "fp16") == [
        "build", "tiny", "-o", "out", "--dtype=float16", "--tolerance=1e-3",
    ]  # fmt: skip
    assert parsed("-m", "tiny", "out", "--calibrate", "a.mp4", "--calibrate", "b.mp4")[4:] == [
        "--calibrate=a.mp4", "--calibrate=b.mp4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--device", "cuda"), "'cuda' is not supported"),
        (("--dtype", "int8"), "'int8' is not one of"),
        (("--depth", "x"), "'x' is not a valid integer"),
        (("--atol", "-1"), "-1"),
    ],
)
def test_what_is_refused(arguments: tuple[str, str], word: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=word):
        parsed("-m", "tiny", "out", *arguments)


def test_nothing_else_needs_optimum() -> None:
    """It may be absent: only the module that optimum itself loads imports it."""
    importing = set()
    for path in (ROOT / "export").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        if any(name.split(".")[0] == "optimum" for name in names):
            importing.add(path.relative_to(ROOT).as_posix())
        assert path.name == "optimum.py" or "framefusion.export.commands.optimum" not in names
    assert importing == {"export/commands/optimum.py"}


def test_the_namespace_stays_optimums() -> None:
    assert not list((ROOT / "optimum").rglob("__init__.py"))


@pytest.mark.slow
def test_help_is_optimums_own(tmp_path: Path) -> None:
    listed = optimum_cli("export", "--help", folder=tmp_path)
    assert "framefusion" in listed.stdout, listed.stderr
    done = optimum_cli("export", "framefusion", "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: optimum-cli export framefusion")
    for flag in ("--model", "--dtype", "--device", "--atol", "--reduction", "--cost", "--force", "--json"):
        assert flag in done.stdout
    wrong = optimum_cli("export", "framefusion", "-m", "tiny", "out", "--device", "cuda", folder=tmp_path)
    assert wrong.returncode == 2
    assert "'cuda' is not supported" in wrong.stderr


@pytest.mark.slow
def test_it_builds_what_ff_export_builds(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--cost", 0.4, "--similarity-lower-bound", 0.9, "--depth", 1, "--max-input-len", 512)
    done = optimum_cli("export", "framefusion", "--model", checkpoint, "optimum", *flags, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["check"]["passed"]
    code = "from framefusion.export.commands.cli import main; main()"
    ours = [sys.executable, "-c", code, "build", str(checkpoint), "-o", "ours", *map(str, flags)]
    subprocess.run(ours, cwd=tmp_path, check=True, capture_output=True, timeout=PATIENCE)
    theirs, expected = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("optimum", "ours"))
    assert theirs["files"] == expected["files"]  # sizes and SHA-256 of graphs, weights, tokenizer and card
    for manifest in (theirs, expected):
        assert manifest.pop("digest")  # of the seconds, too
        assert manifest["check"]["transformers"].pop("seconds")
    assert theirs == expected


@pytest.mark.slow
def test_refusals_keep_their_exit_codes(tmp_path: Path) -> None:
    done = optimum_cli("export", "framefusion", "--model", "/no/such/folder", "out", folder=tmp_path)
    assert done.returncode == 14
    assert done.stderr.splitlines()[-1].startswith("error: no checkpoint folder at /no/such/folder")
    assert "Traceback" not in done.stderr
