"""Counting bytes by part, and the lines that people see of it."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from framefusion.console.progress import CountLines, LogLines, Meter, Step, TerminalLines, in_time, progress_lines
from framefusion.console.terminal import SELDOM, Activity, activity, painted

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SIZES = {"table": 1_000_000, "segments/rest": 3_000_000}


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def run_job(meter: Meter, clock: Clock) -> None:
    for part, size in SIZES.items():
        meter.begin(part)
        meter.doing("weights.bin")
        for _ in range(10):
            clock.time += 1
            meter.add(size // 10)
        meter.doing("tracing graph.onnx")


def test_a_meter_counts_to_all_bytes() -> None:
    steps: list[Step] = []
    run_job(Meter(steps.append, SIZES), Clock())
    assert steps[0] == Step("table", "", 0, 1_000_000, 0, 4_000_000)
    assert steps[-1] == Step("segments/rest", "tracing graph.onnx", 3_000_000, 3_000_000, 4_000_000, 4_000_000)
    written = [step.written for step in steps]
    assert written == sorted(written)


def test_a_part_that_was_there_counts_without_being_written() -> None:
    steps: list[Step] = []
    meter = Meter(steps.append, SIZES)
    meter.begin("table")
    meter.begin("segments/rest")
    assert (steps[-1].done, steps[-1].written) == (0, 1_000_000)


def test_a_job_inside_a_part_counts_there() -> None:
    steps: list[Step] = []
    meter = Meter(steps.append, SIZES)
    meter.begin("table")
    run_job(Meter(meter.within, {"table": 300_000, "segments/rest": 700_000}), Clock())
    assert steps[-1].part == "table"
    assert steps[-1].doing == "segments/rest tracing graph.onnx"


class Terminal(io.StringIO):
    """Takes what is drawn, as a terminal of 80 columns does."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What is left on it, without what was drawn over."""
        rows = [""]
        row = 0
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", self.getvalue()):
            if part == "\n":
                row += 1
                rows += [""] * (row == len(rows))
            elif part.endswith("A") and part.startswith("\x1b"):
                row -= int(part[2:-1] or 1)
            elif part == "\x1b[2K":
                rows[row] = ""
            elif part[0] not in "\x1b\r":
                rows[row] += part
        return [line.rstrip() for line in rows if line.strip()]


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


def drawn(lines: TerminalLines) -> str:
    """The line that moves, as it is now."""
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as captured:
        console.print(lines.draw())
    return captured.get().rstrip()


def test_a_terminal_sees_bars_times_and_a_line_for_each_part() -> None:
    clock, stream = Clock(), Terminal()
    lines = TerminalLines(stream, "planning", clock)
    meter = Meter(lines, SIZES)
    assert " planning " in drawn(lines)
    meter.begin("table")
    meter.doing("weights.bin")
    for _ in range(4):
        clock.time += 1
        meter.add(100_000)
    line = drawn(lines)
    assert line.split("  ")[0][2:] == "table weights.bin"
    assert line.endswith("400 kB of 1 MB all 10%, 0:36 left")
    assert len(line) <= 80
    meter.begin("segments/rest")
    clock.time += 10
    meter.add(3_000_000)
    lines.close()
    assert stream.lines() == [f"  {part:<27}     {size} MB  in 0:{s:02}" for part, size, s in
                    (("table", 1, 4), ("segments/rest", 3, 10))]  # fmt: skip


@pytest.mark.parametrize("done", [0, 500_000, 1_000_000])
def test_a_bar_does_not_stand_where_no_byte_comes(done: int) -> None:
    clock = Clock()
    lines = TerminalLines(Terminal(), "planning", clock)
    meter = Meter(lines, SIZES)
    meter.begin("table")
    meter.add(done)
    meter.doing("tracing")
    seen = set()
    for _ in range(8):
        clock.time += 1.1
        seen.add(drawn(lines))
    lines.close()
    assert len(seen) == 8
    assert "0:08" in max(seen, key=lambda line: "0:08" in line)


def test_bytes_that_were_there_do_not_make_the_rest_look_fast() -> None:
    clock, stream = Clock(), Terminal()
    lines = TerminalLines(stream, "planning", clock)
    meter = Meter(lines, SIZES)
    meter.begin("table")  # taken over
    meter.begin("segments/rest")
    for _ in range(10):
        clock.time += 1
        meter.add(150_000)
    assert "0:10 left" in drawn(lines)  # half of the rest took ten seconds
    lines.close()
    assert "was there" in stream.getvalue()


