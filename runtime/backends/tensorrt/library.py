"""The library behind a TensorRT engine: `tensorrt_rtx` or `tensorrt`, one Python API, and what truly differs.

    kind          module        builds                                        timing cache   compiles at load
    tensorrt-rtx  tensorrt_rtx  for any set of targets, on any machine        no             yes (runtime cache)
    tensorrt      tensorrt      for the GPU at hand, which must be there      yes            no

TensorRT before 11 has attentions without cache lengths and without LOWER_RIGHT masks; it is refused. Knows no network,
no bundle and no device memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal, get_args

from framefusion.errors import BackendError
from framefusion.installation import install_command
from framefusion.runtime.backends.table import backend
from framefusion.runtime.backends.tensorrt.api import Messages
from framefusion.runtime.machine.gpu import find_gpu

LibraryKind = Literal["tensorrt-rtx", "tensorrt"]
AMPERE = 8.0
TYPE_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "UINT8": "uint8",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}  # TensorRT's name of a type -> numpy's
_NEEDED = (  # of the module: what a decoder over caches cannot be built without
    "IAttentionInputLayer.attention",
    "IAttention.key_value_lengths",
    "CausalMaskKind.LOWER_RIGHT",
    "IKVCacheUpdateLayer.cache_mode",
    "IStreamWriter",
)


@dataclass(frozen=True)
class Library:
    """A module of the family, loaded and found complete.

    Attributes:
        module: the Python module.
        version: of the library that is loaded; an engine runs in this version only.
        messages: what it had to say; errors are read from here, because its calls return no reason.
    """

    kind: LibraryKind
    module: ModuleType
    version: str
    messages: Messages

    @property
    def capabilities(self) -> Mapping[str, object]:
        """Targets that it can build for, "8.6" -> its member of the enum; none where it builds for the GPU at hand."""
        known = getattr(self.module, "ComputeCapability", None)
        members = {} if known is None else known.__members__
        return {
            dotted(name.removeprefix("SM")): value
            for name, value in members.items()
            if name.startswith("SM") and hasattr(self.module.IBuilderConfig, "set_compute_capability")
        }

    @property
    def measures(self) -> bool:
        """Whether it times kernels while it builds, so that a timing cache spares the next build some work."""
        return not self.capabilities

    def check_targets(self, targets: Sequence[str]) -> tuple[str, ...]:
        """Compute capabilities in one notation, ascending, each once: "86" and "8.6" -> "8.6".

        Without any, all that have bf16 and fp32 products, because one engine for many targets is hardly larger.

        Raises:
            BackendError: one is unknown to the library, or this machine cannot build for it.
        """
        if not self.capabilities:
            return self._gpu_target(targets)
        known = sorted(self.capabilities, key=float)
        selected = {dotted(target) for target in targets} or {target for target in known if float(target) >= AMPERE}
        unknown = sorted(selected - set(known))
        if unknown:
            raise BackendError(
                f"--target-sm {','.join(unknown)}: {self.kind} {self.version} builds for no such GPU, only for "
                f"{','.join(target.replace('.', '') for target in known)}"
            )
        return tuple(sorted(selected, key=float))

    def _gpu_target(self, targets: Sequence[str]) -> tuple[str, ...]:
        """The GPU of this machine, which is all that `tensorrt` builds for."""
        gpu = find_gpu()
        if gpu is None:
            raise BackendError(
                f"{self.kind} builds for the GPU of the machine it runs on, and here is none: build there, or with "
                "--backend tensorrt-rtx"
            )
        others = [target for target in targets if dotted(target) != gpu.capability]
        if others:
            raise BackendError(
                f"--target-sm {','.join(others)} is not the GPU of this machine ({gpu.capability}), and "
                f"{self.kind} builds for no other: build there, or with --backend tensorrt-rtx"
            )
        return (gpu.capability,)

    def with_new_messages(self) -> Library:
        """The same library with nothing said yet, for a thread of its own."""
        return replace(self, messages=_listener(self.module))

    def builder(self) -> Any:
        """A builder of engines.

        Raises:
            BackendError: there is none, as where `tensorrt` finds no GPU.
        """
        self.messages.clear()
        try:
            builder = self.module.Builder(self.messages)
        except Exception as error:  # pybind's own, without the reason
            raise BackendError(f"{self.kind} {self.version} cannot build here ({self.reason() or error})") from None
        if builder is None:
            raise BackendError(f"{self.kind} {self.version} cannot build here ({self.reason()})")
        return builder

    def reason(self) -> str:
        """The library's last two errors as it wrote them; "" where there was none."""
        return "; ".join(self.messages.errors[-2:])


def load_library(kind: str) -> Library:
    """Import a library.

    Raises:
        BackendError: it is not installed, does not load, or is too old.
    """
    if kind not in get_args(LibraryKind):
        raise BackendError(f"engine library {kind!r} is unknown, known are {', '.join(get_args(LibraryKind))}")
    name = backend(kind).library
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        absent = error.name in (name, None) or str(error.name).startswith(name)
        why = "is not installed" if absent and isinstance(error, ModuleNotFoundError) else f"does not load ({error})"
        raise BackendError(f"{name} {why}: {install_command(kind)}") from None
    except (OSError, RuntimeError) as error:
        raise BackendError(f"{name} does not load ({error}): {install_command(kind, upgrade=True)}") from None
    version = str(module.__version__)
    missing = [path for path in _NEEDED if not _has(module, path)]
    if missing:
        raise BackendError(
            f"{name} {version} has no {missing[0]}, without which attention over a KV cache is computed wrongly: "
            f"{install_command(kind, upgrade=True)}"
        )
    return Library(kind, module, version, _listener(module))  # type: ignore[arg-type]


def dotted(target: str) -> str:
    """A compute capability as CUDA writes it: "86", "8.6", "sm_86" -> "8.6"; anything else stays as it is."""
    digits = target.strip().lower().removeprefix("sm").removeprefix("_").replace(".", "")
    return f"{digits[:-1]}.{digits[-1]}" if len(digits) >= 2 and digits.isdecimal() else target


def _has(module: ModuleType, path: str) -> bool:
    value: object = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value is not None


def _listener(module: ModuleType) -> Messages:
    """A logger of the library that keeps errors, for messages of ours, and shows nothing."""

    class Listener(module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: object, message: str) -> None:
            if severity in (module.ILogger.Severity.INTERNAL_ERROR, module.ILogger.Severity.ERROR):
                self.errors.append(message.strip())

        def clear(self) -> None:
            self.errors.clear()

    return Listener()
