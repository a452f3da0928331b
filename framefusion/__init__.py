"""FrameFusion-AOT: token reduction inside the LLM of a video LVLM, compiled ahead of time.

The names that a program starts with are here, loaded when they are first used: `import framefusion.runtime` passes
through this file and must reach nothing heavy. Their types stand in `__init__.pyi`, which no interpreter reads.
"""

__version__ = "0.1.0"
__all__ = ("Bundle", "Generation", "Pipeline", "Request", "Session", "Step", "Turn", "Visual")

_MODULES = {
    "Bundle": "framefusion.runtime.bundle",
    "Generation": "framefusion.runtime.request",
    "Pipeline": "framefusion.runtime.pipeline",
    "Request": "framefusion.runtime.request",
    "Session": "framefusion.runtime.session",
    "Step": "framefusion.runtime.request",
    "Turn": "framefusion.runtime.text.prompt",
    "Visual": "framefusion.runtime.text.prompt",
}


def __getattr__(name: str) -> object:  # PEP 562
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # the next use is an ordinary one
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
