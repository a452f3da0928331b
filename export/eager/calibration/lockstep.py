"""Prompts that go through the layers together: before every half layer they wait for each other, and it is quantized.

    each prompt in a thread: prefill with a reduction ---> half layer: floats are read
                                                     all prompts of role "fit": X^T X of what enters each matrix
                                                     codes of each matrix, one after the other
                                                     all prompts through it  ---> next half layer

Prompts that are held out take no part in the choice. They go through the layers twice, once behind the codes that were
chosen and once behind those of the search alone, and what leaves the last layer stays. One thread computes at a time,
in the order of the prompts. Knows no film and no question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from threading import Thread, get_ident
from typing import Any, Literal

import torch
from torch import Tensor, nn

from framefusion.export.checkpoints.tensors.weights import AnySource, read_parameter
from framefusion.export.eager.backend import Load
from framefusion.export.graphs.decoder import Block, Segment
from framefusion.export.graphs.graph_plan import GraphModule, GraphPlan
from framefusion.export.graphs.layers import Linear
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.quantization.blocks import BlockFormat, BlockQuantized
from framefusion.export.quantization.code_store import CodeStore
from framefusion.export.quantization.feedback import Gram, feed_back
from framefusion.export.quantization.recipes import Made, Quantizer
from framefusion.export.quantization.search import search

TOGETHER = {"attention": (("q", "k", "v"), ("o",)), "mlp": (("gate", "up"), ("down",))}
"""Kind of a half layer -> its linear maps, those of the same inputs together, in the order of the computation."""
_LAST = 5  # place of `last` among the arguments of a segment
Choose = Callable[[Gram, torch.dtype], Quantizer]
"""What chooses codes, for the rows that enter a matrix and the type of scales."""
Role = Literal["fit", "chosen", "searched"]
"""Of a prompt: codes are chosen by its rows, or it goes through those codes, or through the search's, to judge them."""


def by_feedback(gram: Gram, dtype: torch.dtype) -> Quantizer:
    """Error feedback."""
    return partial(feed_back, dtype=dtype, gram=gram)


@dataclass(frozen=True)
class Lane:
    """A prompt on its way.

    Attributes:
        prefill: of the prompt with its answer behind it.
        answer: tokens of the answer.
        role: see `Role`.
    """

    prefill: Callable[[], object]
    answer: int
    role: Role = "fit"


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


class Lockstep:
    """Prompts that wait for each other before every half layer, where its matrices are quantized.

    Args:
        plan: with the formats.
        floats: the same in floats.
        store: gets the codes.
        choose: see `Choose`.
        doing: called with what runs now.
    """

    def __init__(
        self,
        plan: BuildPlan,
        floats: BuildPlan,
        store: CodeStore,
        choose: Choose,
        doing: Callable[[str], object],
    ) -> None:
        self.rows = 0
        self.left: dict[int, Tensor] = {}
        """Number of a prompt that is held out -> what leaves its last layer before the norm.  [answer + 1, D]"""
        self._plan = plan
        self._floats = floats
        self._store = store
        self._choose = choose
        self._doing = doing
        self._arrivals: SimpleQueue[_Arrival] = SimpleQueue()
        self._lanes: Sequence[Lane] = ()
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
            formats = {name: form for name, form in block.formats if isinstance(form, BlockFormat)}
            half = _Half(part, part.forward, block, f"blocks.{index}.", graph.sources, formats)
            part.forward = partial(self._meet, half)
        if module.head is None:
            module.register_forward_pre_hook(self._before_the_answer)
        else:  # nobody reads logits, and all tokens go through the last half layer
            module.register_forward_pre_hook(_keep_all)
            module.head.forward = partial(self._no_logits, module.config.vocab_size)  # type: ignore[method-assign]
        return module

    def _before_the_answer(self, _segment: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """A segment's arguments with the prompt's last token as `last`, by which the reduction decides."""
        return decided_before(arguments, self._lanes[self._films[get_ident()]].answer)

    def _no_logits(self, vocabulary: int, hidden: Tensor) -> Tensor:
        """In place of the head: of a prompt that is held out the rows stay that choose a token."""
        film = self._films[get_ident()]
        lane = self._lanes[film]
        if lane.role != "fit":
            self.left[film] = hidden[0, hidden.shape[1] - lane.answer - 1 :].clone()
        return hidden.new_zeros((hidden.shape[0], vocabulary))

    def run(self, lanes: Sequence[Lane]) -> None:
        """Run all prompts to their end.

        Raises:
            whatever a film raised.
        """
        self._lanes = lanes
        self._replies = [SimpleQueue() for _ in lanes]
        threads = [Thread(target=self._film, args=(film, lane.prefill), daemon=True) for film, lane in enumerate(lanes)]
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
        # 1. codes, by the rows of the prompts that they are fit to
        self._load(half)
        searched = self._quantize(half, self._arguments(arrivals, "fit"))
        # 2. every prompt through them, but for those that judge the search's
        results = {a.film: half.forward(*a.arguments) for a in arrivals if self._lanes[a.film].role != "searched"}
        for name, weight in searched.items():
            half.module.get_submodule(name).weight.data = weight
        results |= {a.film: half.forward(*a.arguments) for a in arrivals if self._lanes[a.film].role == "searched"}
        half.module.to("meta")
        for film, result in results.items():
            self._replies[film].put(result)
        return True

    def _arguments(self, arrivals: Sequence[_Arrival], role: Role) -> list[tuple[Any, ...]]:
        return [arrival.arguments for arrival in arrivals if self._lanes[arrival.film].role == role]

    def _load(self, half: _Half) -> None:
        """Its floats."""
        half.module.to_empty(device="cpu")
        for name, parameter in half.module.named_parameters():
            source = half.sources[half.prefix + name]
            parameter.data = read_parameter(self._plan.checkpoint, source, tuple(parameter.shape), torch.float32)

    def _quantize(self, half: _Half, arguments: Sequence[tuple[Any, ...]]) -> dict[str, Tensor]:
        """Replace its matrices with what their codes stand for, those of the same inputs together.

        Returns what the search's codes stand for by the names of the maps, where prompts are held out.
        """
        searched: dict[str, Tensor] = {}
        is_judged = any(lane.role == "searched" for lane in self._lanes)
        search_alone = partial(search, dtype=self._plan.dtype)
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
                assert isinstance(blocks, BlockQuantized)
                self._store.write(f"{half.block.layer}.{name}", blocks)
                linear = half.module.get_submodule(name)
                assert isinstance(linear, Linear)
                linear.weight.data = blocks.dequantize().T
                if is_judged:
                    by_search = replace(recipe, quantizer=search_alone).blocks(self._plan.checkpoint)
                    searched[name] = by_search.dequantize().T
        return searched

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
