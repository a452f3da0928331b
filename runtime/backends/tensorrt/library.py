"""The library behind a TensorRT engine: `tensorrt_rtx` or `tensorrt`, one Python API, and what truly differs.

    kind          module        builds                                        timing cache   compiles at load
    tensorrt-rtx  tensorrt_rtx  for any set of targets, on any machine        no             yes (runtime cache)
    tensorrt      tensorrt      for the GPU at hand, which must be there      yes            no

An engine's network is one of two variants. `attention` has the library's layers for attention over a cache, with its
length and a LOWER_RIGHT mask, which TensorRT has from 11 on. `plain` has products, a mask and a softmax instead; it is
for the TensorRT 10 of Jetsons, from 10.3 on. Older ones are refused. Knows no network, no bundle and no device memory.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal, get_args

from framefusion.errors import BackendError
from framefusion.installation import install_command
from framefusion.runtime.backends.fit import release
from framefusion.runtime.backends.table import backend, engine_traits
from framefusion.runtime.backends.tensorrt.api import Messages
from framefusion.runtime.machine.gpu import find_gpu

LibraryKind = Literal["tensorrt-rtx", "tensorrt"]
AMPERE = 8.0
FLOAT8_FROM = 8.9
"""Compute capability from which on there are products of floats of 8 bits; TensorRT-RTX 1.7 refuses any other."""
TYPE_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "UINT8": "uint8",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}  # TensorRT's name of a type -> numpy's
Variant = Literal["attention", "plain"]
"""What an engine's network is made of; the record of an engine has it among its options where it is plain."""
PLAIN: Variant = "plain"
LAYERS_SINCE = (11,)  # what attention over a cache needs is there
_NEEDED: Mapping[Variant, tuple[str, ...]] = {
    "attention": (
        "IAttentionInputLayer.attention",
        "IAttention.key_value_lengths",
        "CausalMaskKind.LOWER_RIGHT",
        "IKVCacheUpdateLayer.cache_mode",
        "IStreamWriter",
    ),
    "plain": (
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "ExecutionContextAllocationStrategy.USER_MANAGED",
        "IExecutionContext.set_device_memory",
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.device_memory_size_v2",
        "IProgressMonitor",
    ),
}  # of the module: what a decoder over caches cannot be built or run without


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
    def variants(self) -> tuple[Variant, ...]:
        """The networks that it builds, the usual one first."""
        return variants_of(self.kind, self.version)

    def check_variant(self, variant: str | None) -> Variant:
        """The network that it is to build: what a user chose, or the usual one.

        Raises:
            BackendError: it has no such layers.
        """
        chosen = variant or self.variants[0]
        for known in self.variants:
            if known == chosen:
                return known
        raise BackendError(
            f"--variant {variant}: {self.kind} {self.version} has no layers for attention over a cache, which came "
            f"with {dotted_version(LAYERS_SINCE)}: leave it out, or {install_command(self.kind, upgrade=True)}"
        )

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

    def check_targets(self, targets: Sequence[str], least: float = AMPERE) -> tuple[str, ...]:
        """Compute capabilities in one notation, ascending, each once: "86" and "8.6" -> "8.6".

        Args:
            targets: what a user chose; without any, all from `least` on, because one engine for many targets is hardly
                larger.
            least: that the graphs need, or from which on there are bf16 and fp32 products.

        Raises:
            BackendError: one is unknown to the library, or this machine cannot build for it.
        """
        if not self.capabilities:
            return self._gpu_target(targets)
        known = sorted(self.capabilities, key=float)
        selected = {dotted(target) for target in targets} or {target for target in known if float(target) >= least}
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
    if too_old(kind, version):
        oldest = dotted_version(engine_traits(kind).oldest)
        raise BackendError(
            f"{name} {version} is older than {oldest}, and no engine is built for it: "
            f"{install_command(kind, upgrade=True)}; on a Jetson update JetPack, to 6.1 or later"
        )
    missing = [path for path in _NEEDED[variants_of(kind, version)[0]] if not _has(module, path)]
    if missing:
        raise BackendError(
            f"{name} {version} has no {missing[0]}, without which no engine of ours is built or run rightly: "
            f"{install_command(kind, upgrade=True)}"
        )
    return Library(kind, module, version, _listener(module))  # type: ignore[arg-type]


def variants_of(kind: str, version: str) -> tuple[Variant, ...]:
    """The networks that a version of a library builds, the usual one first."""
    return ("plain",) if kind == "tensorrt" and release(version) < LAYERS_SINCE else ("attention", "plain")


def too_old(kind: str, version: str) -> bool:
    """Whether a version of a library builds and runs nothing of ours."""
    return release(version) < engine_traits(kind).oldest


def plain_options(one_length: bool = False) -> dict[str, Any]:
    """What the record of a plain engine has among its options, and so its key.

    Args:
        one_length: its caches are equally long.
    """
    return {
        "variant": PLAIN,
        "library_versions": f">={dotted_version(engine_traits('tensorrt').oldest)}",
        "one_length": one_length,
    }


def is_plain(options: Mapping[str, Any]) -> bool:
    """Whether an engine's options are those of a plain network."""
    return options.get("variant") == PLAIN


def float8_problem(targets: Sequence[str], variant: str | None) -> str:
    """Why engines with weights in floats of 8 bits cannot be built so, and the way out; "" where they can.

    Args:
        targets: compute capabilities, in any notation; what is none is refused elsewhere.
        variant: of the networks.
    """
    if variant == PLAIN:
        return "--variant plain has no products with floats of 8 bits: leave it out, or build with --weights int8"
    older = [target for target in targets if _number(target) < FLOAT8_FROM]
    if not older:
        return ""
    return (
        f"--target-sm {','.join(older)}: floats of 8 bits need a GPU of compute capability {FLOAT8_FROM} or later "
        "(Ada, Hopper, Blackwell): leave it out, or build with --weights int8 or int4"
    )


def _number(target: str) -> float:
    """A compute capability as a number; infinite where it is none."""
    try:
        return float(dotted(target))
    except ValueError:
        return math.inf


def dotted_version(version: Sequence[int]) -> str:
    """(10, 3) -> "10.3" """
    return ".".join(map(str, version))


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
