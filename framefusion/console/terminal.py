"""What is drawn on a terminal, by rich: colours, and a line that keeps moving while something runs. Knows no job.

rich is imported where something is drawn, so that help texts and pipes go without. It follows NO_COLOR, FORCE_COLOR and
TERM=dumb. A line moves on a terminal only, whatever FORCE_COLOR says: in a file each drawing would be kept.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from framefusion.console.plain_text import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

REFRESHES = 8  # drawings a second
PATIENCE = 0.7  # seconds before a line for what mostly is done by then
SELDOM = 10.0  # seconds between two lines of what is no terminal
_FRAMES = "-\\|/"  # also where a terminal has ASCII alone
_DUMB = ("dumb", "unknown")
_drawing = threading.Lock()  # held by the line that is drawn: one within another is not


def is_interactive(stream: TextIO) -> bool:
    """Whether a line may be drawn over: a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in _DUMB


def painted(text: str, style: str, stream: TextIO) -> str:
    """The text in a style of rich, such as "bold red", where the stream takes colours; else as it is.

    The text is ours: what comes from elsewhere is to be made `printable` first.
    """
    if os.environ.get("NO_COLOR") or not (is_interactive(stream) or os.environ.get("FORCE_COLOR")):
        return text  # bold goes with the colours, though NO_COLOR does not ask for that
    from rich.text import Text

    console = console_of(stream)
    with console.capture() as captured:
        console.print(Text(text, style), end="", soft_wrap=True)
    return captured.get()


def console_of(stream: TextIO) -> Console:
    """rich's console of a stream. It leaves the cursor alone: a killed process could not bring it back."""
    from rich.console import Console

    class PlainConsole(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False

    return PlainConsole(file=stream, highlight=False, markup=False, emoji=False)


def spinner(now: Callable[[], float] = time.monotonic) -> str:
    """The character that turns, by the clock."""
    return _FRAMES[int(now() * REFRESHES) % len(_FRAMES)]


class MovingLine:
    """What is drawn over, again and again by a thread of rich's, until `close`. Warnings appear above it.

    While one is drawn another one is not: whoever began first says what runs.
    """

    def __init__(self, draw: Callable[[], RenderableType], stream: TextIO, after: float = 0.0) -> None:
        """Args: draw: what is to be seen now. after: seconds without a line, for what mostly is done by then."""
        self._draw = draw
        self._stream = stream
        self._live: Live | None = None
        self._timer = threading.Timer(after, self._begin)
        self._timer.daemon = True
        if after > 0:
            self._timer.start()
        else:
            self._begin()

    def _begin(self) -> None:
        from rich.live import Live

        if not _drawing.acquire(blocking=False):
            return
        # stdout stays as it is: it may go to a file
        self._live = Live(
            get_renderable=self._draw,
            console=console_of(self._stream),
            refresh_per_second=REFRESHES,
            transient=True,
            redirect_stdout=False,
        )
        self._live.start(refresh=True)

    def print(self, line: RenderableType) -> None:
        """Leave a line above."""
        console = console_of(self._stream) if self._live is None else self._live.console
        console.print(line, soft_wrap=True)

    def close(self) -> None:
        """Take the line away."""
        self._timer.cancel()
        if self._timer.is_alive():
            self._timer.join()
        if self._live is not None:
            self._live.stop()
            self._live = None
            _drawing.release()


class Activity:
    """What runs now, in a few words: `say` changes them, `end` takes the line away before the body ends."""

    def __init__(self, what: str, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._start = now()
        self._what = what
        self._line: MovingLine | None = None
        self._log: TextIO | None = None
        self._logged = 0.0

    def say(self, what: str) -> None:
        """Something else runs now; names of others are made fit for a terminal."""
        self._what = what
        if self._log is not None and self._now() - self._logged >= SELDOM:
            self.log(self._log)

    def end(self) -> None:
        """Take the line away: what is printed next goes to the same terminal."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def show(self, stream: TextIO, after: float) -> None:
        """Draw it on a terminal from now on, or in some seconds."""
        self._line = MovingLine(self.draw, stream, after)

    def log(self, stream: TextIO) -> None:
        """Write what runs to what is no terminal, now and from now on when it changes, each line after SELDOM."""
        self._log = stream
        self._logged = self._now()
        stream.write(f"{printable(self._what)}\n")
        stream.flush()

    def draw(self) -> RenderableType:
        """The line now: a turning character, what runs, and for how long."""
        from rich.text import Text

        seconds = int(self._now() - self._start)
        line = Text(no_wrap=True, overflow="ellipsis")
        return line.append(spinner(self._now), "cyan").append(f" {printable(self._what)}, {seconds} s")


@contextmanager
def activity(
    what: str, *, after: float = 0.0, logged: bool = False, stream: TextIO | None = None
) -> Iterator[Activity]:
    """Show on a terminal that something runs, on a line of stderr that moves; elsewhere nothing, unless it is logged.

    Args:
        what: runs, in a few words.
        after: seconds before it shows: most commands are done by then.
        logged: it takes minutes, so that a log shall have it, too.
        stream: in place of stderr.
    """
    stream = stream or sys.stderr
    doing = Activity(what)
    if is_interactive(stream):
        doing.show(stream, after)
    elif logged:
        doing.log(stream)
    try:
        yield doing
    finally:
        doing.end()
