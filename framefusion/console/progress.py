"""How far a long job is: parts of known size, counted in bytes, and a line of progress for people. Knows no job.

On a terminal each part has a line: while it is written with a bar, the file, bytes, and the time that all parts are
going to take at the rate so far; when it is there with its size and the time that it took. Elsewhere one line a part.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TextIO

from framefusion.console.messages import in_bytes

_LABEL = 27
_BAR = 10  # characters
_INTERVAL = 0.1  # seconds between two drawings
_SELDOM = 10.0  # seconds between two lines of what is no terminal
_RATE_AFTER = 2.0  # seconds before a rate is steady enough to be shown


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
def progress_lines(stream: TextIO | None = None) -> Iterator[Progress]:
    """What draws the progress of one job: on stderr, unless another stream is given."""
    stream = stream or sys.stderr
    lines = TerminalLines(stream) if stream.isatty() else LogLines(stream)
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
    """A line that is drawn over while a part is written."""

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._now = now
        self._step: Step | None = None
        self._start = now()
        self._begun = self._start  # of the part
        self._drawn = self._start
        self._taken_over = 0  # bytes that were there before anything was written

    def __call__(self, step: Step) -> None:
        """See `Progress`."""
        now = self._now()
        last = self._step
        if last is None or step.part != last.part:
            self._finish()
            self._begun = now
            if last is not None and last.done == 0:
                self._taken_over += last.size
        elif step.doing == last.doing and now - self._drawn < _INTERVAL:
            self._step = step
            return
        self._step = step
        self._drawn = now
        self._draw(line_of(step, self._left(step, now)))

    def close(self, *, complete: bool = True) -> None:
        """Leave the cursor on a line of its own; the last part is shown as done only if it is."""
        if complete:
            self._finish()
        elif self._step is not None:
            self._stream.write("\n")
            self._stream.flush()

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
            self._draw(f"{step.part:<{_LABEL}} {size:>8}  {took}")
            self._stream.write("\n")
            self._stream.flush()
            self._step = None

    def _draw(self, line: str) -> None:
        width = shutil.get_terminal_size().columns
        self._stream.write("\r" + line[: width - 1] + "\x1b[K")  # the rest of a longer line is cleared
        self._stream.flush()


class CountLines:
    """How many pieces of a job are done: a line that is drawn over on a terminal, elsewhere one now and then."""

    def __init__(self, what: str, stream: TextIO | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._stream = stream or sys.stderr
        self._now = now
        self._start = now()
        self._drawn = self._start
        self._done_before: int | None = None  # pieces that were there before the first one was done

    def __call__(self, done: int, total: int) -> None:
        """Say that `done` pieces of `total` are there now."""
        now = self._now()
        terminal = self._stream.isatty()
        if self._done_before is None:
            self._done_before = done - 1
        if done < total and now - self._drawn < (_INTERVAL if terminal else _SELDOM):
            return
        self._drawn = now
        spent = now - self._start
        line = f"{done} of {total} {self._what}"
        if spent >= _RATE_AFTER and done < total:
            seconds_each = spent / (done - self._done_before)
            line += f", {in_time(seconds_each * (total - done))} left"
        end = "\n" if done == total or not terminal else ""
        self._stream.write(f"\r{line}\x1b[K{end}" if terminal else f"{line}{end}")
        self._stream.flush()


def line_of(step: Step, left: float | None) -> str:
    """The line of a part that is being written, at most 80 columns of what matters; `left` in seconds."""
    share = min(step.done / step.size, 1.0) if step.size else 0.0
    bar = ("#" * round(share * _BAR)).ljust(_BAR, "-")
    parts = [f"{' '.join((step.part, step.doing)).rstrip():<{_LABEL}}"]
    if step.size:
        parts.append(f"[{bar}] {in_bytes(step.done)} of {in_bytes(step.size)}")
    if step.total:
        parts.append(f"all {step.written / step.total:.0%}" + ("" if left is None else f", {in_time(left)} left"))
    return " ".join(parts).rstrip()


def in_time(seconds: float) -> str:
    """Minutes and seconds, hours where there are any: 1:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
