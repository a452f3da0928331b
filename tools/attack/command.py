"""A command in this process, and what its end says."""

from __future__ import annotations

import traceback
from typing import Any

from click.testing import CliRunner

from framefusion import errors
from tools.attack.harness import End, Fault

CODES = {0, 2} | {
    kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")
}
"""Of the README's table."""


def call(program: str, arguments: list[str]) -> list[Any]:
    """Exit code, the last line of stderr, and the traceback of what was not caught."""
    if program == "ff-run":
        from framefusion.runtime.commands.cli import ff_run as group
    else:
        from framefusion.export.commands.cli import ff_export as group

    done = CliRunner().invoke(group, arguments)
    trace = ""
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        trace = "".join(traceback.format_exception(done.exception))
    return [done.exit_code, done.stderr.strip().splitlines()[-1:], trace]


def fault_of(end: End, what: str) -> Fault | None:
    """What is wrong with how a command ended; that a process was killed by the trial is not."""
    if end.status is None:
        return Fault("hang", what)
    if end.status == -9 and end.result is None:
        return None
    if end.status != 0:
        return Fault("traceback", f"{what}: the process ended with {end.status}: {end.result}")
    code, message, trace = end.result
    if trace:
        return Fault("traceback", f"{what}: {trace}")
    if code not in CODES:
        return Fault("wrong", f"{what}: exit code {code}, {message}")
    if code not in (0, 2) and not (message and message[0].startswith("error: ")):
        return Fault("wrong", f"{what}: exit code {code} without a message, {message}")
    return None
