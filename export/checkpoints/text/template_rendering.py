"""Conversations through a chat template, in a process of its own with limits of time and memory.

Knows the process (template_process.py) and its answers; what conversations are rendered and why is chat.py's.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import framefusion
from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.text.template_process import LIMITS, MEMORY, PROCESSOR_SECONDS, VARYING

MAX_SOURCE = 1 << 18  # characters; the longest published templates, with tools, have 20,000
SECONDS = 30  # by the clock, on a machine that does other work
_START = (
    "import sys; sys.path[:] = {path!r}; from framefusion.export.checkpoints.text.template_process import main; main()"
)
_TOO_LARGE = f"takes more than {MEMORY >> 20} MiB of memory"


class Rendered(NamedTuple):
    """A conversation as text; None and the reason where the template gives none."""

    text: str | None
    error: str = ""


def render(source: str, tokens: Sequence[tuple[str, str]], conversations: Sequence[tuple[Any, bool]]) -> list[Rendered]:
    """Render conversations: messages as a chat template reads them, and whether an answer follows.

    Raises:
        CheckpointError: the template is too long, takes too much time or memory, or asks for the date or for chance.
    """
    if len(source) > MAX_SOURCE:
        raise CheckpointError(f"the chat template has {len(source)} characters, the limit is {MAX_SOURCE}: shorten it")
    return _rendered(json.dumps({"source": source, "tokens": dict(tokens), "conversations": list(conversations)}))


@lru_cache(maxsize=64)
def _rendered(request: str) -> list[Rendered]:
    # Never the folder that somebody happens to be in; without -S whatever site-packages start by themselves, torch for
    # one, would count against the limit of memory.
    path = [str(Path(framefusion.__file__).parents[1]), *filter(None, sys.path)]
    command = [sys.executable, "-I", "-S", "-c", _START.format(path=path)]
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _unfit(f"takes more than {SECONDS} seconds") from None
    if done.returncode:
        raise _unfit(_why_it_ended(done.returncode, done.stderr))
    answers = json.loads(done.stdout)
    for answer in answers:
        if answer.get("kind") == VARYING:
            raise _unfit(f"does not always write the same: {answer['error']}, which a bundle would freeze")
        if answer.get("kind") == "MemoryError":
            raise _unfit(_TOO_LARGE)
        if answer.get("kind") in LIMITS:
            raise _unfit(f"exceeds a limit ({answer['kind']}: {answer['error']})")
    return [Rendered(answer.get("text"), answer.get("error", "")) for answer in answers]


def _why_it_ended(code: int, errors: str) -> str:
    # Windows has no such signal, and no limit of the processor's seconds either.
    if code == -getattr(signal, "SIGXCPU", 0):
        return f"takes more than {PROCESSOR_SECONDS} seconds of the processor"
    last_line = errors.strip().rpartition("\n")[2]
    if "MemoryError" in last_line:
        return _TOO_LARGE
    return f"ends its process, code {code}: {last_line[:200] or 'no message'}"


def _unfit(why: str) -> CheckpointError:
    return CheckpointError(
        f"its chat template {why}: correct it, or take it out of the checkpoint to build with the family's own layout"
    )
