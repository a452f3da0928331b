"""Counting bytes by part, and the lines that people see of it."""

from __future__ import annotations

import io

from framefusion.console.progress import (
    CountLines,
    LogLines,
    Meter,
    Step,
    TerminalLines,
    in_time,
    line_of,
    progress_lines,
)

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


def test_a_terminal_sees_bars_times_and_a_line_for_each_part() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = TerminalLines(stream, clock)
    run_job(Meter(lines, SIZES), clock)
    lines.close()
    drawn = stream.getvalue().replace("\x1b[K", "").split("\r")
    assert drawn[6] == "table weights.bin           [####------] 400 kB of 1 MB all 10%, 0:36 left"
    assert max(map(len, drawn)) < 80
    left = [line.rstrip() for line in stream.getvalue().replace("\x1b[K", "").split("\n")]
    assert [line.split("\r")[-1] for line in left] == [
        f"{part:<27}     {size} MB  in 0:10" for part, size in (("table", 1), ("segments/rest", 3))
    ] + [""]


def test_bytes_that_were_there_do_not_make_the_rest_look_fast() -> None:
    clock, stream = Clock(), io.StringIO()
    meter = Meter(TerminalLines(stream, clock), SIZES)
    meter.begin("table")  # taken over
    meter.begin("segments/rest")
    for _ in range(10):
        clock.time += 1
        meter.add(150_000)
    last = stream.getvalue().split("\r")[-1]
    assert "0:10 left" in last  # half of the rest took ten seconds
    assert "was there" in stream.getvalue()


def test_a_part_that_was_interrupted_is_not_told_as_done() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = TerminalLines(stream, clock)
    meter = Meter(lines, SIZES)
    meter.begin("table")
    clock.time += 1
    meter.add(500_000)
    lines.close(complete=False)
    assert stream.getvalue().endswith("500 kB of 1 MB all 12%\x1b[K\n")
    assert " in " not in stream.getvalue()


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


def test_a_terminal_draws_the_count_over() -> None:
    clock, stream = Clock(), io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    lines = CountLines("questions", stream, clock)
    for done in (1, 2):
        clock.time += 1
        lines(done, 2)
    assert stream.getvalue() == "\r1 of 2 questions\x1b[K\r2 of 2 questions\x1b[K\n"


def test_words() -> None:
    assert [in_time(seconds) for seconds in (0.4, 65, 3661)] == ["0:00", "1:05", "1:01:01"]
    assert line_of(Step("check", "", 0, 0, 5, 10), None) == "check                       all 50%"
