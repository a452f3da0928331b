"""One prompt with a drawn clip through a pipeline: what is compared when a bundle is checked. Judges nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from framefusion.export.eager.backend import EagerBackend, Load
from framefusion.export.eager.pipeline import eager_loaders, in_fp32
from framefusion.export.graphs.decoder import Segment
from framefusion.export.graphs.graph_plan import GraphModule
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.reduction.policy import Decision, ReductionState
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.generation.decode import Decoder
from framefusion.runtime.generation.prefill import prefill
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.media.visual_input import VisualInput
from framefusion.runtime.pipeline import Pipeline, Request, dense_pipeline, dense_request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Prompt, Turn, Visual

DECODED = 16
FRAMES = 12
HEIGHT = 112
WIDTH = 168
QUESTION = "What happens in this video?"

Array = NDArray[np.float32]
Doing = Callable[[str], object]
"""Called with what runs now, for whoever waits."""


def ignore(_: str) -> None:
    """A `Doing` for callers that show no progress."""


@dataclass
class Run:
    """One prefill and its decoding.

    Attributes:
        logits: [V] behind the prompt.
        kept: for each segment the places in the prompt of the tokens that it gives.
        tokens: that were decoded.
        decoded: [V] of logits behind each of them.
    """

    logits: Array
    kept: list[NDArray[np.int64]]
    tokens: list[int]
    decoded: list[Array]


@dataclass(frozen=True)
class Effort:
    """How much of a prompt and an answer is run.

    Attributes:
        frames: of the drawn clip.
        tokens: of the answer.
        streamed: weights are read from the disk each time a layer runs, and memory holds one layer.
        reduced: the prompt is run with the bundle's reduction, too.
    """

    frames: int = FRAMES
    tokens: int = DECODED
    streamed: bool = False
    reduced: bool = True


WHOLE = Effort()
SPARING = Effort(frames=4, tokens=2, streamed=True)
"""Each token of an answer reads all weights once more, and each frame of a large model is seconds in fp32."""


@dataclass
class EagerRun:
    """What the eager model computes for one prompt with a drawn clip.

    Attributes:
        visuals: the clip, preprocessed.
        prompt: its tokens.
        features: [Q, D] of the clip, from the vision tower.
        rows: what enters the decoder, unreduced.
        dense: the run that keeps all tokens.
        reduced: the run with the bundle's reduction; None where there is none.
        decisions: of the reduction, in the order of its calls.
        states: for each layer the rows [S, D] that enter it in the dense run.
        final: the row [D] that enters the last norm behind the last token of the prompt.
    """

    visuals: list[VisualInput]
    prompt: Prompt
    features: Array
    rows: TokenRows
    dense: Run
    reduced: Run | None
    decisions: list[Decision]
    states: list[Array]
    final: Array


def observe(
    bundle: Bundle,
    plan: BuildPlan,
    effort: Effort = WHOLE,
    doing: Doing = ignore,
    tokens: Sequence[int] | None = None,
) -> EagerRun:
    """Run the eager model as the bundle is run, in fp32; its weights are gone from memory when this returns.

    Args:
        bundle: what is not a graph comes from it: tokenizer, embedding table, limits.
        plan: of the bundle, with the checkpoint that has the weights.
        effort: how much is run.
        doing: called with what runs now.
        tokens: of the dense run's answer; None takes the likeliest ones.
    """
    # 1. the bundle's own pipeline over torch modules, which note what enters their layers
    recorder = Recorder(lambda layer: doing(f"torch, layer {layer} of {plan.config.num_layers}"))
    loaders = eager_loaders(plan, streamed=effort.streamed, written=bundle.folder)
    eager = Pipeline(in_fp32(bundle, plan), EagerBackend(recorder.watched(loaders)))
    # 2. one prompt with one clip
    turns = [Turn("user", (Visual.VIDEO, QUESTION))]
    visuals = eager.read_visuals(turns, [draw_clip(effort.frames)], eager.manifest.sampling, Stopwatch())
    prompt = eager.prompt(turns, visuals)
    doing("torch, vision tower")
    features = np.asarray(eager.encode_visual(visuals[0]))
    rows = eager.embed(prompt, [features])
    # 3. without a reduction: what transformers computes as well
    recorder.open = True
    whole = dense_request(eager.manifest, Request(effort.tokens))
    dense = run(dense_pipeline(eager), prompt, rows, whole, tokens=tokens, recorder=recorder)
    # 4. with the bundle's reduction, and the scores that it decided by
    reduced = None
    decisions = list[Decision]()
    request = Request(effort.tokens)
    if effort.reduced and eager.manifest.reduction.mode != "none":
        reduction = eager.reduction(prompt, request)
        if reduction is not None:
            reduction.observer = decisions.append
        reduced = run(eager, prompt, rows, request, reduction)
    states = recorder.states(plan.config.num_layers, prompt.token_ids.size)
    return EagerRun(visuals, prompt, features, rows, dense, reduced, decisions, states, recorder.final)


class Recorder:
    """What enters the layers of eager modules while `open` is set.

    Args:
        entering: called with each layer that is entered, at any time.
    """

    def __init__(self, entering: Callable[[int], object]) -> None:
        self.open = False
        self._entering = entering
        self.final: Array = np.zeros(0, np.float32)
        self._states: dict[int, list[Array]] = {}

    def watched(self, loaders: Mapping[str, Load]) -> Mapping[str, Load]:
        """The same loaders, of modules with this object's hooks."""
        return {graph: partial(self._watched, loader) for graph, loader in loaders.items()}

    def states(self, num_layers: int, length: int) -> list[Array]:
        """Rows [S, D] that entered each layer.

        Args:
            num_layers: of the model.
            length: tokens of the prompt; rows of padding behind them are left out.
        """
        return [np.concatenate(self._states[layer])[:length] for layer in range(num_layers)]

    def _watched(self, loader: Load) -> GraphModule:
        module = loader()
        if isinstance(module, Segment):
            for block, part in zip(module.plan, module.blocks, strict=True):
                if block.kind == "attention":
                    part.register_forward_pre_hook(partial(self._enter, block.layer))
            if module.head is not None:
                module.head.register_forward_pre_hook(self._end)
        return module

    def _enter(self, layer: int, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._entering(layer)
        if self.open:
            self._states.setdefault(layer, []).append(arguments[0][0].numpy().copy())

    def _end(self, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self.open:
            self.final = arguments[0][0, 0].numpy().copy()


def run(
    pipeline: Pipeline,
    prompt: Prompt,
    rows: TokenRows,
    request: Request,
    reduction: ReductionState | None = None,
    tokens: Sequence[int] | None = None,
    recorder: Recorder | None = None,
) -> Run:
    """Prefill and decode; the same tokens in two pipelines make their logits comparable.

    Args:
        pipeline: what runs.
        prompt: the tokens.
        rows: of the prompt.
        request: cost and new tokens.
        reduction: in place of the request's own.
        tokens: to decode; None takes the likeliest ones.
        recorder: of the prefill; closed behind it.
    """
    new = request.max_new_tokens
    if reduction is None:
        prefilled = pipeline.prefill(prompt, rows, request, Stopwatch())
    else:
        prefilled = prefill(pipeline.segments, rows, reduction, new, Stopwatch())
    if recorder is not None:
        recorder.open = False
    first = prefilled.logits.copy()
    chosen = list(tokens or ())
    decoded = []
    logits = prefilled.logits
    decoder = Decoder(pipeline.segments, prefilled.caches)
    places = prompt.token_ids.size + prompt.rope_delta + np.arange(new - 1)
    cos, sin = pipeline.rope(np.broadcast_to(places, (3, new - 1)))
    for step in range(new - 1):
        if tokens is None:
            chosen.append(int(logits.argmax()))
        row = pipeline.embedding(np.array(chosen[step : step + 1]))[0]
        logits = decoder.step(row, cos[step], sin[step])
        decoded.append(logits.copy())
    return Run(first, prefilled.kept, chosen, decoded)


def draw_clip(frames: int = FRAMES) -> NDArray[np.uint8]:
    """A film [frames, HEIGHT, WIDTH, 3] with what reduction looks for: a still background, a moving patch, a cut."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    still = np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, (x + y) % 256], -1)
    drawn = np.stack([still if t < frames // 2 else 255 - still for t in range(frames)]).astype(np.uint8)
    for t, frame in enumerate(drawn):
        frame[20:60, 8 * t : 8 * t + 40] = (200, 40, 40)
    noise = np.random.default_rng(0).integers(0, 6, drawn.shape, np.uint8)
    clip: NDArray[np.uint8] = np.minimum(drawn, 249) + noise
    return clip
