"""What both commands share: errors to messages and exit codes, one JSON object on stdout, warnings.

Knows click, no model. Control characters of answers and of other people's names are spelled out. In JSON mode stdout
carries exactly one object, the result or the error; all else goes to stderr. A wrong flag is the parser's own business:
usage on stderr, exit code 2.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO, TypeVar

import click

from framefusion.console.help import Group, option
from framefusion.console.layout import labelled as labelled
from framefusion.console.layout import prose, terminal_width
from framefusion.console.layout import table as table
from framefusion.console.plain_text import printable
from framefusion.console.terminal import painted
from framefusion.errors import FrameFusionError, InterruptedBuildError, MediaWarning, StorageError
from framefusion.storage.files import FULL

_JSON = "framefusion.json"
_WARNED = "framefusion.warned"
_UNWRITABLE = FULL | {errno.EPIPE, errno.EBADF}  # EBADF: it was closed before the command began (start.py)
READER_GONE = 141  # as a shell says it of what SIGPIPE ends: `ff-run generate ... | head -1`
_NO_NAMES = {errno.ENAMETOOLONG, errno.ELOOP}  # of files that a user has given
_interrupts: list[int] = []  # Ctrl-C since the command line began
_UNITS = ("B", "kB", "MB", "GB")
_STYLES = {"error: ": "bold red", "warning: ": "yellow", "next: ": "bold green"}
Command = TypeVar("Command", bound=Callable[..., Any])
Report = TypeVar("Report")


class CommandGroup(Group):
    """Commands whose users see a message and an exit code where they made a mistake, and a traceback only for a bug.

    A full disk is a `StorageError` wherever it shows, and so is a standard output that takes no more. Where its reader
    has gone, or stderr's, the command ends as others do in a pipe: exit code 141 and not a word. Ctrl-C is exit code
    130, also where a library that was being imported made another error of it.
    """

    def main(self, *arguments: Any, **settings: Any) -> Any:
        """Run the command line, help texts included."""
        with _remembered_interrupts():
            try:
                return super().main(*arguments, **settings)
            except SystemExit as end:
                if type(sys.stdout).__name__.endswith("PacifyFlushWrapper"):  # click's answer to a reader that has gone
                    _leave_quietly()
                if _interrupts and end.code not in (0, InterruptedBuildError.exit_code):
                    _leave_with(InterruptedBuildError("interrupted"))
                try:
                    sys.stdout.flush()
                except BrokenPipeError:
                    _leave_quietly()
                except OSError as error:
                    _leave_with(StorageError(_unwritable_output(error)))
                raise
            except OSError as error:  # of a help text
                if error.errno not in _UNWRITABLE:
                    raise
                _leave_with(StorageError(_unwritable_output(error)))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and end with the message and the exit code of an error that a user can mend."""
        texts: list[str] = ctx.meta.setdefault(_WARNED, [])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", MediaWarning)
                warnings.showwarning = _shown_by(texts, warnings.showwarning)
                return super().invoke(ctx)
        except InterruptedBuildError as error:
            _end(ctx, error)
        except KeyboardInterrupt:
            _end(ctx, InterruptedBuildError("interrupted"), "Interrupted")
        except (click.ClickException, click.exceptions.Exit):
            raise
        except Exception as error:
            if _interrupts:
                _end(ctx, InterruptedBuildError("interrupted"), "Interrupted")
            if isinstance(error, FrameFusionError):
                _end(ctx, error)
            if isinstance(error, BrokenPipeError) and (_has_lost_reader(sys.stdout) or _has_lost_reader(sys.stderr)):
                _leave_quietly()
            if isinstance(error, OSError) and error.errno in _UNWRITABLE:
                _end(ctx, StorageError(_unwritable(error)))
            if isinstance(error, OSError) and error.errno in _NO_NAMES:
                shown = os.fsdecode(error.filename or "a file")
                _end(ctx, StorageError(f"{shown[:80]!r} cannot be opened ({error.strerror}): give another name"))
            raise


def _shown_by(texts: list[str], others: Callable[..., None]) -> Callable[..., None]:
    """What shows a warning: a line on stderr for those about films and pictures, kept in `texts`; others as before."""

    def show_warning(message: Warning | str, category: type[Warning], *place: object, **named: object) -> None:
        if not issubclass(category, MediaWarning):
            others(message, category, *place, **named)
            return
        texts.append(str(message))
        log(f"warning: {message}")

    return show_warning


def warned() -> list[str]:
    """The warnings of the command that runs so far, for its JSON."""
    return list(click.get_current_context().meta.get(_WARNED, []))


def write(text: str, *, newline: bool = True) -> None:
    """Print on stdout, at once.

    Raises:
        StorageError: the disk that it goes to is full.
        BrokenPipeError: its reader has gone.
    """
    try:
        click.echo(printable(text), nl=newline)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise StorageError(_unwritable_output(error)) from None


