"""The commands in this process, and what must hold when they refuse."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from framefusion.errors import FrameFusionError
from framefusion.export.commands.cli import ff_export
from framefusion.runtime.commands.cli import ff_run


def export(*arguments: object) -> Result:
    return CliRunner().invoke(ff_export, [str(argument) for argument in arguments])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(ff_run, [str(argument) for argument in arguments])


def assert_refused(result: Result, kind: type[FrameFusionError], *phrases: str) -> None:
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == kind.exit_code, result.output
    assert result.stderr.splitlines()[-1].startswith("error: ")
    for phrase in phrases:
        assert phrase in result.stderr


def assert_only_complete_parts(output: Path) -> None:
    """No output, and in the staging folder no file that the journal does not name."""
    assert not output.exists()
    staged = output.with_name(output.name + ".partial")
    if not staged.exists():
        return
    journal = json.loads((staged / "journal.json").read_text())
    named = {name for files in journal["parts"].values() for name in files}
    found = {str(path.relative_to(staged)) for path in staged.rglob("*") if path.is_file()}
    assert found == named | {"journal.json", ".lock"}
    assert named
