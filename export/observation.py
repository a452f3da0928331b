"""One prompt with a drawn clip through a pipeline: what is compared when a bundle is checked. Judges nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from framefusion.export.engines.eager import EagerBackend
from framefusion.export.plan import BuildPlan
from framefusion.policy import Decision, ReductionState
from framefusion.runtime.bundle import Bundle, Manifest
from framefusion.runtime.pipeline import Pipeline, Request, dense_pipeline
from framefusion.runtime.prompt import Prompt, Turn, Visual
from framefusion.runtime.stitching import Stopwatch
from framefusion.runtime.token_rows import TokenRows
from framefusion.runtime.visual_input import VisualInput

DECODED = 16
FRAMES, HEIGHT, WIDTH = 12, 112, 168
QUESTION = "What happens in this video?"

Array = NDArray[np.float32]


@dataclass
class Run:
    """One prefill and its decoding."""

    logits: Array  # [V]
    kept: list[NDArray[np.int64]]  # per segment: places in the prompt
    tokens: list[int]  # decoded
    decoded: list[Array]  # logits after each


@dataclass
class Observed:
    """What the eager model makes of one prompt with a drawn clip."""

    visuals: list[VisualInput]
    prompt: Prompt
    features: Array
    rows: TokenRows
    dense: Run
    reduced: Run | None
    decisions: list[Decision]


def observe(bundle: Bundle, plan: BuildPlan) -> Observed:
    """Run the eager model as the bundle is run, in fp32; its weights are gone from memory when this returns."""
    in_fp32 = bundle.seen_as(model=replace(bundle.manifest.model, dtype="float32"))
    eager = Pipeline(in_fp32, EagerBackend(plan.eager_loaders()))
    turns = [Turn("user", (Visual.VIDEO, QUESTION))]
    visuals = eager.read_visuals(turns, [draw_clip()], eager.manifest.sampling, Stopwatch())
    prompt = eager.prompt(turns, visuals)
    features = eager.encode_visual(visuals[0])
    rows = eager.embed(prompt, [features])
    dense = run(dense_pipeline(eager), prompt, rows, dense_request(eager.manifest))
    reduced, decisions, request = None, list[Decision](), Request(DECODED)
    if eager.manifest.reduction.mode != "none":
        reduction = eager.reduction(prompt, request)
        if reduction is not None:
            reduction.observer = decisions.append
        reduced = run(eager, prompt, rows, request, reduction)
    return Observed(visuals, prompt, features, rows, dense, reduced, decisions)


def run(
    pipeline: Pipeline,
    prompt: Prompt,
    rows: TokenRows,
    request: Request,
    reduction: ReductionState | None = None,
    tokens: Sequence[int] | None = None,
) -> Run:
    """Prefill and decode.

    Args:
        pipeline: what runs.
        prompt: the tokens.
        rows: of the prompt.
        request: cost and new tokens.
        reduction: in place of the request's own.
        tokens: to decode; None takes the likeliest ones.
    """
    new = request.max_new_tokens
    if reduction is None:
        prefilled = pipeline.prefill(prompt, rows, request, Stopwatch())
    else:
        prefilled = pipeline.stitcher.prefill(rows, reduction, new, Stopwatch())
    first, chosen, decoded = prefilled.logits.copy(), list(tokens or ()), []
    logits, decoder = prefilled.logits, pipeline.stitcher.decoder(prefilled)
    places = prompt.token_ids.size + prompt.rope_delta + np.arange(new - 1)
    cos, sin = pipeline.rope(np.broadcast_to(places, (3, new - 1)))
    for step in range(new - 1):
        if tokens is None:
            chosen.append(int(logits.argmax()))
        row = pipeline.embedding(np.array(chosen[step : step + 1]))[0]
        logits = decoder.step(row, cos[step], sin[step])
        decoded.append(logits.copy())
    return Run(first, prefilled.kept, chosen, decoded)


def dense_request(manifest: Manifest) -> Request:
    """A request that keeps all tokens."""
    return Request(DECODED, cost=1.0 if manifest.reduction.mode == "adaptive" else None)


def draw_clip() -> NDArray[np.uint8]:
    """A small film with what reduction looks for: a still background, a moving patch, a cut in the middle."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    still = np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, (x + y) % 256], -1)
    frames = np.stack([still if t < FRAMES // 2 else 255 - still for t in range(FRAMES)]).astype(np.uint8)
    for t, frame in enumerate(frames):
        frame[20:60, 8 * t : 8 * t + 40] = (200, 40, 40)
    noise = np.random.default_rng(0).integers(0, 6, frames.shape, np.uint8)
    clip: NDArray[np.uint8] = np.minimum(frames, 249) + noise
    return clip
