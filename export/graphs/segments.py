"""Where the decoder is cut. Reduction happens between an attention and its MLP, so segments run from MLP to attention.

    segment 0:      attention of layer 0                                   -> hidden, similarity, importance
    segment k:      MLP of layer k-1, attention of layer k                 -> hidden, similarity, importance
    last segment:   MLP of layer D, layers D+1 .. L-1, final norm, lm_head on the last token

Other reducers act at other calls: the decoder is cut only behind the attentions where the chosen one may act, and stays
whole for a method that is done before the LLM. Knows no weights and no targets.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from framefusion.export.graphs.decoder import Block, DecoderConfig, Segment
from framefusion.export.quantization.float8 import WeightFormat


@dataclass(frozen=True)
class SegmentPlan:
    """A run of blocks and how it ends.

    Attributes:
        name: of its folder in a bundle.
        blocks: in the order in which they run.
        scores: it ends in similarity and importance of the tokens, for a reduction.
        head: it ends in logits.
        head_format: of the vocabulary projection's weights; None: they are floats.
        one_length: nothing is reduced inside it, so that all its caches hold the same number of tokens.
    """

    name: str
    blocks: tuple[Block, ...]
    scores: bool
    head: bool
    head_format: WeightFormat | None = None
    one_length: bool = False

    @property
    def structure(self) -> Hashable:
        """Segments of equal structure share one traced graph."""
        blocks = tuple((block.kind, block.deepstack, block.formats) for block in self.blocks)
        return blocks, self.scores, self.head, self.head_format, self.one_length

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers whose attention, and so whose cache, this segment holds."""
        return tuple(block.layer for block in self.blocks if block.kind == "attention")

    @property
    def deepstack(self) -> int:
        """How many of its MLPs add visual features."""
        return sum(block.deepstack for block in self.blocks)


def segment_module(config: DecoderConfig, plan: SegmentPlan) -> Segment:
    """The torch module of a segment, on the meta device."""
    with torch.device("meta"):
        return Segment(
            config,
            plan.blocks,
            scores=plan.scores,
            head=plan.head,
            head_format=plan.head_format,
            one_length=plan.one_length,
        )


def half_layers(num_layers: int, deepstack: int = 0) -> tuple[Block, ...]:
    """All blocks of a decoder in order; the first `deepstack` layers add visual features after their MLPs."""
    return tuple(
        block
        for layer in range(num_layers)
        for block in (Block("attention", layer), Block("mlp", layer, deepstack=layer < deepstack))
    )


def whole_decoder(
    num_layers: int, name: str = "decoder", deepstack: int = 0, *, one_length: bool = False
) -> tuple[SegmentPlan, ...]:
    """The decoder as one segment: for a reduction in its graph, or with one length for one that is done before it."""
    return (SegmentPlan(name, half_layers(num_layers, deepstack), scores=False, head=True, one_length=one_length),)


def cut_after(num_layers: int, layers: Sequence[int], deepstack: int = 0) -> tuple[SegmentPlan, ...]:
    """Cut after the attention of these layers, ascending and one at least; a segment is named by its last one."""
    blocks = half_layers(num_layers, deepstack)
    ends = [2 * layer + 1 for layer in layers]
    starts = [0, *ends[:-1]]
    reduced = [
        SegmentPlan(f"layer{layer:02d}", blocks[start:end], scores=True, head=False, one_length=True)
        for layer, start, end in zip(layers, starts, ends, strict=True)
    ]
    return (*reduced, SegmentPlan("rest", blocks[ends[-1] :], scores=False, head=True, one_length=True))
