"""Codes of a decoder's weights by films: layer by layer, by the rows that enter each matrix behind quantized layers.

    films, questions -> prompts with the answers of the model in floats behind them (calibration_prompts.py)
          -> prefill with the bundle's reduction, each prompt in a thread
          -> they meet before every half layer: its floats are read, its matrices quantized one after the other by what
             enters them, all prompts run through the result -> next half layer

Rows are those that the layers are given: of reduced prompts, and of answers over what the reduction left. The token of
a decode step sees what is kept of all before it. So its rows are those of a prefill in which it stands behind the
prompt and decides nothing: importance is that of the prompt's last token.

All threads wait for each other, one computes at a time and in the order of the prompts: the same films give the same
codes. In memory are the hidden states and caches of all prompts, one half layer in fp32, and X^T X of one matrix
(feedback.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from framefusion.errors import BudgetError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.weights import AnySource, read_parameter
from framefusion.export.eager.backend import EagerBackend, Load
from framefusion.export.eager.calibration_prompts import (
    CalibrationPrompt,
    answered_rows,
    digests_of,
    texts_digest,
)
from framefusion.export.eager.pipeline import eager_loaders, in_fp32, uncompiled_bundle
from framefusion.export.graphs.decoder import Block, Segment
from framefusion.export.graphs.graph_plan import GraphModule, GraphPlan
from framefusion.export.graphs.layers import Linear
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.plan.weight_plan import parse_weights
from framefusion.export.quantization.blocks import BlockFormat
from framefusion.export.quantization.code_store import CodeStore
from framefusion.export.quantization.feedback import Gram, feed_back
from framefusion.export.quantization.recipes import Made, Quantizer
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.request import Stopwatch

TOGETHER = {"attention": (("q", "k", "v"), ("o",)), "mlp": (("gate", "up"), ("down",))}
"""Kind of a half layer -> its linear maps, those of the same inputs together, in the order of the computation."""

_LAST = 5  # place of `last` among the arguments of a segment
Choose = Callable[[Gram, torch.dtype], Quantizer]
"""What chooses codes, for the rows that enter a matrix and the type of scales."""


def by_feedback(gram: Gram, dtype: torch.dtype) -> Quantizer:
    """Error feedback."""
    return partial(feed_back, dtype=dtype, gram=gram)


def calibrated_codes(
    checkpoint: Checkpoint,
    options: BuildOptions,
    prompts: Sequence[CalibrationPrompt],
    folder: Path,
    doing: Callable[[str], object] = lambda _: None,
    choose: Choose = by_feedback,
) -> tuple[BuildOptions, CodeStore]:
    """Choose the codes of a build's weights by films.

    Args:
        checkpoint: of floats.
        options: of the build, with `weights`.
        prompts: of the kind the bundle is for, see `calibration_prompts.read_prompts`.
        folder: empty; the codes stay in it, about a byte a weight.
        doing: called with what runs now.
        choose: see `Choose`.

    Returns:
        the options of the build, which name the films, and the codes.

    Raises:
        BudgetError: no film was given, or this build chooses no codes.
        VideoError: a film cannot be read.
        PromptError: a prompt is longer than the bundle takes.
    """
    if not prompts:
        raise BudgetError("0 films to calibrate with: give one or more films of the kind the bundle is for")
    if parse_weights(options.weights) is None:
        raise BudgetError(f"--calibrate chooses codes, and --weights {options.weights} has none to choose: give int4")
    # 1. the same model in floats, reduced as the bundle will be; a schedule, by the policy that it stands for
    adaptive = replace(options, reduction="adaptive", buckets=None, merge_shares=None, prune_layer=None)
    plan = BuildPlan(checkpoint, adaptive if options.reduction == "fixed" else options)
    floats = plan.in_floats
    assert floats is not None  # codes are chosen
    digests = digests_of(prompts)
    store = CodeStore(folder, digests, texts=texts_digest(prompts), prompts=len(prompts))
    with TemporaryDirectory(dir=folder) as parts:
        bundle = in_fp32(uncompiled_bundle(floats, Path(parts) / "parts"), floats)
        # 2. what the prompts put into the decoder, and what it answers
        prepared = answered_rows(floats, bundle, prompts, doing)
        # 3. all of them through all layers, quantized as they are reached
        lockstep = _Lockstep(plan, floats, store, choose, doing, [item.answer for item in prepared])
        pipeline = Pipeline(bundle, EagerBackend(lockstep.loaders(eager_loaders(floats, streamed=True))))
        lockstep.run(
            [partial(pipeline.prefill, item.prompt, item.rows, item.request, Stopwatch()) for item in prepared]
        )
    answers = sum(item.answer for item in prepared)
    named = replace(options, calibrated_by=digests)
    return named, replace(store, rows=lockstep.rows, answer_rows=answers)


@dataclass
class _Arrival:
    """A film before a half layer, or at its end."""

    film: int
    half: _Half | None
    arguments: tuple[Any, ...] = ()
    failure: BaseException | None = None


@dataclass(frozen=True)
class _Half:
    """A half layer of a segment in floats.

    Attributes:
        module: on the meta device while no film is in it.
        forward: of the module.
        block: what it is.
        prefix: of its parameters in the graph.
        sources: of the graph's parameters, floats.
        formats: of its matrices.
    """

    module: nn.Module
    forward: Callable[..., Any]
    block: Block
    prefix: str
    sources: Mapping[str, AnySource]
    formats: dict[str, BlockFormat]


class _Lockstep:
    """Films that wait for each other before every half layer, where its matrices are quantized.

    Args:
        plan: with the formats.
        floats: the same in floats.
        store: gets the codes.
        choose: see `Choose`.
        doing: called with what runs now.
        answers: tokens of the answer behind each prompt.
    """

    def __init__(
        self,
        plan: BuildPlan,
        floats: BuildPlan,
        store: CodeStore,
        choose: Choose,
        doing: Callable[[str], object],
        answers: Sequence[int],
    ) -> None:
        self.rows = 0
        self._plan = plan
        self._floats = floats
        self._store = store
        self._choose = choose
        self._doing = doing
        self._answers = answers
        self._arrivals: SimpleQueue[_Arrival] = SimpleQueue()
        self._replies: list[SimpleQueue[Any]] = []
        self._films: dict[int, int] = {}  # thread -> film

    def loaders(self, loaders: Mapping[str, Load]) -> Mapping[str, Load]:
        """The same loaders, those of segments with half layers that films meet in."""
        graphs = [graph for graph in self._floats.graphs if graph.role == "both"]
        modules = {
            graph.name: self._module(graph, segment.blocks)
            for graph, segment in zip(graphs, self._plan.segments, strict=True)
        }
        return {**loaders, **{name: partial(_same, module) for name, module in modules.items()}}

    def _module(self, graph: GraphPlan, blocks: Sequence[Block]) -> GraphModule:
        """The module of a segment without weights, whose half layers wait for all films."""
        module = graph.module()
        assert isinstance(module, Segment)
        for index, part in enumerate(module.blocks):
            block = blocks[index]
            half = _Half(part, part.forward, block, f"blocks.{index}.", graph.sources, dict(block.formats))
            part.forward = partial(self._meet, half)
        if module.head is None:
            module.register_forward_pre_hook(self._before_the_answer)
        else:  # nobody reads logits, and all tokens go through the last half layer
            module.register_forward_pre_hook(_keep_all)
            module.head.forward = partial(_no_logits, module.config.vocab_size)  # type: ignore[method-assign]
        return module

    def _before_the_answer(self, _segment: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """A segment's arguments with the prompt's last token as `last`, by which the reduction decides."""
        return decided_before(arguments, self._answers[self._films[get_ident()]])

    def run(self, prefills: Sequence[Callable[[], object]]) -> None:
        """Run all films to their end.

        Raises:
            whatever a film raised.
        """
        self._replies = [SimpleQueue() for _ in prefills]
        threads = [Thread(target=self._film, args=item, daemon=True) for item in enumerate(prefills)]
        for thread in threads:
            thread.start()
        try:
            while self._advance(len(threads)):
                pass
        except BaseException as error:
            for reply in self._replies:
                reply.put(error)
            raise
        for thread in threads:
            thread.join()

    def _film(self, film: int, prefill: Callable[[], object]) -> None:
        """The life of a thread."""
        self._films[get_ident()] = film
        try:
            prefill()
            self._arrivals.put(_Arrival(film, None))
        except BaseException as error:
            self._arrivals.put(_Arrival(film, None, failure=error))

    def _meet(self, half: _Half, *arguments: Any) -> Any:
        """In a film's thread: wait for the others, and for what comes of a half layer."""
        film = self._films[get_ident()]
        self._arrivals.put(_Arrival(film, half, arguments))
        result = self._replies[film].get()
        if isinstance(result, BaseException):
            raise result
        return result

    @torch.no_grad()
    def _advance(self, films: int) -> bool:
        """Wait for all films, and take them through a half layer; False at the end."""
        arrivals = sorted((self._arrivals.get() for _ in range(films)), key=lambda arrival: arrival.film)
        for arrival in arrivals:
            if arrival.failure is not None:
                raise arrival.failure
        half = arrivals[0].half
        if half is None:
            return False
        assert all(arrival.half is half for arrival in arrivals)
        self._doing(f"layer {half.block.layer + 1} of {self._plan.config.num_layers}, {half.block.kind}")
        self._load(half)
        self._quantize(half, [arrival.arguments for arrival in arrivals])
        results = [half.forward(*arrival.arguments) for arrival in arrivals]
        half.module.to("meta")
        for arrival, result in zip(arrivals, results, strict=True):
            self._replies[arrival.film].put(result)
        return True

    def _load(self, half: _Half) -> None:
        """Its floats."""
        half.module.to_empty(device="cpu")
        for name, parameter in half.module.named_parameters():
            source = half.sources[half.prefix + name]
            parameter.data = read_parameter(self._plan.checkpoint, source, tuple(parameter.shape), torch.float32)

    def _quantize(self, half: _Half, arguments: Sequence[tuple[Any, ...]]) -> None:
        """Replace its matrices with what their codes stand for, those of the same inputs together."""
        for names in TOGETHER[half.block.kind]:
            formats = {name: half.formats[name] for name in names if name in half.formats}
            if not formats:
                continue
            # 1. what enters them, behind those that are quantized already
            first = half.module.get_submodule(names[0])
            assert isinstance(first, Linear)
            gram = Gram(first.weight.shape[0])
            for values in arguments:
                self._count(half, first, gram, values)
            self.rows = self.rows or gram.rows
            # 2. their codes
            for name, form in formats.items():
                source = half.sources[f"{half.prefix}{name}.weight"]
                recipe = Made(source, form, self._plan.dtype, self._choose(gram, self._plan.dtype))
                blocks = recipe.blocks(self._plan.checkpoint)
                self._store.write(f"{half.block.layer}.{name}", blocks)
                linear = half.module.get_submodule(name)
                assert isinstance(linear, Linear)
                linear.weight.data = blocks.dequantize().T

    def _count(self, half: _Half, linear: Linear, gram: Gram, arguments: tuple[Any, ...]) -> None:
        """Count in what enters a linear map of a half layer for one film."""
        if linear in (getattr(half.module, "q", None), getattr(half.module, "gate", None)):  # no need to go further
            gram.add(half.module.norm(arguments[0]))  # type: ignore[operator]
            return
        hook = linear.register_forward_pre_hook(lambda _, given: gram.add(given[0]))
        try:
            half.forward(*arguments)
        finally:
            hook.remove()


def _same(module: GraphModule) -> GraphModule:
    return module


def decided_before(arguments: tuple[Any, ...], answer: int) -> tuple[Any, ...]:
    """A segment's arguments with the last token before an answer of so many tokens as `last`: importance is its."""
    last = arguments[_LAST]
    return arguments if last is None else (*arguments[:_LAST], last - answer, *arguments[_LAST + 1 :])


def _keep_all(_segment: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A segment's arguments without `last`."""
    return (*arguments[:_LAST], None, *arguments[_LAST + 1 :])


def _no_logits(vocabulary: int, hidden: Tensor) -> Tensor:
    return hidden.new_zeros((hidden.shape[0], vocabulary))
