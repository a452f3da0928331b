"""Where both commands begin: so light that Ctrl-C finds no module half imported, and is exit code 130 from here on."""

from __future__ import annotations

import signal
import sys
from importlib import import_module

_INTERRUPTED = 130  # framefusion.errors has it, and may not be imported yet


def ff_run() -> None:
    """Run `ff-run`."""
    _start("framefusion.runtime.cli")


def ff_export() -> None:
    """Run `ff-export`."""
    _start("framefusion.export.cli")


def _start(module: str) -> None:
    try:
        import_module(module).main()
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(_INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said and done: nothing is left to interrupt
