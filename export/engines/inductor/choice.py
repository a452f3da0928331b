"""Which form of attention is compiled: each is run on the device that compiles, compared, and timed.

A form that is wrong there, or that the device's torch does not run, is left out, and so is one that is slower than
another by more than `MARGIN`; of the rest the first of attention.FORMS' preference is taken, so that noise changes no
engine. Knows no graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from framefusion.errors import BackendError
from framefusion.export.engines.inductor.attention import FORMS, cache_attention

PREFERRED = ("split", "cudnn", "varlen", "flash", "masked")
MARGIN = 1.3
DECODES = 32  # steps that weigh as much as one prefill
LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Error of a form, relative to the largest magnitude: rounding of one product more, and of the mean of two."""
LENGTHS: dict[str, tuple[int, int]] = {"cpu": (1024, 64), "cuda": (4096, 512)}
"""Tokens of the prefill, and of the chunk behind one, that are compared and timed."""
SHORT = (3, 8)
"""Tokens and tokens held of a chunk of which each key has a share that no rounding hides."""
_REFUSALS = (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError)
"""What torch raises for an op without such a kernel, and Python for one that a release lacks, or has otherwise."""
_BEHIND = 7  # slots that hold nothing
_ROUNDS = 3
_LONG_ENOUGH = 0.02  # seconds of all runs


@dataclass(frozen=True)
class Geometry:
    """What attention depends on.

    Attributes:
        heads: of the queries.
        kv_heads: of keys and values.
        head_dim: of each.
        dtype: of all.
        device: as torch names it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class Trial:
    """What became of one form.

    Attributes:
        problem: why it is left out; None where it is right.
        error: the largest, relative to the largest magnitude.
        prefill_s: seconds of a prefill.
        decode_s: seconds of a decode step behind it.
    """

    problem: str | None
    error: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def cost(self) -> float:
        """Seconds of a prefill and of some steps."""
        return self.prefill_s + DECODES * self.decode_s


def choose(geometry: Geometry) -> str:
    """The form to compile for a geometry on its device; measured once in a process.

    Raises:
        BackendError: none is right there but the one that takes torch's math path on a GPU.
    """
    trials = measured(geometry)
    right = {name: trial for name, trial in trials.items() if trial.problem is None}
    if not right:
        reasons = "; ".join(f"{name}: {trial.problem}" for name, trial in trials.items())
        raise BackendError(
            f"no form of attention is right on {geometry.device} with torch {torch.__version__} ({reasons}): build the "
            "bundle with --dtype bfloat16 or float16, take another release of torch, or the backend onnxruntime"
        )
    limit = MARGIN * min(trial.cost for trial in right.values())
    return next(name for name in PREFERRED if name in right and right[name].cost <= limit)


@cache
def measured(geometry: Geometry, lengths: tuple[int, int] | None = None) -> dict[str, Trial]:
    """Each form that is for the device, tried there. The masked one is no choice on a GPU: it takes the math path.

    Args:
        geometry: of the attention.
        lengths: tokens of the prefill and of the chunk behind one; None takes `LENGTHS`.
    """
    allowed = ("any", "cpu") if geometry.device == "cpu" else (geometry.device,)
    lengths = lengths or LENGTHS[geometry.device]
    with torch.no_grad():
        return {name: _trial(name, geometry, *lengths) for name in PREFERRED if FORMS[name].device in allowed}


def _trial(name: str, geometry: Geometry, whole: int, chunk: int) -> Trial:
    error = 0.0
    taken = {}
    for length, held in ((whole, whole), (chunk, whole), (1, whole), SHORT):
        (operands, expected) = _operands(geometry, length, held, FORMS[name].is_cut)
        attend = cache_attention(name)
        try:
            found = attend(*operands)[0].float()
        except _REFUSALS as problem:
            return Trial(f"it does not run ({next(iter(str(problem).splitlines()), type(problem).__name__)})")
        error = max(error, float((found - expected).abs().max() / expected.abs().max()))
        if not error <= LIMITS[geometry.dtype]:  # not a number is wrong, too
            return Trial(f"{length} tokens over {held} have an error of {error:.1e}", error)
        taken[length] = seconds(lambda: attend(*operands), geometry.device)  # noqa: B023
    return Trial(None, error, taken[whole], taken[1])


def _operands(geometry: Geometry, length: int, held: int, is_cut: bool) -> tuple[tuple[object, ...], Tensor]:
    """Operands of ops.cache_attention, and what it gives in fp32; slots that hold nothing are far from zero."""
    random = torch.Generator().manual_seed(length)
    slots = held if is_cut else held + _BEHIND

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(geometry.device, geometry.dtype)

    widths = [heads * geometry.head_dim for heads in (geometry.heads, geometry.kv_heads, geometry.kv_heads)]
    rows = [draw(1, length, width) for width in widths]
    caches = [draw(1, slots, geometry.kv_heads, geometry.head_dim).transpose(1, 2) for _ in range(2)]
    for tensor in caches:
        tensor[:, :, held:] = 100
    kv_len = torch.tensor([held], device=geometry.device)
    heads = geometry.heads, geometry.kv_heads
    reference = torch.ops.framefusion.cache_attention
    exact = [tensor.float() for tensor in (*rows, *caches)]
    return (*rows, *caches, kv_len, *heads), reference(*exact, kv_len, *heads)[0]


def seconds(run: Callable[[], object], device: str) -> float:
    """The least of a few runs, and of more where they are short; on a CPU its own time, whatever else it does."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    taken: list[float] = []
    while len(taken) < _ROUNDS or (sum(taken) < _LONG_ENOUGH and len(taken) < 10 * _ROUNDS):
        start = clock()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(clock() - start)
    return min(taken)
