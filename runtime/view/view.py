"""One answer watched: what became of every token at every call of the reduction, as plain values for a page.

Runs a pipeline once, or twice to compare with no reduction at all. Draws nothing: `page.py` does. Where a token lies in
its frame is the family's to say (`Preprocessing.panels`).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BudgetError
from framefusion.reducers import DEFAULT
from framefusion.reduction import tracks
from framefusion.reduction.budget import describe_cost
from framefusion.reduction.policy import CallRecord, Decision
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.generation.stages import prefill_report
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.generation.visuals.visual_stages import Media
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.preprocess import Preprocessing, resize
from framefusion.runtime.media.sources import Source
from framefusion.runtime.media.tiles.panels import Panel
from framefusion.runtime.media.video.frames import Video, facts_of_films
from framefusion.runtime.memory import slot_bytes
from framefusion.runtime.pipeline import Generation, Pipeline, Request, dense_pipeline, dense_request, requested_cost
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Prompt, Turn, Visual, visuals_of
from framefusion.runtime.view.flops import prefill_flops
from framefusion.runtime.view.timing import PATIENCE_SECONDS, ROUNDS, Timings, headline, timing_facts

BINS = 40
RARE = 0.02  # of the similarities of a call may lie below the bins
TOTAL_SIDE = 2560
SIDES = (160, 960)
QUALITY = 70
"""The longest side of a stored picture is TOTAL_SIDE / sqrt(pictures) within SIDES, so that the pixels of all of them
stay the same: 64 frames of film take about half a megabyte."""
BILINEAR = 2  # Pillow's number


@dataclass
class Watched:
    """An answer and what was kept of its way."""

    turns: Sequence[Turn]
    media: list[Media]
    prompt: Prompt
    request: Request
    kept: NDArray[np.int64]  # places in the prompt of the tokens that no call dropped
    answer: Generation
    decisions: list[Decision] = field(default_factory=list)
    dense: Generation | None = None
    timings: Timings = field(default_factory=lambda: Timings({}))


def watch(
    pipeline: Pipeline,
    turns: Sequence[Turn],
    files: Sequence[Source] = (),
    request: Request | None = None,
    *,
    sampling: FrameSampling | None = None,
    compare: bool | None = False,
) -> Watched:
    """Answer a conversation and take down each decision.

    Args:
        pipeline: of a bundle or of torch graphs.
        turns: what was said, the last one the user's.
        files: videos and images that the turns show.
        request: as for `Pipeline.generate`.
        sampling: of frames; None takes the bundle's.
        compare: answer it without reduction, too; None does where something is reduced. One prefill of each kind is run
            before and not timed, and where they are quick, several are timed in turn.

    Raises:
        BudgetError: there is no reduction to compare with.
        VideoError, PromptError: as `Pipeline.generate`.
    """
    stopwatch = Stopwatch()
    request = request or Request()
    if compare and requested_cost(pipeline.manifest, request) == 1.0:
        raise BudgetError("cost 1.0 keeps all tokens, so there is nothing to compare: ask a cost below 1")
    media = pipeline.decode_media(turns, files, sampling or pipeline.manifest.sampling, stopwatch)
    visuals = pipeline.preprocess(media, stopwatch)
    prompt = pipeline.prompt(turns, visuals)
    request = pipeline.clamp_new_tokens(request, prompt)
    if not compare:
        request = pipeline.with_default_cost(request, visuals_of(turns))
    if compare is None:
        compare = bool(prompt.num_visual) and requested_cost(pipeline.manifest, request) < 1.0
    with stopwatch.stage("vision"):
        features = [pipeline.encode_visual(visual) for visual in visuals]
    with stopwatch.stage("embed"):
        rows = pipeline.embed(prompt, features)
    timings = Timings(dict(stopwatch.seconds))
    dense = _dense_answer(pipeline, prompt, rows, request, timings) if compare else None
    decisions: list[Decision] = []
    prefilled = pipeline.prefill(prompt, rows, request, stopwatch, decisions.append)
    report = prefill_report(prompt, prefilled, facts_of_films(media))
    answer = Generation.from_steps(pipeline.decode(prompt, prefilled, request, stopwatch, report=report))
    timings.reduced.append(answer.seconds)
    return Watched(turns, media, prompt, request, prefilled.kept[-1], answer, decisions, dense, timings)


def _dense_answer(
    pipeline: Pipeline, prompt: Prompt, rows: TokenRows, request: Request, timings: Timings
) -> Generation:
    """The answer with every token, and the timings of all runs but the last one of the reduced way."""
    plain = dense_pipeline(pipeline)
    whole = dense_request(pipeline.manifest, request)
    # 1. What is there for the first time costs more: once each, not counted.
    pipeline.prefill(prompt, rows, request, Stopwatch())
    warm = Stopwatch()
    plain.prefill(prompt, rows, whole, warm)
    # 2. In turn, so that what else the machine does meets both; where that takes long, once.
    rounds = ROUNDS if sum(warm.seconds.values()) < PATIENCE_SECONDS else 1
    for _ in range(rounds - 1):
        for way, wanted, seconds in ((plain, whole, timings.dense), (pipeline, request, timings.reduced)):
            stopwatch = Stopwatch()
            way.prefill(prompt, rows, wanted, stopwatch)
            seconds.append(stopwatch.seconds)
    # 3. The last run is the one that goes on to an answer.
    answer = plain.answer(prompt, rows, whole)
    timings.dense.append(answer.seconds)
    return answer


def facts(watched: Watched, pipeline: Pipeline, name: str) -> dict[str, Any]:
    """All that the page shows, as values that JSON takes.

    Args:
        watched: the answer.
        pipeline: that gave it.
        name: of the bundle or checkpoint.
    """
    manifest = pipeline.manifest
    answer = watched.answer
    left, steps = fates(watched)
    timing = timing_facts(watched.timings, answer, watched.dense)
    boxes, visuals = _visuals(watched.media, pipeline.preprocessor(watched.media))
    structural = np.setdiff1d(
        np.flatnonzero(tracks.request_labels(watched.prompt.labels) >= 0), watched.prompt.row_places
    )
    return {
        "name": name,
        "family": manifest.model.family,
        "model": _model(manifest) | {"family_name": manifest.model.family},
        "backend": pipeline.backend.name,
        "settings": _settings(manifest, watched.request),
        "turns": [{"role": turn.role, "parts": _parts(turn)} for turn in watched.turns],
        "drawn": watched.request.generation_over(manifest.generation).do_sample,
        "reduced": run_facts(answer, manifest),
        "dense": None if watched.dense is None else run_facts(watched.dense, manifest),
        "steps": steps,
        "histograms": _histograms(watched),
        "boxes": boxes,
        "visuals": visuals,
        "left": left[watched.prompt.row_places].tolist(),
        **_merged_rows(watched),
        "timing": timing,
        "headline": headline(timing, answer, watched.dense),
        "structural": left[structural].tolist(),
    }


def run_facts(answer: Generation, manifest: Manifest) -> dict[str, Any]:
    """An answer with the memory and the operations it took."""
    model = manifest.model
    lengths = answer.kv_lengths
    slot = slot_bytes(manifest)
    full = prefill_flops(model, [answer.prompt_tokens] * len(lengths))
    return answer.to_dict() | {
        "cost": answer.cost,
        "cost_text": describe_cost(answer.cost),
        "kv_bytes": sum(lengths) * slot,
        "kv_slot_bytes": slot,
        "flops": prefill_flops(model, lengths),
        "flops_kept": prefill_flops(model, lengths) / full,
    }


def fates(watched: Watched) -> tuple[NDArray[np.int64], list[dict[str, Any]]]:
    """The step at which each token of the prompt was dropped, [S], -1 where it never was; and the steps.

    A step is a call that decided. The static graph of the fixed mode tells only what is left after all of them: there
    all calls are one step of the kind "static".
    """
    size = watched.prompt.token_ids.size
    history = watched.answer.reduction
    left = np.full(size, -1, np.int64)
    if not watched.decisions:
        gone = np.setdiff1d(np.arange(size), watched.kept)
        left[gone] = 0
        return left, [_step("static", history)] if gone.size else []
    present = np.arange(size)
    steps = []
    for step, (decision, record) in enumerate(zip(watched.decisions, history, strict=False)):
        left[np.delete(present, decision.plan.kept)] = step
        present = present[decision.plan.kept]
        steps.append(_step(record.kind, (record,)))
    return left, steps


def _merged_rows(watched: Watched) -> dict[str, Any]:
    """For each row: the row that took it, -1 for none; how alike the two were; and how many others it stands for."""
    places = watched.prompt.row_places
    into = np.full(watched.prompt.token_ids.size, -1, np.int64)
    similar = np.full(into.size, np.nan)
    took = np.zeros(into.size, np.int64)
    present = np.arange(into.size)
    for decision in watched.decisions:
        plan = decision.plan
        heads = np.repeat(plan.heads, plan.run_lengths)
        merged = heads != plan.members
        token = present[plan.members[merged]]
        into[token] = present[heads[merged]]
        if decision.similarity is not None:
            similar[token] = decision.similarity[plan.members[merged]]
        np.add.at(took, into[token], took[token] + 1)  # with those that it stood for itself
        present = present[plan.kept]
    row_of = np.full(into.size + 1, -1, np.int64)  # the last one for none
    row_of[places] = np.arange(places.size)
    return {
        "into": row_of[into[places]].tolist(),
        "similar": [None if np.isnan(score) else round(float(score), 4) for score in similar[places]],
        "took": took[places].tolist(),
    }


def _step(kind: str, records: Sequence[CallRecord]) -> dict[str, Any]:
    """Calls that are one step of the page: tokens before the first and after the last."""
    first = records[0]
    last = records[-1]
    return {
        "kind": kind,
        "calls": [record.call for record in records],
        "visual_before": first.visual_before,
        "visual_after": last.visual_after,
        "tokens_after": last.tokens_after,
    }


def _histograms(watched: Watched) -> list[dict[str, Any]]:
    """Similarity along the tracks at each call that read it, in the same bins; the first one holds all below, too."""
    read = []
    for call, decision in enumerate(watched.decisions):
        scores = decision.similarity
        if scores is not None:
            read.append((call, scores[scores > tracks.DISSIMILAR]))
    lowest = min((float(np.quantile(scores, RARE)) for _, scores in read if scores.size), default=1.0)
    edges = np.linspace(max(min(math.floor(lowest * 20) / 20, 0.95), -1.0), 1.0, BINS + 1)
    return [
        {
            "call": call,
            "edges": [round(float(edges[0]), 6), 1.0],
            "counts": np.histogram(np.clip(scores, edges[0], 1.0), edges)[0].tolist(),
            "median": float(np.median(scores)) if scores.size else None,
        }
        for call, scores in read
    ]


def _model(manifest: Manifest) -> dict[str, Any]:
    """Geometry of the LLM."""
    names = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "dtype", "model_type")
    return {name: getattr(manifest.model, name) for name in names}


def _settings(manifest: Manifest, request: Request) -> dict[str, Any]:
    """What the reduction was asked for, the bundle's values where the request has none."""
    record = manifest.reduction
    cost = requested_cost(manifest, request)
    requested = {name: getattr(request, name) for name in ("similarity_lower_bound", "ratio_lower_bound")}
    thresholds = {name: getattr(record, name) if value is None else value for name, value in requested.items()}
    schedule = None if record.schedule is None else asdict(record.schedule)
    reducer = request.reducer or record.reducer
    settings = {"mode": record.mode, "reducer": reducer, "cost": cost, "cost_text": describe_cost(cost)}
    if record.mode != "adaptive":
        return settings | {"schedule": schedule}
    return settings | (thresholds | {"depth": record.depth} if reducer == DEFAULT else {})  # they are FrameFusion's


