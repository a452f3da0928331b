"""A command on a terminal of its own, 80 columns wide: what it drew, and when."""

from __future__ import annotations

import os
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Recording:
    """What a command drew.

    Attributes:
        pieces: seconds since its start, and the text that came then.
        seconds: that it took, its start and its end included.
        exit_code: its exit code.
    """

    pieces: tuple[tuple[float, str], ...]
    seconds: float
    exit_code: int

    @property
    def text(self) -> str:
        """All of it, with what was drawn over."""
        return "".join(text for _, text in self.pieces)

    def silences(self) -> list[tuple[float, str]]:
        """Seconds without a visible change and what was drawn before them, the longest first.

        The same text again changes nothing.
        """
        changes = [(0.0, "its start")]
        for at, text in self.pieces:
            if text != changes[-1][1]:
                changes.append((at, text))
        ends = [at for at, _ in changes[1:]] + [self.seconds]
        waits = [(end - at, text) for (at, text), end in zip(changes, ends, strict=True)]
        return sorted(waits, reverse=True)


def record(command: list[str], **environment: str) -> Recording:
    """Run a console script of this environment on a terminal of its own until it ends."""
    import fcntl
    import pty
    import termios

    script = str(Path(sys.executable).parent / command[0])
    start = time.monotonic()
    child, terminal = pty.fork()
    if child == 0:
        kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
        os.execve(script, [script, *command[1:]], kept | {"TERM": "xterm-256color"} | environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    pieces = []
    while True:
        try:
            text = os.read(terminal, 1 << 16)
        except OSError:  # Linux: the other side is closed
            break
        if not text:
            break
        pieces.append((time.monotonic() - start, text.decode(errors="replace")))
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    return Recording(tuple(pieces), time.monotonic() - start, os.waitstatus_to_exitcode(status))
