"""`ff-run bench`: one question about films at several costs, measured side by side on this machine.

Every cost answers in turn, round after round, so that whatever else the machine does meets all of them; the first round
is not counted. Reads no flag.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from framefusion.console import messages as console
from framefusion.errors import BudgetError
from framefusion.runtime.memory import slot_bytes
from framefusion.runtime.pipeline import Pipeline, dense_pipeline, dense_request
from framefusion.runtime.request import Generation, Request
from framefusion.runtime.view.timing import Spread, are_level

if TYPE_CHECKING:
    from framefusion.runtime.media.frame_sampling import FrameSampling
    from framefusion.runtime.media.sources import Source
    from framefusion.runtime.text.prompt import Turn

STAGES = ("video", "preprocess", "vision", "embed", "prefill", "reduction", "decode")


@dataclass(frozen=True)
class Way:
    """One way of answering: a column of the table."""

    name: str
    pipeline: Pipeline
    request: Request


@dataclass(frozen=True)
class Timing:
    """One answer, and the seconds from the question to its first token."""

    answer: Generation
    first_token: float


def ways_of(pipeline: Pipeline, request: Request, costs: Sequence[float]) -> list[Way]:
    """The ways to measure: each cost in the adaptive mode, else the bundle as it is built, and every token.

    Raises:
        BudgetError: costs are given for a bundle that decides at build time.
    """
    mode = pipeline.manifest.reduction.mode
    if mode == "adaptive":
        return [Way(f"cost {cost:g}", pipeline, replace(request, cost=cost)) for cost in costs or (1.0, 0.5, 0.3)]
    if costs:
        raise BudgetError(f"the cost of this bundle is built in (--reduction {mode}): leave --cost out")
    built = Way(f"cost {pipeline.manifest.reduction.cost:g}", pipeline, request)
    dense = dense_request(pipeline.manifest, request)
    return [Way("cost 1", dense_pipeline(pipeline), dense), built] if mode == "fixed" else [built]


def measure(
    ways: Sequence[Way], turns: Sequence[Turn], files: Sequence[Source], sampling: FrameSampling, rounds: int
) -> dict[str, Any]:
    """Answer one question in every way, `rounds` times, and say what each took.

    Args:
        ways: the first one is what the others are compared with.
        turns, files, sampling: as for `Pipeline.generate`.
        rounds: that count.

    Returns:
        Plain values for JSON: under "ways" for each its tokens, the median, least and most seconds of every stage and
        of the first token, tokens a second behind it, bytes of KV cache, its text, and whether it is the first way's.

    Raises:
        FrameFusionError: as `Pipeline.generate`.
    """
    timings: dict[str, list[Timing]] = {way.name: [] for way in ways}
    for index in range(rounds + 1):
        for way in ways:
            timing = timed(way, turns, files, sampling)
            if index:  # the first one warms up
                timings[way.name].append(timing)
    first = timings[ways[0].name][0].answer
    columns = [facts_of(way, timings[way.name], first) for way in ways]
    for column in columns:
        column["speed_up"] = columns[0]["first_token"]["median_s"] / column["first_token"]["median_s"]
    pipeline = ways[0].pipeline
    return {
        "rounds": rounds,
        "prompt_tokens": first.prompt_tokens,
        "visual_tokens": first.visual_tokens,
        "backend": None if pipeline.choice is None else pipeline.choice.text,
        "peak_resident_bytes": peak_resident_bytes(),
        "ways": columns,
    }


def timed(way: Way, turns: Sequence[Turn], files: Sequence[Source], sampling: FrameSampling) -> Timing:
    """One answer, file to text."""
    start = time.perf_counter()
    first_token = 0.0

    def watched() -> Any:
        nonlocal first_token
        for step in way.pipeline.stream(turns, files, way.request, sampling=sampling):
            if step.kind == "token" and not first_token:
                first_token = time.perf_counter() - start
            yield step

    return Timing(Generation.from_steps(watched()), first_token)


def facts_of(way: Way, timings: Sequence[Timing], first: Generation) -> dict[str, Any]:
    """One way as plain values."""
    answer = timings[0].answer
    stages = {
        stage: spread([timing.answer.seconds.get(stage, 0.0) for timing in timings])
        for stage in STAGES
        if any(stage in timing.answer.seconds for timing in timings)
    }
    speeds = [speed for timing in timings if (speed := timing.answer.tokens_per_second)]
    return {
        "name": way.name,
        "cost": answer.cost,
        "visual_tokens_kept": answer.kept_tokens,
        "kv_bytes": sum(answer.kv_lengths) * slot_bytes(way.pipeline.manifest),
        "first_token": spread([timing.first_token for timing in timings]),
        "stages": stages,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "text": answer.text,
        "same_answer": answer.text == first.text,
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def peak_resident_bytes() -> int | None:
    """The most memory that this process has had, everything counted; None where Python cannot say it (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def render(facts: Mapping[str, Any]) -> str:
    """A column a way, a row a figure."""
    ways = facts["ways"]
    base = ways[0]
    rows: list[list[str]] = [["visual tokens kept", *(str(way["visual_tokens_kept"]) for way in ways)]]
    stages = [stage for stage in STAGES if any(stage in way["stages"] for way in ways)]
    rows += [[f"{stage}, s", *(stage_seconds(way, stage) for way in ways)] for stage in stages]
    rows.append(["first token after, s", *(f"{way['first_token']['median_s']:.3f}" for way in ways)])
    rows.append([f"faster than {base['name']}", *(faster(way, base) for way in ways)])
    speeds = [way["tokens_per_second"] for way in ways]
    rows.append(["tokens a second", *("-" if speed is None else f"{speed:.1f}" for speed in speeds)])
    rows.append(["KV cache", *(console.in_bytes(way["kv_bytes"]) for way in ways)])
    rows.append([f"answer of {base['name']}", *("yes" if way["same_answer"] else "no" for way in ways)])
    counts = f"{facts['prompt_tokens']} tokens of prompt, {facts['visual_tokens']} visual"
    peak = facts["peak_resident_bytes"]
    memory = "" if peak is None else f"; peak memory {console.in_bytes(peak)}"
    lines = [
        console.table(["", *(way["name"] for way in ways)], rows),
        f"medians of {facts['rounds']}; {counts}{memory}",
    ]
    if facts["backend"] is not None:
        lines.append(facts["backend"])
    return "\n".join(lines)


def stage_seconds(way: Mapping[str, Any], stage: str) -> str:
    """The median of a stage; a dash where it did not happen."""
    return f"{way['stages'][stage]['median_s']:.3f}" if stage in way["stages"] else "-"


def faster(way: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """How many times as fast the first token is; a difference within the spread of both is none."""
    if way is not base and are_level(_spread(way), _spread(base), noise=1.0):  # two decimals say what is small, too
        return "no difference"
    return f"{way['speed_up']:.2f}x"


def _spread(way: Mapping[str, Any]) -> Spread:
    first = way["first_token"]
    return first["min_s"], first["median_s"], first["max_s"]