def _parts(turn: Turn) -> list[dict[str, str]]:
    """Texts and kinds of visuals of a turn, in order."""
    return [{"shown": p.value} if isinstance(p, Visual) else {"text": p} for p in turn.parts]


def _visuals(media: Sequence[Media], rule: Preprocessing) -> tuple[list[list[list[float]]], list[dict[str, Any]]]:
    """What is drawn: sets of boxes, each once, and for each visual its pictures and panels."""
    count = sum(len(shown.frames) if isinstance(shown, Video) else 1 for shown in media)
    known: dict[bytes, int] = {}
    boxes: list[list[list[float]]] = []
    visuals = []
    for shown in media:
        film = isinstance(shown, Video)
        frames = shown.frames if isinstance(shown, Video) else shown[None]
        times = shown.times.tolist() if isinstance(shown, Video) else [0.0]
        (height, width) = frames.shape[1:3]
        panels = rule.panels(height, width, len(frames) if film else None)
        for panel in panels:
            if known.setdefault(panel.boxes.tobytes(), len(boxes)) == len(boxes):
                boxes.append(panel.boxes.round(4).tolist())
        pictures = [stored_picture(frame, count) for frame in frames]
        visuals.append(
            {
                "kind": "video" if film else "image",
                "size": [width, height],
                "stored": list(stored_size(width, height, count)),
                "times": times,
                "pictures": pictures,
                "panels": [_panel(panel, known) for panel in panels],
            }
        )
    return boxes, visuals


def _panel(panel: Panel, known: dict[bytes, int]) -> dict[str, Any]:
    """A panel with the number of its set of boxes."""
    return {"frames": list(panel.frames), "boxes": known[panel.boxes.tobytes()], "name": panel.name}


def stored_size(width: int, height: int, count: int) -> tuple[int, int]:
    """Width and height of a picture on a page of `count`; never larger than it was."""
    side = min(max(TOTAL_SIDE / math.sqrt(count), SIDES[0]), SIDES[1])
    scale = min(side / max(width, height), 1.0)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def stored_picture(frame: NDArray[np.uint8], count: int) -> str:
    """A frame as a WebP file in a data URL."""
    from PIL import Image

    height, width, _ = frame.shape
    wide, tall = stored_size(width, height, count)
    file = io.BytesIO()
    Image.fromarray(resize(frame, tall, wide, BILINEAR)).save(file, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
