"""The server to be measured: `ff-run serve` in a process of its own, its memory, its metrics and its clients."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai
import psutil

START = """
import sys
from framefusion.start import ff_run
if __name__ == "__main__":
    sys.exit(ff_run())
"""
READY_SECONDS = 300


@dataclass
class Server:
    """A server that answers.

    Attributes:
        process: its.
        url: http://host:port.
        log: what it prints.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def client(self) -> openai.OpenAI:
        """A client that tries nothing twice: what fails counts."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=600, max_retries=0)

    def metric(self, name: str) -> float:
        """One of /metrics, by its name without the prefix."""
        text = httpx2.get(f"{self.url}/metrics").text
        found = re.search(rf"^framefusion:{re.escape(name)} (\S+)$", text, re.MULTILINE)
        if found is None:
            raise ValueError(f"/metrics has no {name}")
        return float(found[1])

    def resident(self) -> int:
        """Bytes of memory of the server and of the processes that decode films for it."""
        return self.memory().resident

    def memory(self) -> Memory:
        """What the server and the processes that decode films for it hold, of which kind."""
        server = psutil.Process(self.process.pid)
        of_server = _resident(server)
        of_decoders = sum(_resident(process) for process in server.children(recursive=True))
        return Memory(of_server + of_decoders, _anonymous(server), of_decoders)


@dataclass
class Memory:
    """Bytes.

    Attributes:
        resident: of the server and its decoders, pages of mapped files included.
        anonymous: of the server alone without mapped files: what a leak would grow.
        decoders: resident, of the processes that decode films.
    """

    resident: int
    anonymous: int
    decoders: int


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:  # a decoder that ended meanwhile
        return 0


def _anonymous(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss - process.memory_info().shared)
    except psutil.NoSuchProcess:
        return 0


@contextmanager
def serving(bundle: Path, folder: Path, *flags: object) -> Iterator[Server]:
    """`ff-run serve` on a free port, until the block ends.

    Args:
        bundle: that answers.
        folder: for its log.
        flags: of the command.

    Raises:
        RuntimeError: it does not begin to answer.
    """
    script = folder / "ff-run"
    script.write_text(START)
    log = folder / "server.log"
    command = [sys.executable, script, "serve", bundle, "--port", "0", "--model-name", "bench", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen([*map(str, command)], stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
    try:
        yield Server(process, _address(process, log), log)
    finally:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"answers at (http://\S+)/v1", log.read_text()):
            return found[1]
        time.sleep(0.1)
    raise RuntimeError(f"the server does not answer: {log.read_text()}")
