"""What a manifest says of a compiled engine: the records alone. Knows neither builders, nor devices, nor files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

EngineKind = str
"""Name of a row of runtime/backends/table.py that has engines; manifest_checks.py refuses others."""


@dataclass(frozen=True)
class ProfileRecord:
    """One set of input shapes that an engine was optimised for."""

    name: str  # "prefill 512", "decode"
    tokens: int | None  # rows of hidden states; None where no input has them
    shapes: Mapping[str, tuple[tuple[int, ...], ...]]  # input -> (min, opt, max), or one shape where static


@dataclass(frozen=True)
class TensorRecord:
    """One input or output of an engine."""

    name: str
    mode: Literal["input", "output"]
    dtype: str
    shape: tuple[int, ...]  # -1 where the profile says


@dataclass(frozen=True)
class EngineRecord:
    """One engine file: what it was compiled from, by which library, for which devices, and how it is bound."""

    kind: EngineKind
    graph: str  # of the bundle; the file may be gone (--engines-only), the name stays
    file: str
    library: str  # the module that compiled it and has to load it: "tensorrt_rtx"
    version: str  # of that library
    targets: tuple[str, ...]  # compute capabilities, "8.6"; or a CPU: "cpu x86_64 avx512"
    dtype: str
    key: str  # hash over everything that decided the engine's bytes
    profiles: tuple[ProfileRecord, ...]
    tensors: tuple[TensorRecord, ...]
    capacities: tuple[int, ...]  # slots of each layer's KV cache, static
    weight_bytes: int  # of the graph; what the file has beyond them is the price of profiles and targets
    options: Mapping[str, Any] = field(
        default_factory=dict
    )  # what else decided its bytes: the compiler, a level of optimisation
