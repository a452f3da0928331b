"""What both commands share: errors to messages and exit codes, one JSON object on stdout, tables.

Knows click, no model. In JSON mode stdout carries exactly one object, the result or the error; all else goes
to stderr. A wrong flag is the parser's own business: usage on stderr, exit code 2.
"""

from __future__ import annotations

import json
import shutil
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from framefusion.errors import FrameFusionError, InterruptedBuildError, MediaWarning

WIDTH = 100
_JSON = "framefusion.json"
_WARNED = "framefusion.warned"
_UNITS = ("B", "kB", "MB", "GB")
Command = TypeVar("Command", bound=Callable[..., Any])


class CommandGroup(click.Group):
    """Commands whose users see a message and an exit code where they made a mistake, and a traceback only for a bug."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command named."""
        texts: list[str] = ctx.meta.setdefault(_WARNED, [])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", MediaWarning)
                warnings.showwarning = _shown_by(texts, warnings.showwarning)
                return super().invoke(ctx)
        except FrameFusionError as error:
            _report(ctx, type(error).__name__, str(error))
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            _report(ctx, "Interrupted", "interrupted")
            ctx.exit(InterruptedBuildError.exit_code)


def _shown_by(texts: list[str], others: Callable[..., None]) -> Callable[..., None]:
    """What shows a warning: a line on stderr for those about films and pictures, kept in `texts`; others as before."""

    def show_warning(message: Warning | str, category: type[Warning], *place: Any, **named: Any) -> None:
        if not issubclass(category, MediaWarning):
            others(message, category, *place, **named)
            return
        texts.append(str(message))
        log(f"warning: {message}")

    return show_warning


def warned() -> list[str]:
    """What the command that runs has warned of, for its JSON."""
    return list(click.get_current_context().meta.get(_WARNED, []))


def json_option(command: Command) -> Command:
    """Add --json to a command; `show` looks it up."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[_JSON] = value

    text = "Print one JSON object on stdout, all else on stderr."
    return click.option("--json", is_flag=True, expose_value=False, is_eager=True, callback=remember, help=text)(
        command
    )


def wants_json(ctx: click.Context | None = None) -> bool:
    """Whether --json was given."""
    return bool((ctx or click.get_current_context()).meta.get(_JSON))


def show(report: Any, render: Callable[[Any], str]) -> None:
    """Print a report: as one JSON object, or as `render` lays it out."""
    click.echo(json.dumps(report) if wants_json() else render(report))


def log(message: str) -> None:
    """One line on stderr."""
    click.echo(message, err=True)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; those of numbers stand to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    right = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        parts = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(parts).rstrip()

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, cells)])


def labelled(facts: Mapping[str, str]) -> str:
    """A line for each fact, its label before it; wrapped to the terminal, at most WIDTH columns."""
    indent = max(map(len, facts)) + 2
    width = min(shutil.get_terminal_size().columns, WIDTH)
    lines = [
        textwrap.fill(
            text, width, initial_indent=label.ljust(indent), subsequent_indent=" " * indent, break_on_hyphens=False
        )
        for label, text in facts.items()
    ]
    return "\n".join(lines)


def in_bytes(size: float) -> str:
    """A number of bytes in the unit that people read: 1.5 GB."""
    unit = 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {_UNITS[unit]}" if size < 1000 else f"{size:.0f} {_UNITS[unit]}"


def _report(ctx: click.Context, kind: str, message: str) -> None:
    if wants_json(ctx):
        click.echo(json.dumps({"error": {"kind": kind, "message": message}}))
    click.echo(f"error: {message}", err=True)