def json_option(command: Command) -> Command:
    """Add --json to a command; `show` looks it up."""
    return _json_flag("--json", "object", "Print one JSON object on stdout, all else on stderr.")(command)


def json_lines_option(command: Command) -> Command:
    """Add --jsonl to a command that gives several answers; `wants_json_lines` looks it up."""
    text = "Print a JSON object for each answer, a line as soon as it is there."
    return _json_flag("--jsonl", "lines", text)(command)


def _json_flag(name: str, form: str, text: str) -> Callable[[Command], Command]:
    """An option that remembers in which form results are wanted."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value and ctx.meta.get(_JSON, form) != form:
            raise click.UsageError("--json and --jsonl contradict each other: leave one out", ctx)
        if value:
            ctx.meta[_JSON] = form

    return option(name, section="Output", is_flag=True, expose_value=False, is_eager=True, callback=remember, help=text)


def wants_json(ctx: click.Context | None = None) -> bool:
    """Whether --json or --jsonl was given."""
    return bool((ctx or click.get_current_context()).meta.get(_JSON))


def wants_json_lines() -> bool:
    """Whether --jsonl was given."""
    return click.get_current_context().meta.get(_JSON) == "lines"


def show(report: Report, render: Callable[[Report], str]) -> None:
    """Print a report: as one JSON object, or as `render` lays it out."""
    write(json.dumps(report) if wants_json() else prose(render(report), terminal_width()))


def log(message: str) -> None:
    """Print one message on stderr, in colours where it takes them; harmful characters are spelled out."""
    text = printable(message)
    kind, colon, rest = text.partition(": ")
    style = _STYLES.get(kind + colon)
    if style is not None:
        text = painted(f"{kind}:", style, sys.stderr) + " " + rest
    click.echo(text, err=True, color=_keeps_colours())


def _keeps_colours() -> bool | None:
    """For click: True keeps what `painted` added to a stream that is no terminal, None leaves it to the stream."""
    return True if os.environ.get("FORCE_COLOR") and not os.environ.get("NO_COLOR") else None


def in_bytes(size: float) -> str:
    """A number of bytes in the unit that people read: 1.5 GB."""
    unit = 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size /= 1000
        unit += 1
    return f"{size:.3g} {_UNITS[unit]}" if size < 1000 else f"{size:.0f} {_UNITS[unit]}"


# --- Ends -------------------------------------------------------------------------------------------------------------


def _end(ctx: click.Context, error: FrameFusionError, kind: str | None = None) -> NoReturn:
    """Report an error and leave with its exit code."""
    message = str(error)
    if wants_json(ctx):
        with suppress(OSError):  # stdout itself may be what cannot be written
            click.echo(json.dumps({"error": {"kind": kind or type(error).__name__, "message": message}}))
    _say(message)
    ctx.exit(error.exit_code)


def _leave_with(error: FrameFusionError) -> NoReturn:
    """The same where no command runs: before it, or after it."""
    _say(str(error))
    raise SystemExit(error.exit_code) from None


def _leave_quietly() -> NoReturn:
    """The end of what nobody reads any more."""
    for stream in (sys.stdout, sys.stderr):
        if _has_lost_reader(stream):
            _drop(stream)
    raise SystemExit(READER_GONE) from None


def _has_lost_reader(stream: TextIO) -> bool:
    """Whether a stream is a pipe or a socket whose other end was closed."""
    try:
        number = stream.fileno()
        poll = select.poll()
    except (OSError, ValueError, AttributeError):  # it is no file of the system's; there is no poll on Windows
        return False
    poll.register(number, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _say(message: str) -> None:
    try:
        log(f"error: {message}")
    except OSError:
        _drop(sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _drop(sys.stdout)


def _drop(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere: Python would try again at its end, with a traceback."""
    with suppress(OSError, ValueError):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def _unwritable(error: OSError) -> str:
    if error.errno in (errno.EPIPE, errno.EBADF):
        return _unwritable_output(error)
    place = error.filename or "standard output or a file"
    return f"{place} cannot be written ({error.strerror}): make room, also in the folder for temporary files"


def _unwritable_output(error: OSError) -> str:
    remedies = {errno.EPIPE: "its reader ended early", errno.EBADF: "it is closed, let it go to /dev/null or a file"}
    remedy = remedies.get(error.errno or 0, "make room where it goes")
    return f"standard output cannot be written ({error.strerror}): {remedy}"


@contextmanager
def _remembered_interrupts() -> Iterator[None]:
    """Remember that Ctrl-C was pressed while a command line runs: libraries turn it into errors of their own."""
    _interrupts.clear()

    def interrupt(number: int, frame: FrameType | None) -> None:
        _interrupts.append(number)
        signal.default_int_handler(number, frame)

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
