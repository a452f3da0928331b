"""How a command ends where it cannot say what it has to: a full disk behind stdout, a reader that has gone, Ctrl-C."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framefusion import errors
from framefusion.console import messages as console
from framefusion.runtime.commands.flags import MOST_THREADS
from tests.commands import export, run
from tests.patience import PATIENCE
from tests.wheel import ROOT

BEGIN = "from framefusion.start import {0}; {0}()"
BEGUN = "begun"
FULL = Path("/dev/full")
TINY = ROOT / "tests" / "models" / "tiny_qwen2_vl"


def command(name: str, *arguments: object) -> list[str]:
    """A command as its console script runs it."""
    return [sys.executable, "-c", BEGIN.format(name), *map(str, arguments)]


def assert_said(done: subprocess.CompletedProcess[str], *phrases: str) -> None:
    assert done.returncode == errors.StorageError.exit_code, done.stderr
    assert len(done.stderr.splitlines()) == 1
    for word in ("error: standard output cannot be written", *phrases):
        assert word in done.stderr


@pytest.mark.parametrize("arguments", [("families",), ("families", "--json"), ("--help",)])
@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout(arguments: tuple[str, ...]) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(
            command("ff_export", *arguments), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert_said(done, "No space left on device", "make room")


def without_reader(name: str, *arguments: object, stream: str = "stdout") -> subprocess.CompletedProcess[str]:
    """A command whose stdout or stderr is a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    out = writing if stream == "stdout" else subprocess.PIPE
    err = writing if stream == "stderr" else subprocess.PIPE
    line = command(name, *arguments)
    done = subprocess.run(line, stdout=out, stderr=err, stdin=subprocess.DEVNULL, text=True, check=False)
    os.close(writing)
    return done


@pytest.mark.parametrize("arguments", [("reducers",), ("generate", "--help")])
def test_a_reader_that_has_gone(arguments: tuple[str, ...]) -> None:
    """As `| head -1` leaves it: the exit code of SIGPIPE, as of other programs, and no message."""
    done = without_reader("ff_run", *arguments)
    assert (done.returncode, done.stderr) == (console.READER_GONE, "")


@pytest.mark.slow
def test_every_command_leaves_quietly_where_nobody_reads(bundle: Path, film: Path, tmp_path: Path) -> None:
    """Those that answer, and those that say on stderr what they do or what is wrong."""
    question = ("--video", film, "--prompt", "What?", "--max-new-tokens", 4)
    checkpoint = TINY
    lines = [
        ("ff_run", "generate", bundle, *question),
        ("ff_run", "generate", bundle, *question, "--json"),
        ("ff_run", "view", bundle, *question, "-o", tmp_path / "run.html"),
        ("ff_run", "bench", bundle, *question, "--rounds", 1, "--cost", 1),
        ("ff_run", "check", bundle),
        ("ff_export", "plan", checkpoint),
        ("ff_export", "build", checkpoint, "-o", tmp_path / "bundle", "--no-check", "--depth", 0),
        ("ff_export", "check", bundle),
        ("ff_export", "inspect", bundle, "--json"),
        ("ff_export", "families"),
        ("ff_export", "--version"),
    ]
    for line in lines:
        done = without_reader(*map(str, line))
        assert (done.returncode, "Traceback" in done.stderr, "error: " in done.stderr) == (141, False, False), done
    for line in (("ff_run", "generate", bundle, *question), ("ff_export", "inspect", tmp_path)):
        done = without_reader(*map(str, line), stream="stderr")
        assert done.returncode in (console.READER_GONE, errors.BundleError.exit_code), done


def test_a_pipe_that_breaks_elsewhere_is_no_quiet_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program at its other end may be one of ours that failed."""

    def broken(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(console, "show", broken)
    result = export("families")
    assert result.exit_code == errors.StorageError.exit_code
    assert "Broken pipe" in result.stderr


def test_a_closed_stdout() -> None:
    """`>&-`: what is answered goes nowhere, and says so."""
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command("ff_run", "--version")], stderr=subprocess.PIPE, text=True, check=False
    )
    assert_said(done, "Bad file descriptor", "it is closed")


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What a C library prints would go into the middle of it."""
    code = (
        "import sys; from framefusion import start; start._open_closed_streams();print(open(sys.argv[1], 'w').fileno())"
    )
    done = subprocess.run(
        ["sh", "-c", '"$@" <&- 2>&-', "sh", sys.executable, "-c", code, tmp_path / "file"],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) > 2


def test_ctrl_c_that_a_library_turns_into_another_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an import of onnxruntime does that Ctrl-C ends."""
    from framefusion.runtime.machine import machine

    def interrupted() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise errors.BackendError("nothing can run this bundle here") from None

    monkeypatch.setattr(machine.Machine, "here", interrupted)
    result = run("generate", bundle, "--prompt", "What?", "--no-verify")
    assert result.exit_code == errors.InterruptedBuildError.exit_code
    assert result.stderr == "error: interrupted\n"


def test_an_interrupted_import_is_no_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from framefusion.runtime.machine.machine import Machine

    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "onnxruntime":
                raise ImportError("initialization failed") from KeyboardInterrupt()

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(KeyboardInterrupt):
        Machine.here()


def test_a_temporary_folder_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever meets a full disk, it is the error of its own kind."""

    def full(*_: object) -> None:
        with FULL.open("w") as file:
            file.write("report")

    monkeypatch.setattr(console, "show", full)
    result = export("families")
    assert result.exit_code == errors.StorageError.exit_code
    assert "No space left on device" in result.stderr


@pytest.mark.parametrize("arguments", [("generate", "--threads", MOST_THREADS + 1), ("generate", "--threads", -1)])
def test_threads_are_bounded(arguments: tuple[object, ...]) -> None:
    result = run(*arguments, "bundle", "--prompt", "What?")
    assert result.exit_code == 2
    assert f"0<=x<={MOST_THREADS}" in result.stderr


@pytest.mark.parametrize("flag", ["--tolerance", "--engine-cache-limit"])
@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "-1", "0"])
def test_limits_are_finite_and_above_zero(flag: str, value: str) -> None:
    """A tolerance of nan would pass every check."""
    result = export("build", "checkpoint", "-o", "bundle", flag, value)
    assert result.exit_code == 2
    assert flag in result.stderr


@pytest.mark.slow
def test_ctrl_c_while_a_command_starts(bundle: Path) -> None:
    """At ten moments between the first import and the answer; a command that had its answer has ended well."""
    for moment in range(10):
        code = (
            "import sys; from framefusion import start; begin = start._open_closed_streams\n"
            "start._open_closed_streams = lambda: (begin(), "
            f"print('{BEGUN}', file=sys.stderr, flush=True)); start.ff_run()"
        )
        started = subprocess.Popen(
            [sys.executable, "-c", code, "generate", str(bundle), "--prompt", "What?"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        assert started.stderr is not None
        assert started.stderr.readline().strip() == BEGUN  # before it, Ctrl-C is Python's own business
        time.sleep(0.08 * moment)
        started.send_signal(signal.SIGINT)
        _, message = started.communicate(timeout=PATIENCE)
        assert started.returncode in (130, 0), message
        assert "Traceback" not in message
        if started.returncode == 130:
            assert message.splitlines()[-1].startswith("error: interrupted")
