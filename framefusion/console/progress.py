"""How far a long job is: parts of known size, counted in bytes, and a line of progress for people. Knows no job.

On a terminal each part has a line: while it is written with a bar, the file, bytes, and the time that all parts are
going to take at the rate so far; when it is there with its size and the time that it took. Where no bytes are written
the bar runs to and fro beside the time that has passed. Elsewhere one line a part.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TextIO

from framefusion.console.messages import in_bytes
from framefusion.console.plain_text import printable
from framefusion.console.terminal import SELDOM, Activity, MovingLine, is_interactive, spinner

if TYPE_CHECKING:
    from rich.console import RenderableType

_LABEL = 27
_FIGURES = 32  # "401 kB of 2.71 MB all 22%, 0:36 left"
_BAR = 10  # characters
_COLOUR = "cyan"  # rich's own is the red of errors
_RATE_AFTER = 2.0  # seconds before a rate is steady enough to be shown
_STANDING = 1.0  # seconds without a byte, from which on the bar runs to and fro


class Step(NamedTuple):
    """How far it is now."""

    part: str  # "segments/rest"
    doing: str  # the file of the part that is written, or what else takes time
    done: int  # bytes of the part
    size: int  # of the part
    written: int  # bytes of all parts
    total: int  # of all parts


Progress = Callable[[Step], None]


class Meter:
    """Counts the bytes of a job and reports each change to a `Progress`; the parts and their sizes are known before."""

    def __init__(self, progress: Progress | None = None, sizes: Mapping[str, int] | None = None) -> None:
        self._progress = progress
        self.sizes = dict(sizes or {})
        self._part = ""
        self._doing = ""
        self._done = 0
        self._before = 0

    def begin(self, part: str) -> None:
        """Begin a part: all of the one before it is there, written now or taken over."""
        self._before += self.sizes.get(self._part, 0)
        self._part = part
        self._done = 0
        self.doing("")

    def doing(self, what: str) -> None:
        """Say what the next bytes are, such as a file's name, or what takes time without any."""
        self._doing = what
        self.add(0)

    def add(self, size: int) -> None:
        """Count so many more bytes of the part."""
        self._done += size
        if self._progress is not None:
            size = self.sizes.get(self._part, 0)
            total = sum(self.sizes.values())
            self._progress(Step(self._part, self._doing, self._done, size, self._before + self._done, total))

    def within(self, step: Step) -> None:
        """Count a step of another job that is this part."""
        self._doing = f"{step.part} {step.doing}".strip()
        self._done = step.written
        self.add(0)


@contextmanager
def progress_lines(stream: TextIO | None = None, *, first: str = "planning") -> Iterator[Progress]:
    """What draws the progress of one job: on stderr, unless another stream is given; `first` runs before any part."""
    stream = stream or sys.stderr
    lines = TerminalLines(stream, first) if is_interactive(stream) else LogLines(stream)
    try:
        yield lines
    except BaseException:
        lines.close(complete=False)
        raise
    lines.close()


