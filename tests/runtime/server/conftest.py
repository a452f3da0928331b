"""A server in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.bundles import shared
from tests.patience import PATIENCE

START = """
import sys
from framefusion.start import ff_run
if __name__ == "__main__":
    sys.exit(ff_run())
"""


@dataclass
class Running:
    """A server that answers.

    Attributes:
        process: its.
        url: http://host:port.
        log: what it prints.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def resident(self) -> int:
        """Bytes of memory of it and its children."""
        server = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in (server, *server.children(recursive=True)))


@contextmanager
def serving(folder: Path, *flags: object, bundle: Path | None = None) -> Iterator[Running]:
    """`ff-run serve` on a free port, until the block ends."""
    script = folder / "ff-run"
    script.write_text(START)
    log = folder / "server.log"
    command: Sequence[str] = (
        sys.executable, str(script), "serve", str(bundle or shared("bundle")), "--port", "0", "--model-name", "tiny",
        *map(str, flags),
    )  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
    try:
        yield Running(process, _address(process, log), log)
    finally:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where it answers, once it says so."""
    import re
    import time

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := re.search(r"answers at (http://\S+)/v1", log.read_text()):
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(f"it does not answer: {log.read_text()}")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the server opens films of."""
    from tests.films import write_film, write_picture

    folder = tmp_path_factory.mktemp("films")
    write_film(folder / "film.mp4", seed=1)
    write_film(folder / "other.mp4", seed=2, frames=12)
    write_picture(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, films: Path) -> Iterator[Running]:
    """One server for all tests of a module."""
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, "--allowed-local-media-path", films, "--max-waiting", 64) as running:
        yield running
