"""A build in a process of its own: what comes back of it, and that its end, however it comes, is an error."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from framefusion.errors import BackendError, CompilerCrashError, InterruptedBuildError, StorageError
from framefusion.export.engines.builder import EngineFacts, EngineSpec, Share
from framefusion.export.engines.child import Call, _started, build_in_child, serve
from tests.patience import FOREVER, PATIENCE

pytestmark = pytest.mark.slow  # each starts a process
LIBRARY = "library 1.0"


def written(target: Path) -> Path:
    """What a build has beside its target before it is whole, as `tensorrt.build` names it."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}-1")
    scratch.write_bytes(b"half")
    return scratch


def succeed(spec: EngineSpec, target: Path, *, timing_cache: bytes | None, progress: Share) -> EngineFacts:
    progress(0.25)
    written(target).replace(target)
    return EngineFacts(4, str(os.getpid()), spec.targets, (), {"LAYER": 1}, 0.5, timing_cache)


def crash(spec: EngineSpec, target: Path, *, timing_cache: bytes | None, progress: Share) -> EngineFacts:
    written(target)
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def run_short_of_memory(spec: EngineSpec, target: Path, *, timing_cache: bytes | None, progress: Share) -> EngineFacts:
    written(target)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def leave(spec: EngineSpec, target: Path, *, timing_cache: bytes | None, progress: Share) -> EngineFacts:
    os._exit(7)


def refuse(spec: EngineSpec, target: Path, *, timing_cache: bytes | None, progress: Share) -> EngineFacts:
    raise StorageError(f"{target} cannot be written")


def fail(spec: EngineSpec, target: Path, *, timing_cache: bytes | None, progress: Share) -> EngineFacts:
    raise KeyError("of a bug")


def hang(spec: EngineSpec, target: Path, *, timing_cache: bytes | None, progress: Share) -> EngineFacts:
    written(target)
    (target.parent / "pid").write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGINT)  # as a terminal does: it is not the child's to notice
    time.sleep(FOREVER)
    raise AssertionError


def call(function: Callable[..., EngineFacts], folder: Path) -> Call:
    spec = EngineSpec(folder / "graph.onnx", "tensorrt-rtx", ("8.9",), "float16")
    return Call(f"{__name__}:{function.__name__}", spec, folder / "engine", b"times")


def test_facts_and_shares_come_back(tmp_path: Path) -> None:
    shares: list[float] = []
    facts = build_in_child(call(succeed, tmp_path), shares.append, LIBRARY)
    assert facts.sha256 != str(os.getpid())
    assert (facts.size, facts.targets, facts.layer_kinds) == (4, ("8.9",), {"LAYER": 1})
    assert facts.timing_cache == b"times"
    assert 10**7 < facts.peak_memory < 10**9
    assert 0.25 in shares
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


@pytest.mark.parametrize(
    ("function", "kind", "phrase"),
    [
        (crash, CompilerCrashError, r"library 1\.0 crashed \(SIGSEGV\) while it compiled .*graph\.onnx; no engine"),
        (run_short_of_memory, BackendError, r"compiled .*graph\.onnx was killed: is memory short\? give --jobs 1"),
        (leave, CompilerCrashError, "ended its process with status 7"),
        (refuse, StorageError, "engine cannot be written"),
        (fail, RuntimeError, r"(?s)Traceback.*KeyError: 'of a bug'"),
    ],
)
def test_how_a_child_ends_is_an_error_and_leaves_nothing(
    function: Callable[..., EngineFacts], kind: type[Exception], phrase: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=phrase) as raised:
        build_in_child(call(function, tmp_path), lambda _: None, LIBRARY)
    assert raised.type is kind
    assert not list(tmp_path.iterdir())


def test_who_watches_may_end_it_at_any_time(tmp_path: Path) -> None:
    """It reports nothing by then, and was sent a Ctrl-C that it has to leave to its parent."""

    def stop(share: float) -> None:
        if pid.is_file() and pid.read_text():
            raise InterruptedBuildError("enough")

    pid = tmp_path / "pid"
    with pytest.raises(InterruptedBuildError, match="enough"):
        build_in_child(call(hang, tmp_path), stop, LIBRARY)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]


@pytest.mark.parametrize("sent", [b"", struct.pack("!i", 100_000) + b"half"])
def test_a_child_whose_parent_was_killed_before_its_call_says_nothing(
    capfd: pytest.CaptureFixture[str], sent: bytes
) -> None:
    """Nobody is left to read a traceback: nothing had been sent, or the beginning of a call."""
    ours, theirs = multiprocessing.Pipe()
    child = _started(theirs)
    theirs.close()
    os.write(ours.fileno(), sent)
    ours.close()
    assert child.wait(PATIENCE) == 0
    assert capfd.readouterr() == ("", "")


def test_an_answer_that_nobody_waits_for_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent ends while the child builds, which reports to it."""
    monkeypatch.setattr("framefusion.export.engines.child._end_with_parent", lambda _: None)  # else it would end here
    ours, theirs = multiprocessing.Pipe()
    ours.send(call(succeed, tmp_path))
    ours.close()
    with theirs:
        serve(os.dup(theirs.fileno()))
    assert not list(tmp_path.iterdir())
