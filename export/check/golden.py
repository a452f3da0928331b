"""The golden of a bundle: the canned request through the eager model in fp32, written down for whoever proves a device.

The modules are those that the check compares with transformers' class (observation.py), so where the check passed the
golden is transformers' as well. It is made without one, too: it needs no graph of the bundle. Seeds are tried until
the decisions stand with noise of HEADROOM roundings of the bundle's type on the visual rows: no decision is near its
threshold then, and devices that round otherwise keep the same tokens.

Where weights are quantized, kernels of one device round activations, those of another do not. The reference has none of
it, and the limits are MEASURED times what all known ways of rounding (quantized.py) make of this very request: layers
that amplify have wide limits and others narrow ones.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from framefusion.errors import BudgetError, ReducerError
from framefusion.export.check import check
from framefusion.export.check.observation import Doing, ignore
from framefusion.export.check.quantized import ROUNDINGS, Rounder, half_unit, rounding_of
from framefusion.export.check.verify import memory_of_check, memory_of_streamed
from framefusion.export.eager.backend import EagerBackend
from framefusion.export.eager.pipeline import eager_loaders, in_fp32
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.reduction.policy import Decision
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.generation.embedder import Embedding
from framefusion.runtime.proof.canned import CannedPicture, CannedRequest, text_ids
from framefusion.runtime.proof.golden import (
    GOLDEN,
    MEASURED_VERSION,
    MOST_SWAPPED,
    VERSION,
    Golden,
    GoldenCall,
    GoldenLimits,
    GoldenRun,
    GoldenTower,
    MeasuredLimits,
    golden_to_json,
    logit_places,
    row_places,
    short,
    values_of,
)
from framefusion.runtime.proof.prove import TOGETHER, prove
from framefusion.runtime.proof.rehearsal import Answer, Rehearsal

COSTS = (0.5, 0.3)  # beside dense and the bundle's own cost, as far as the model reaches them
FRAMES = 6
HEIGHT = 2
WIDTH = 4
TEXT_BEFORE = 7
TEXT_BEHIND = 9
ANSWER = 8
SPARING_ANSWER = 2  # where each token reads all weights from the disk once more
SEEDS = 4
ALIKE = 0.99  # what repeats, and nothing else
HEADROOM = 4  # roundings
ROUNDED_HEADROOM = 2
"""Times the limit of the check where activations are rounded to 8 bits and nothing could be measured."""
MEASURED = 2
"""Times the largest error of known ways of rounding: in tiny checkpoints of six families kernels of ONNX Runtime and
OpenVINO came to at most 1.14 times that of blocks and rows, other orders of sums and other blocks to 1.64 times."""
LEAST_NOISE = 1e-5  # as a share of a row's scale: a layer of fp32 adds more than one rounding
CODED_NOISE = 4e-4  # what codes of a cache that go the other way were seen to change, see `quantized.CODED`
LEFT_OUT = "the eager model is larger than the memory that was free, and --no-check leaves out what reads it again"
PICTURE = (56, 84)  # pixels, before the family's preprocessing


def golden_of(bundle: Bundle, plan: BuildPlan, doing: Doing = ignore, *, may_stream: bool = True) -> Golden:
    """Run the eager model on the canned request; where that cannot be, a golden that says why.

    Args:
        bundle: its embedding table and manifest are read, none of its graphs.
        plan: what the bundle is built from.
        doing: called with what runs now.
        may_stream: read weights from the disk again for every run where the model is larger than memory; it takes as
            long as a check does. Without it such a model has no golden.
    """
    # 1. Memory: whole where the check would be, else weights stay on the disk and less is run.
    effort = golden_effort(plan, may_stream=may_stream)
    streamed = effort.streamed
    request = _request(bundle, SPARING_ANSWER if streamed else ANSWER)
    empty = Golden(VERSION, "", _limits(plan), request, (), None)
    missing = effort.missing or _room(bundle, request)
    if missing:
        return replace(empty, missing=missing)
    # 2. The eager model in fp32, behind the runtime's own code.
    floats = in_fp32(bundle, plan)
    rounder = Rounder(plan.dtype)
    backend = EagerBackend(rounder.watched(eager_loaders(plan, streamed=streamed, written=bundle.folder)))
    # 3. A seed whose decisions are far from their thresholds, then all runs with it.
    costs = _costs(Rehearsal(floats, backend, request), sparing=streamed)
    request, stable = _steady(floats, backend, request, costs, plan, 1 if streamed else SEEDS)
    rehearsal = Rehearsal(floats, backend, request)
    runs = []
    for name, cost in costs:
        doing(f"golden, {name}")
        runs.append(_run(rehearsal, name, cost, stable[name]))
    if not any(call.importance for run in runs for call in run.calls) and costs[-1][1] is not None:
        runs.append(_pruned(rehearsal, costs[-1][1]))
    doing("golden, vision tower")
    reference = f"eager torch {torch.__version__} in fp32, {plan.config.num_layers} layers"
    golden = replace(empty, reference=reference, request=request, runs=tuple(runs), tower=_tower(bundle, rehearsal))
    # 4. What kernels that round activations may be off by; the tower has no caches that are codes.
    if not plan.rounds_activations:
        return golden if plan.kv_scales is None else _with_tower_limit(golden, plan)
    doing("golden, rounded activations")
    return _measured(golden, plan, floats, backend, rounder, sparing=streamed)


@dataclass(frozen=True)
class GoldenEffort:
    """How a golden is made.

    Attributes:
        streamed: weights stay on the disk, and less is run.
        memory: bytes at the peak.
        missing: why it cannot be made; "" where it can.
    """

    streamed: bool
    memory: int
    missing: str = ""


def golden_effort(plan: BuildPlan, *, may_stream: bool) -> GoldenEffort:
    """Decide from the plan and the memory that is free now; arguments are those of `golden_of`."""
    free = check.available_memory()
    whole = memory_of_check(plan)
    streamed = whole > free
    missing = _out_of_reach(plan, streamed, free) if may_stream or not streamed else LEFT_OUT
    return GoldenEffort(streamed, memory_of_streamed(plan) if streamed else whole, missing)


def write_golden(folder: Path, golden: Golden) -> list[str]:
    """Write golden.json into a folder; the names of what was written."""
    text = json.dumps(golden_to_json(golden), separators=(",", ":"), allow_nan=False)
    (folder / GOLDEN).write_text(text + "\n", encoding="utf-8")
    return [GOLDEN]


def _out_of_reach(plan: BuildPlan, streamed: bool, free: int) -> str:
    """Why the eager model cannot be run; "" where it can."""
    least = memory_of_streamed(plan)
    if streamed and plan.fixed is not None:
        return "the static graph computes its longest prompt, and the eager model does not fit the memory of the build"
    if streamed and least > free:
        return f"the eager model needs {least / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB were free"
    return ""


def _room(bundle: Bundle, request: CannedRequest) -> str:
    limits = bundle.manifest.limits
    slots = request.length + request.answer
    if request.frames < 2 or request.length > limits.max_input_len or slots > limits.max_kv_cache_capacity:
        return f"the canned request of {request.length} tokens does not fit an input of {limits.max_input_len}"
    return ""


def _request(bundle: Bundle, answer: int) -> CannedRequest:
    """As many frames as the bundle takes, and rows as large as those of its embedding table."""
    manifest = bundle.manifest
    fixed = manifest.fixed
    text = TEXT_BEFORE + TEXT_BEHIND
    room = manifest.limits.max_input_len - text
    frames = min(FRAMES, room // (HEIGHT * WIDTH))
    if fixed is not None:
        frames = min(frames, fixed.max_track, fixed.max_visual // (HEIGHT * WIDTH))
    request = CannedRequest(0, TEXT_BEFORE, max(frames, 1), HEIGHT, WIDTH, TEXT_BEHIND, answer, 1.0)
    ids = np.unique(np.linspace(0, text_ids(manifest) - 1, 64).astype(np.int64))
    spread = float(np.sqrt(np.mean(np.square(Embedding(bundle.folder, manifest.embedding)(ids)))))
    # uniform numbers in [-1, 1] have a root mean square of 1 / sqrt(3)
    exponent = round(math.log2(spread * math.sqrt(3))) if spread > 0 else 0
    return replace(request, scale=2.0 ** max(min(exponent, 16), -16))


def _limits(plan: BuildPlan) -> GoldenLimits:
    exact = _half_unit(plan) == 0 and plan.kv_scales is None
    headroom = ROUNDED_HEADROOM if plan.rounds_activations else 1
    return GoldenLimits(min(headroom * check.default_tolerance(plan), 0.5), 0.0 if exact else MOST_SWAPPED)


def _half_unit(plan: BuildPlan) -> float:
    """See `quantized.half_unit`."""
    return half_unit(plan.dtype, rounded=rounding_of(plan.quantization, plan.dialect.name))


def _with_tower_limit(golden: Golden, plan: BuildPlan) -> Golden:
    """The golden with the limit of floats for the tower, and its own for all that follows attention over codes."""
    numbers = golden.limits.numbers
    tower = check.tolerance_of(plan.dtype, plan.config.num_layers)
    limits = replace(golden.limits, measured=MeasuredLimits(tower, numbers, numbers, numbers))
    return replace(golden, version=MEASURED_VERSION, limits=limits)


def _measured(
    golden: Golden, plan: BuildPlan, bundle: Bundle, backend: EagerBackend, rounder: Rounder, *, sparing: bool
) -> Golden:
    """The golden with limits by what known ways of rounding make of it; as it is, where that cannot be compared.

    Args:
        golden: with the limits of the check.
        plan: of the bundle.
        bundle: in fp32, as the backend runs it.
        backend: with the rounder's hooks.
        rounder: off.
        sparing: one way of rounding alone, since each reads all weights again.
    """
    # 1. the proof of a device, run over torch graphs that round; limits of no matter here
    open_limits = replace(golden.limits, measured=MeasuredLimits(check.MOST, check.MOST, check.MOST, check.MOST))
    open_golden = replace(golden, limits=open_limits)
    worst: dict[str, float] = {}
    roundings = ROUNDINGS[rounding_of(plan.quantization, plan.dialect.name)]
    for rounding in roundings[: 1 if sparing else None]:
        rounder.rounding = rounding
        for stage in prove(bundle, backend, open_golden).stages:
            kind = stage.kind
            worst[kind] = max(stage.error, worst.get(kind, 0.0))
    rounder.rounding = None
    # 2. a static graph that decided otherwise each time leaves no logits to compare
    if TOGETHER not in worst:
        return golden
    # 3. no limit is below that of floats, which what is not quantized keeps
    floats = check.tolerance_of(plan.dtype, plan.config.num_layers)
    coded = plan.kv_scales is not None
    least = check.tolerance_of(plan.dtype, plan.config.num_layers, coded_caches=coded)

    def limit(kind: str) -> float:
        found = MEASURED * worst.get(kind, 0.0)
        return min(max(found, least), check.MOST) if math.isfinite(found) else check.MOST

    measured = MeasuredLimits(floats, limit("similarity"), limit("importance"), limit(TOGETHER))
    limits = GoldenLimits(limit("logits"), golden.limits.swapped, measured)
    return replace(golden, version=MEASURED_VERSION, limits=limits)


def _costs(rehearsal: Rehearsal, *, sparing: bool) -> list[tuple[str, float | None]]:
    """Names and costs of all runs, the dense one first."""
    record = rehearsal.manifest.reduction
    if record.mode == "fixed":
        return [(f"cost {record.cost:.3g}, fixed", None)]
    costs: list[tuple[str, float | None]] = [("dense", None)]
    if record.mode == "adaptive":
        wanted = (record.cost,) if sparing else (record.cost, *COSTS)
        descending = sorted(set(wanted), reverse=True)
        costs += [(f"cost {cost:.3g}", cost) for cost in descending if _is_reachable(rehearsal, cost)]
    return costs


def _is_reachable(rehearsal: Rehearsal, cost: float) -> bool:
    """Whether the model is long enough for a cost, and cut where the reducer acts at it."""
    try:
        return rehearsal.reduction(cost) is not None
    except (BudgetError, ReducerError):
        return False


def _steady(
    bundle: Bundle,
    backend: EagerBackend,
    request: CannedRequest,
    costs: list[tuple[str, float | None]],
    plan: BuildPlan,
    seeds: int,
) -> tuple[CannedRequest, dict[str, bool]]:
    """The request of the first seed under which every run keeps the same tokens with noise on its rows, or the best."""
    reduced = [(name, cost) for name, cost in costs if cost is not None or plan.fixed is not None]
    noise = max(HEADROOM * _half_unit(plan), LEAST_NOISE)
    noise = noise if plan.kv_scales is None else max(noise, CODED_NOISE)
    found: tuple[int, CannedRequest, dict[str, bool]] | None = None
    for seed in range(seeds if reduced else 1):
        tried = replace(request, seed=seed)
        rehearsal = Rehearsal(bundle, backend, tried)
        stable = {name: True for name, _ in costs}
        for name, cost in reduced:
            plain, *noisy = (rehearsal.answer(cost, noise=share, decode=False).kept for share in (0.0, noise, -noise))
            stable[name] = all(np.array_equal(*pair) for other in noisy for pair in zip(plain, other, strict=True))
        if found is None or sum(stable.values()) > found[0]:
            found = sum(stable.values()), tried, stable
        if all(stable.values()):
            break
    assert found is not None  # there is a seed
    return found[1:]


def _pruned(rehearsal: Rehearsal, cost: float) -> GoldenRun:
    """A run in which only what repeats merges: where merges alone meet all costs, nobody would look at importance."""
    return _run(rehearsal, f"cost {cost:.3g}, pruned", cost, stable=False, bound=ALIKE)


def _run(rehearsal: Rehearsal, name: str, cost: float | None, stable: bool, bound: float | None = None) -> GoldenRun:
    answer: Answer = rehearsal.answer(cost, bound)
    places = logit_places(rehearsal.request.seed, rehearsal.manifest)
    kept = tuple(tuple(map(int, tokens)) for tokens in answer.kept)
    calls = tuple(_call(number, decision) for number, decision in enumerate(answer.decisions))
    logits = tuple(values_of(row, places) for row in answer.logits)
    return GoldenRun(name, cost, kept, calls, logits, stable, bound)


def _call(number: int, decision: Decision) -> GoldenCall:
    scores = (decision.similarity, decision.importance)
    return GoldenCall(number, *(() if vector is None else tuple(map(short, vector)) for vector in scores))


def _tower(bundle: Bundle, rehearsal: Rehearsal) -> GoldenTower:
    """One picture of the size that the family makes of a small one."""
    pixels = np.zeros((*PICTURE, 3), np.uint8)
    tiles = bundle.manifest.preprocessing.for_images(1).image(pixels, 0).tiles[0]
    picture = CannedPicture(tiles.grid.height, tiles.grid.width, tiles.pool, tiles.shape[1])
    rows = rehearsal.tower(picture)
    return GoldenTower(picture, rows.shape, values_of(rows, row_places(rehearsal.request.seed, rows.size)))
