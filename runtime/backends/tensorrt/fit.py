"""What TensorRT-RTX says of an engine by its first bytes: the one part of a fit that a library decides."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from framefusion.runtime.format.engine_record import EngineRecord

CUDA_ERROR = "CUDA_ERROR"


def header_problem(file: Path, engine: EngineRecord) -> tuple[str, bool] | None:
    """Why the library refuses an engine, and whether compiling it again mends that.

    None where it does not refuse it, reads no headers, or is not installed.

    Args:
        file: the engine; only its header is read.
        engine: its record.
    """
    try:
        library: Any = importlib.import_module(engine.library)
    except (ImportError, OSError):
        return None
    if not hasattr(library, "EngineValidity"):
        return None
    runtime = library.Runtime(library.Logger(library.Logger.ERROR))
    with file.open("rb") as opened:
        validity, flags = runtime.get_engine_validity(opened.read(runtime.engine_header_size))
    if validity != library.EngineValidity.INVALID:
        return None
    reasons = [name for name, flag in library.EngineInvalidityDiagnostics.__members__.items() if flags & flag.value]
    said = ", ".join(reasons) or "the device does not answer"
    return f"{engine.library} refuses it ({said})", bool(reasons) and reasons != [CUDA_ERROR]
