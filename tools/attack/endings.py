"""Ways in which a command ends early, each at a chosen one of its writes: Ctrl-C, kill -9, a disk that is full.

Writes are counted by Python's audit events. The signals are real ones, and the full disk is the kernel's refusal to let
a file grow.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from tools.attack.harness import SECONDS, End, in_child, limit_file_size

_WRITES = frozenset(
    f"os.{name}" for name in ("rename", "remove", "mkdir", "rmdir", "link", "symlink", "truncate", "chmod", "utime")
) | {"ctypes.dlsym"}  # of renameat2
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
LARGEST = 400_000  # bytes: as large as the largest file of the bundles that are built


class Ending(NamedTuple):
    """How a command ends, and where."""

    kind: str  # "end", "ctrl-c", "kill", "full"
    at: int = 0  # the write; for "full" the bytes that a file may have


def draw_ending(rng: random.Random, events: int) -> Ending:
    """Any of them; `events` is about the number of writes of the command."""
    kind = rng.choice(("end", "ctrl-c", "kill", "kill", "full"))
    if kind == "full":
        return Ending(kind, int(LARGEST ** rng.random()) - 1)
    return Ending(kind, rng.randint(1, events))


class Counter:
    """Counts the writes of this process, and acts at one of them."""

    def __init__(self, at: int = 0, act: Callable[[], None] = lambda: None) -> None:
        self.count = 0
        self._at = at
        self._act = act
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _WRITES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING):
            self.count += 1
            if self.count == self._at:
                self._act()


def run_until(call: Callable[[], Any], ending: Ending, seconds: float = SECONDS - 2) -> End:
    """Call a function in a child process that ends as said, or after so many seconds."""

    def run() -> Any:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if ending.kind == "full":
            limit_file_size(ending.at)
        elif ending.kind == "kill":
            Counter(ending.at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        elif ending.kind == "ctrl-c":
            Counter(ending.at, lambda: signal.raise_signal(signal.SIGINT))
        return call()

    return in_child(run, seconds, group=False)
