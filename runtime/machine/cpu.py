"""Which processor this is, its vector instructions as the kernel lists them, and the cores that this process has.

Knows no engine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from functools import cache
from pathlib import Path

from framefusion.runtime.machine.control_groups import cores_of_quota

# What a compiler emits by itself when it compiles for the machine at hand; timers and virtualisation do not matter.
_X86 = ("sse", "ssse", "avx", "fma", "f16c", "bmi", "movbe", "popcnt", "abm", "adx", "amx")
_ARM = ("asimd", "fphp", "sve", "bf16", "i8mm", "sme")
_DOT_PRODUCTS = frozenset(("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"))
_PRODUCTS = _DOT_PRODUCTS | {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "sve"}
_LINES = ("flags", "Features")
_CPUINFO = Path("/proc/cpuinfo")


@cache
def features(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Names like "avx2" and "avx512f"; none where the system has no list of them."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.split(":")[0].strip() in _LINES), ":")
    return frozenset(flag for flag in flags.split(":", 1)[1].split() if flag.startswith(_X86 + _ARM))


def products() -> tuple[str, ...]:
    """Instructions by which the seconds of a product of matrices differ, as Linux names them."""
    return tuple(sorted(_PRODUCTS & features()))


def has_dot_products() -> bool:
    """Whether bytes are multiplied and four of them added up in one instruction, or in a matrix unit.

    Without, weights in 4 and 8 bits make no prefill faster (docs/quantisation.md).
    """
    return bool(_DOT_PRODUCTS & features())


@cache
def model_name(cpuinfo: Path = _CPUINFO) -> str:
    """As its maker calls it, such as "AMD EPYC 7B13"; "" where the system does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ""
    names = ("model name", "Model", "CPU part")  # x86; boards with ARM; ARM alone
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return next((found[name] for name in names if found.get(name)), "")


def available_cores() -> int:
    """Logical cores that this process may use at once: those it may run on, as many as its container's quota pays for.

    A quota of 1.5 cores counts as 2.
    """
    quota = cores_of_quota()
    return len(_affinity()) if quota is None else min(len(_affinity()), math.ceil(quota))


def _affinity() -> Collection[int]:
    """Numbers of the logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def physical_cores(cpuinfo: Path = _CPUINFO) -> int:
    """Cores that this process may run on, however many threads each runs; where no list says, the logical ones."""
    allowed = {str(number) for number in _affinity()}
    try:
        blocks = cpuinfo.read_text().strip().split("\n\n")
    except OSError:
        blocks = []
    cores = set()
    for block in blocks:
        fields = dict(_field(line) for line in block.splitlines())
        if "core id" in fields and fields.get("processor") in allowed:
            cores.add((fields.get("physical id"), fields["core id"]))
    return len(cores) or len(allowed)


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def default_threads() -> int:
    """Threads of one operator where nobody says how many; 0 leaves it to the library, which takes the physical cores.

    Libraries count the cores of the machine. In a container that has fewer, or pinned to fewer, their threads would
    wait for each other.
    """
    available = available_cores()
    return 0 if available == os.cpu_count() else min(available, physical_cores())
