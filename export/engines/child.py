"""One build in a process of its own: a library that crashes ends that process, and the command says so and goes on.

    here -> call: function, spec, target, timing cache -> child -> shares that are done, then facts or an error -> here

The child sees no Ctrl-C, which is this process' to notice: what `progress` raises kills the child. A child whose parent
has gone ends by itself. It imports what compiles, and neither torch nor the caller's main module. Knows no library.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from framefusion.errors import BackendError, CompilerCrashError, FrameFusionError
from framefusion.export.engines.builder import EngineFacts, EngineSpec, Share
from framefusion.export.machine import peak_memory
from framefusion.runtime.backends.table import load
from framefusion.storage import files

_TICK = 0.1  # seconds between two looks at whether somebody wants the end
_ENTRY = "import sys, json; sys.path[:] = json.loads(sys.argv[2]); from {module} import serve; serve(int(sys.argv[1]))"


@dataclass(frozen=True)
class Call:
    """What a child is to build.

    Attributes:
        function: "module:name" of what builds, called with the other three and `progress`; see `EngineBuilder.build`.
        spec: of the engine.
        target: file.
        timing_cache: of an earlier build.
    """

    function: str
    spec: EngineSpec
    target: Path
    timing_cache: bytes | None


def build_in_child(call: Call, progress: Share, library: str) -> EngineFacts:
    """Carry a call out in a process of its own.

    Args:
        call: what to build.
        progress: called with the share that is done, ten times a second or more often; what it raises ends the child.
        library: what compiles, for messages: "tensorrt-rtx 1.7.1".

    Raises:
        CompilerCrashError: the child crashed; nothing is left of its file.
        BackendError: no process could be started, or the system killed it.
        FrameFusionError: what the function raised.
    """
    ours, theirs = multiprocessing.Pipe()
    with ours:
        with theirs:
            child = _started(theirs)
        try:
            facts = _followed(ours, call, progress)
        finally:
            child.kill()
            child.wait()
            for path in call.target.parent.glob(f".{call.target.name}.{child.pid}-*"):
                files.remove_file(path)  # what it was writing
    if facts is None:
        raise _death(child.returncode, call, library)
    return facts


def _started(connection: Connection) -> subprocess.Popen[bytes]:
    """A child at the other end of a connection. It inherits a mask without SIGINT, which a terminal sends to both."""
    number = connection.fileno()
    command = (sys.executable, "-c", _ENTRY.format(module=__name__), str(number), json.dumps(sys.path))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(number,))
    except OSError as error:
        raise BackendError(f"no process could be started to compile in ({error.strerror}): free some memory") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _followed(connection: Connection, call: Call, progress: Share) -> EngineFacts | None:
    """What came of a call; None where the child ended without a word."""
    share = 0.0
    with suppress(EOFError, ConnectionError):
        connection.send(call)
        while True:
            if connection.poll(_TICK):
                message = connection.recv()
                if isinstance(message, EngineFacts):
                    return message
                if isinstance(message, Exception):
                    raise message
                share = message
            progress(share)
    return None


def _death(status: int, call: Call, library: str) -> BackendError:
    """The error of a child that ended without a word."""
    graph = call.spec.graph
    if status == -signal.SIGKILL:
        return BackendError(
            f"the process in which {library} compiled {graph} was killed: is memory short? give --jobs 1, or compile "
            "on a machine with more"
        )
    with suppress(ValueError):
        return CompilerCrashError(
            f"{library} crashed ({signal.Signals(-status).name}) while it compiled {graph}; no engine was written: "
            "take another release of it, or of a --reduction fixed bundle another --prune-layer or --merge-shares, or "
            "--reduction adaptive"
        )
    return CompilerCrashError(f"{library} ended its process with status {status} while it compiled {graph}")


def serve(number: int) -> None:
    """Answer the call that comes by the connection of this number: the child's main function."""
    connection = Connection(number)
    try:
        call: Call = connection.recv()
    except (EOFError, OSError):  # whoever started this process was killed before all of it was sent
        return
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    try:
        build: Any = load(call.function)
        facts = build(call.spec, call.target, timing_cache=call.timing_cache, progress=connection.send)
        answer: object = replace(facts, peak_memory=peak_memory())
    except FrameFusionError as error:
        answer = error
    except BaseException:
        answer = RuntimeError(f"in the process that compiled {call.spec.graph}:\n{traceback.format_exc()}")
    with suppress(OSError):  # killed meanwhile: nobody is told
        connection.send(answer)


def _end_with_parent(connection: Connection) -> None:
    """Nothing more is sent to a child: what can be read is the end of who was to send it."""
    with suppress(EOFError, OSError):
        connection.poll(None)
    os._exit(1)