def test_a_part_that_was_interrupted_is_not_told_as_done() -> None:
    clock, stream = Clock(), Terminal()
    lines = TerminalLines(stream, "planning", clock)
    meter = Meter(lines, SIZES)
    meter.begin("table")
    clock.time += 1
    meter.add(500_000)
    lines.close(complete=False)
    assert "table 500 kB of 1 MB all 12%\n" in stream.getvalue()
    assert " in " not in stream.getvalue()


def test_what_moves_ends_with_its_body_and_nothing_is_left_of_it() -> None:
    stream = Terminal()
    with activity("opening \x1b[31mbundle", stream=stream) as now:
        now.say("reading a \x1b[31mname")
    assert "opening \\x1b[31mbundle, 0 s" in stream.getvalue()
    assert stream.lines() == []
    assert "\x1b[?25l" not in stream.getvalue()  # the cursor stays: a killed process could not bring it back


def test_a_line_within_another_is_not_drawn_and_the_next_one_is() -> None:
    stream = Terminal()
    with activity("outer", stream=stream):
        with activity("inner", stream=stream) as now:
            now.say("still inner")
        assert "inner" not in stream.getvalue()
    with activity("next", stream=stream):
        pass
    assert "next, 0 s" in stream.getvalue()
    assert stream.lines() == []


def test_what_takes_minutes_is_in_a_log_now_and_then() -> None:
    stream = io.StringIO()
    seconds = 0.0
    doing = Activity("choosing codes", now=lambda: seconds)
    doing.log(stream)
    for seconds in (3.0, SELDOM, SELDOM + 1, 2 * SELDOM - 0.1, 2 * SELDOM):
        doing.say(f"at \x1b[31m{seconds:g}")
    assert stream.getvalue().splitlines() == ["choosing codes", "at \\x1b[31m10", "at \\x1b[31m20"]
    with activity("quiet", stream=stream):
        pass
    with activity("loud", logged=True, stream=stream):
        pass
    assert stream.getvalue().splitlines()[3:] == ["loud"]


def test_what_is_done_at_once_draws_nothing() -> None:
    stream = Terminal()
    with activity("opening", after=30.0, stream=stream):
        pass
    assert stream.getvalue() == ""


@pytest.mark.parametrize("terminal", ["dumb", "unknown"])
def test_nothing_moves_where_the_cursor_cannot(terminal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", terminal)
    stream = Terminal()
    with activity("opening", stream=stream), progress_lines(stream) as progress:
        run_job(Meter(progress, SIZES), Clock())
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().count("\n") == len(SIZES)


def test_a_file_gets_no_drawing_even_where_colours_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with activity("opening", stream=stream), progress_lines(stream) as progress:
        run_job(Meter(progress, SIZES), Clock())
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    ("environment", "terminal", "coloured"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_colours_follow_the_conventions(
    environment: dict[str, str], terminal: bool, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    text = painted("error:", "bold red", Terminal() if terminal else io.StringIO())
    assert ("\x1b[1;31m" in text) is coloured
    assert coloured or text == "error:"
    assert CONTROL.sub("", text) == "error:"


def test_a_log_has_a_line_for_each_part() -> None:
    stream = io.StringIO()
    with progress_lines(stream) as progress:
        run_job(Meter(progress, SIZES), Clock())
    assert isinstance(progress, LogLines)
    assert stream.getvalue() == "table: 0 B of 4 MB before it\nsegments/rest: 1 MB of 4 MB before it\n"


def test_pieces_are_counted_now_and_then_and_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = CountLines("questions", stream, clock)
    for done in range(11, 31):  # ten were there before
        clock.time += 3
        lines(done, 30)
    told = stream.getvalue().splitlines()
    assert told[0] == "14 of 30 questions, 0:48 left"  # 12 s for four, sixteen to go
    assert told[-1] == "30 of 30 questions"
    assert len(told) == 5


def test_a_terminal_sees_the_count_move_before_the_first_piece_is_done() -> None:
    clock, stream = Clock(), Terminal()
    with CountLines("questions", stream, clock) as lines:
        assert "opening the model, 0 s" in stream.getvalue()
        for done in (1, 2):
            clock.time += 1
            lines(done, 2)
    assert stream.lines() == ["2 of 2 questions"]


def test_durations() -> None:
    assert [in_time(seconds) for seconds in (0.4, 65, 3661)] == ["0:00", "1:05", "1:01:01"]
