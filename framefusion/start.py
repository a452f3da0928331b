"""Where both commands begin: so light that Ctrl-C finds no module half imported, and is exit code 130 from here on."""

from __future__ import annotations

import os
import sys

_INTERRUPTED = 130  # framefusion.errors has it, and may not be imported yet


def ff_run() -> None:
    """Run `ff-run`."""
    _start("framefusion.runtime.commands.cli")


def ff_export() -> None:
    """Run `ff-export`."""
    _start("framefusion.export.commands.cli")


def _start(module: str) -> None:
    try:
        _open_closed_streams()
        from importlib import import_module

        import_module(module).main()
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(_INTERRUPTED)
    finally:
        import gc
        import signal

        gc.freeze()  # the interpreter would look through all modules once more: two seconds where torch is loaded
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said and done: nothing is left to interrupt


def _open_closed_streams() -> None:
    """Give the numbers 0 to 2 to something where the caller closed them (`>&-`).

    Else the next file that is opened gets the number, and what a C library prints goes into the middle of it. Whatever
    is written to a standard output that was closed fails, as to a full disk; what goes to stderr is lost.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:  # noqa: PERF203  three times, once
            os.open(os.devnull, mode)  # the lowest number that is free is this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  it stays open
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
