"""A schedule for the fixed mode from clips: what the adaptive policy does to them, as medians.

Runs the model in eager torch over the clips, with the adaptive reduction, and writes nothing but a few files to a
temporary folder. Scaling the shares to meet the cost exactly is `framefusion.reduction.budget.scale_schedule`'s part.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from framefusion.errors import BudgetError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.calibration.prompts import named
from framefusion.export.eager.pipeline import eager_pipeline
from framefusion.export.plan.build_plan import BuildOptions, BuildPlan
from framefusion.reduction.policy import CallRecord
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual

PROMPT = "Describe this video."


def calibrate(checkpoint: Checkpoint, options: BuildOptions, clips: Sequence[Path]) -> BuildOptions:
    """Return the options with the merge shares and the prune layer that suit these clips.

    Args:
        checkpoint: runs in eager torch, in fp32.
        options: of the build; what is about graphs and engines is left aside.
        clips: films of the kind the bundle is for.

    Raises:
        BudgetError: no clip was given.
        VideoError: a clip cannot be read.
    """
    if not clips:
        raise BudgetError("0 clips to calibrate with: give one or more films of the kind the bundle is for")
    # 1. the policy that decides for each clip by itself; where the weights are in both dialects, that without padding
    adaptive = replace(options, reduction="adaptive", buckets=None, merge_shares=None, prune_layer=None)
    plan = BuildPlan(checkpoint, adaptive)
    if plan.quantization is None or all(form.kind == "int" for form in plan.quantization.formats):
        plan = BuildPlan(checkpoint, replace(adaptive, dialect="gqa"))
    # 2. what it drops at each call of each clip
    with tempfile.TemporaryDirectory() as folder:
        pipeline = eager_pipeline(plan, Path(folder) / "calibration")
        shares = [merge_shares(_history(pipeline, clip)) for clip in clips]
    # 3. one share a call for all of them; the prune follows the last merge
    merges = median_shares(shares)
    return replace(options, merge_shares=merges, prune_layer=max(len(merges) - 1, 0))


def merge_shares(history: Sequence[CallRecord]) -> list[float]:
    """Share of the visual tokens present that each call merged, up to the last call that merged any."""
    shares = [(r.visual_before - r.visual_after) / r.visual_before if r.kind == "merge" else 0.0 for r in history]
    while shares and shares[-1] == 0.0:
        shares.pop()
    return shares


def median_shares(shares: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Median over clips of each call's share; a clip whose merging had ended counts as 0. Stops at the first 0.

    Args:
        shares: of each clip, by call.
    """
    merges: list[float] = []
    for call in range(max(map(len, shares), default=0)):
        median = statistics.median(clip[call] if call < len(clip) else 0.0 for clip in shares)
        if median == 0.0:
            break
        merges.append(median)
    return tuple(merges)


def _history(pipeline: Pipeline, clip: Path) -> Sequence[CallRecord]:
    stopwatch = Stopwatch()
    turns = [Turn("user", (Visual.VIDEO, PROMPT))]
    with named(str(clip)):
        visuals = pipeline.read_visuals(turns, [clip], pipeline.manifest.sampling, stopwatch)
        prompt = pipeline.prompt(turns, visuals)
    rows = pipeline.embed(prompt, [pipeline.encode_visual(patches) for patches in visuals])
    return pipeline.prefill(prompt, rows, Request(max_new_tokens=1), stopwatch).history