class LogLines:
    """One line a part, when it begins."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._part = ""

    def __call__(self, step: Step) -> None:
        """See `Progress`."""
        if step.part != self._part:
            self._part = step.part
            self._stream.write(f"{step.part}: {in_bytes(step.written)} of {in_bytes(step.total)} before it\n")
            self._stream.flush()

    def close(self, *, complete: bool = True) -> None:
        """End; nothing is left open."""


class TerminalLines:
    """A line that moves while a part is written, and one that stays when it is there."""

    def __init__(self, stream: TextIO, first: str = "", now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._first = first
        self._step: Step | None = None
        self._start = now()
        self._begun = self._start  # of the part
        self._since = self._start  # the last byte, or the beginning of what runs now
        self._taken_over = 0  # bytes that were there before anything was written
        self._line = MovingLine(self.draw, stream)

    def __call__(self, step: Step) -> None:
        """See `Progress`."""
        now = self._now()
        last = self._step
        if last is None or step.part != last.part:
            self._finish()
            self._begun = now
            if last is not None and last.done == 0:
                self._taken_over += last.size
        if last is None or (step.part, step.doing, step.done) != (last.part, last.doing, last.done):
            self._since = now
        self._step = step

    def close(self, *, complete: bool = True) -> None:
        """Take the line away; the last part is shown as done only if it is, else as far as it came."""
        if complete:
            self._finish()
        elif self._step is not None:
            self._line.print(f"{label_of(self._step)} {self._figures(self._step)}".rstrip())
        self._line.close()

    def draw(self) -> RenderableType:
        """The line now; it runs in the thread that draws."""
        from rich.progress_bar import ProgressBar
        from rich.table import Column, Table

        step = self._step
        now = self._now()
        waited = now - self._since
        if step is not None and 0 < step.done < step.size and waited < _STANDING:
            bar = ProgressBar(total=step.size, completed=step.done, width=_BAR, complete_style=_COLOUR)
            figures = self._figures(step)
        else:  # no bytes say how far it is
            bar = ProgressBar(pulse=True, animation_time=now, width=_BAR, pulse_style=_COLOUR)
            figures = f"{in_time(waited)} {'' if step is None else share_of(step)}".rstrip()
        grid = Table.grid(
            Column(no_wrap=True),
            Column(no_wrap=True, overflow="ellipsis", ratio=1),
            Column(width=_BAR),
            Column(no_wrap=True, min_width=_FIGURES),
            padding=(0, 1, 0, 0),
            expand=True,
        )
        grid.add_row(spinner(self._now), self._first if step is None else label_of(step), bar, figures)
        return grid

    def _figures(self, step: Step) -> str:
        left = self._left(step, self._now())
        size = f"{in_bytes(step.done)} of {in_bytes(step.size)} " if step.size else ""
        return size + share_of(step) + ("" if left is None else f", {in_time(left)} left")

    def _left(self, step: Step, now: float) -> float | None:
        """Seconds to go at the rate so far; None where nothing is known of it yet."""
        written = step.written - self._taken_over
        spent = now - self._start
        to_go = step.total - step.written
        if spent < _RATE_AFTER or written <= 0 or to_go <= 0:
            return None
        return spent / written * to_go

    def _finish(self) -> None:
        step = self._step
        if step is not None:
            spent = self._now() - self._begun
            took = f"in {in_time(spent)}" if step.done or not step.size else "was there"
            size = in_bytes(step.size) if step.size else ""
            self._line.print(f"  {printable(step.part):<{_LABEL}} {size:>8}  {took}")
            self._step = None


class CountLines:
    """How many pieces of a job are done: on a terminal a line that moves from the beginning, elsewhere now and then.

    A context manager: the line ends with it.
    """

    def __init__(self, what: str, stream: TextIO | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._stream = stream or sys.stderr
        self._now = now
        self._start = now()
        self._drawn = self._start
        self._done_before: int | None = None  # pieces that were there before the first one was done
        self._activity = Activity(f"{what}: opening the model", now)
        self._line: MovingLine | None = None

    def __enter__(self) -> CountLines:
        if is_interactive(self._stream):
            self._line = MovingLine(self._activity.draw, self._stream)
        return self

    def __exit__(self, *_: object) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def __call__(self, done: int, total: int) -> None:
        """Say that `done` pieces of `total` are there now."""
        now = self._now()
        if self._done_before is None:
            self._done_before = done - 1
        spent = now - self._start
        line = f"{done} of {total} {self._what}"
        if spent >= _RATE_AFTER and done < total:
            seconds_each = spent / (done - self._done_before)
            line += f", {in_time(seconds_each * (total - done))} left"
        self._activity.say(line)
        if done == total or (self._line is None and now - self._drawn >= SELDOM):
            self._drawn = now
            if self._line is not None:
                self._line.print(line)
            else:
                self._stream.write(f"{line}\n")
                self._stream.flush()


def label_of(step: Step) -> str:
    """What is written, and what of it."""
    return printable(" ".join((step.part, step.doing)).rstrip())


def share_of(step: Step) -> str:
    """How much of everything is there; "" where all is."""
    return f"all {step.written / step.total:.0%}" if step.written < step.total else ""


def in_time(seconds: float) -> str:
    """Minutes and seconds, hours where there are any: 1:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
