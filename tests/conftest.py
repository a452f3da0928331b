"""What many tests share: one tiny random checkpoint and an adaptive bundle of it, made once for all runs."""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from framefusion.runtime.bundle import Bundle
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.proof.opening import open_proven
from tests.bundles import shared, unchanged
from tests.films import write_film, write_picture

# Files whose tests trace graphs. What torch and onnxscript load for that takes five seconds, so one worker runs them.
TRACES = (
    "tests/export/engines/inductor/test_inductor.py",
    "tests/export/engines/tensorrt/test_tensorrt_build.py",
    "tests/export/engines/tensorrt/test_tensorrt_network.py",
    "tests/export/engines/tensorrt/test_tensorrt_plain.py",
    "tests/export/graphs/tracing/test_dialects.py",
    "tests/test_model_goldens.py",
)

# An example that takes longer than usual, for its imports or for other work of the machine, is none that fails.
with suppress(ImportError):  # a GPU's tests do without
    from hypothesis import settings

    settings.register_profile("suite", deadline=None)
    settings.load_profile("suite")

# torch tells its trace in thousands of debug lines, which pytest would format and keep.
logging.getLogger("torch.__trace").propagate = False

# Modules stay until the end: looking for garbage among what imports made took a seventh of the suite's time.
gc.disable()


ENDING_SECONDS = 60  # of what ends by itself once the last test has
USER_CACHE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin where nothing is remembered of this user, and hear Ctrl-C.

    What was proven or compiled before, by hand or by another version, must not decide what a test sees. A suite that a
    shell started in the background ignores Ctrl-C, and so would the builds that tests interrupt.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share what their parent made
        config.stash[USER_CACHE] = tempfile.mkdtemp(prefix="user-cache-")
        os.environ["XDG_CACHE_HOME"] = config.stash[USER_CACHE]
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where a process outlives the tests: behind a user's command it would stay as well."""
    if USER_CACHE not in session.config.stash:
        return
    end = time.monotonic() + ENDING_SECONDS
    while (left := processes_left(session.config.stash[USER_CACHE])) and time.monotonic() < end:
        time.sleep(0.1)
    for line in left:
        session.config.get_terminal_writer().line(f"\nleft behind: {line}", red=True)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def processes_left(cache: str) -> list[str]:
    """Number, command and test of each process that was started with this cache of the user, where /proc tells."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another's, or gone meanwhile
            environment = (folder / "environ").read_bytes().split(b"\0")
            if f"XDG_CACHE_HOME={cache}".encode() in environment and folder.name != str(os.getpid()):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if parent == str(os.getpid()) and b"from multiprocessing." in command:
                    continue  # what this process forks its children from, which ends with it
                test = next((line for line in environment if line.startswith(b"PYTEST_CURRENT_TEST")), b"")
                found.append(f"{folder.name} {command.decode(errors='replace')} {test.decode(errors='replace')}")
    return found


def pytest_unconfigure(config: pytest.Config) -> None:
    if USER_CACHE in config.stash:
        shutil.rmtree(config.stash[USER_CACHE], ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let `--dist loadfile` give the files of TRACES to one worker, as if they were one."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LoadFilesThatTraceTogether(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "traces" if nodeid.startswith(TRACES) else super()._split_scope(nodeid)

    return LoadFilesThatTraceTogether(config, log)


def pytest_collection_finish() -> None:
    """Look for garbage from here on, and only among what tests make."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """What one worker makes and the others wait for."""
    folder = factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name).exists():
            make(folder / name)
    return folder / name


@pytest.fixture(scope="session")
def checkpoint() -> Iterator[Path]:
    """Nobody may change it: copy it first."""
    yield shared("checkpoint")
    assert unchanged("checkpoint"), "a test changed the checkpoint that all share"


@pytest.fixture(scope="session")
def bundle() -> Iterator[Path]:
    """Adaptive, and proven here, so that no command says it was; nobody may change it: copy it first."""
    open_proven(Bundle(shared("bundle")))
    yield shared("bundle")
    assert unchanged("bundle"), "a test changed the bundle that all share"


@pytest.fixture(scope="session")
def pipeline(bundle: Path) -> Pipeline:
    return Pipeline(Bundle(bundle), threads=1)


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_film(tmp_path_factory.mktemp("films") / "film.mp4")


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_picture(tmp_path_factory.mktemp("pictures") / "picture.png")


@pytest.fixture
def instant_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds that skip the tracing and run no model: for tests of what happens around the graphs."""
    from framefusion.export.check import golden
    from framefusion.export.writing import parts

    monkeypatch.setattr(golden, "_out_of_reach", lambda *_: "this build is about what happens around the graphs")
    monkeypatch.setattr(parts, "trace_graph", lambda *_: None)
    monkeypatch.setattr(parts, "save_graph", lambda _model, path, *_: path.write_bytes(b"graph"))
