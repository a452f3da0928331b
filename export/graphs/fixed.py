"""The prefill of the fixed mode: a whole decoder in one static graph that merges and prunes inside.

Inputs (T = max_text + max_visual, E reductions, A layers):

    hidden [1, T, D], cos and sin [1, T, hd/2]    padded at the right end
    kv_len [A] int64       tokens that enter each layer, padding included
    last [1] int64         index of the last real token
    label [T] int64        patch_type, -1 for text and padding
    order [T] int64        indices sorted by track, then time, text last
    drops [E] int64        tokens each reduction drops for this prompt
    past_key_j, past_value_j
    deepstack [n, T, D]    where the first n layers add visual features; they follow their tokens, by mean too

Outputs: logits [1, V], origin [T_last] int64 (place in the prompt of each token left), present caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from framefusion.export.graphs.decoder import (
    CACHE_SHAPES,
    AttentionBlock,
    DecoderConfig,
    Segment,
    cache_axes,
    example_cache,
)
from framefusion.export.graphs.graph_plan import EXAMPLE_CAPACITY, GraphModule, Signature, meta
from framefusion.export.graphs.segments import SegmentPlan, whole_decoder
from framefusion.ops import static_reduction
from framefusion.ops.static_reduction import TokenState
from framefusion.reduction.budget import FixedSchedule
from framefusion.runtime.backends.kv_cache import cache_names
from framefusion.runtime.format.manifest import FixedRecord


class FixedPrefill(GraphModule):
    """The decoder of `whole_decoder`, with the reductions of a schedule between its blocks.

    Args:
        config: geometry of the decoder.
        schedule: the reductions.
        record: sizes that it is built for.
        plan: all blocks as one segment, with the formats of their weights; None: all weights are floats.
    """

    decompositions = static_reduction.DECOMPOSITIONS

    def __init__(
        self, config: DecoderConfig, schedule: FixedSchedule, record: FixedRecord, plan: SegmentPlan | None = None
    ) -> None:
        super().__init__()
        plan = plan or whole_decoder(config.num_layers, deepstack=config.deepstack)[0]
        decoder = Segment(config, plan.blocks, scores=False, head=True, head_format=plan.head_format)
        # the attributes of the plain decoder, so that both graphs name the same weights
        self.blocks = decoder.blocks
        self.head = decoder.head
        self.config = config
        self.schedule = schedule
        self.record = record
        self.plan = plan.blocks
        self.deepstack = plan.deepstack

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_len: Tensor,
        last: Tensor,
        label: Tensor,
        order: Tensor,
        drops: Tensor,
        past: Sequence[tuple[Tensor, Tensor]],
        deepstack: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Logits, origin and caches: inputs and outputs are in the module's table."""
        # 1. all that follows a token when it is merged or pruned, in one state
        origin = torch.arange(hidden.shape[1], device=hidden.device)
        features = None if deepstack is None else deepstack.transpose(0, 1).flatten(1)  # [T, n*D]
        state = TokenState(beside(hidden[0], features), cos[0], sin[0], label, order, origin)
        # 2. call 0 comes before the first attention, call i behind the attention of layer i - 1
        state, last = self._merge(state, last, drops, call=0)
        presents: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if not isinstance(block, AttentionBlock):
                rows = state.hidden
                if index == len(self.blocks) - 1:
                    rows = rows.index_select(0, last)  # only this token's logits are wanted
                state = state._replace(hidden=self._mlp(index, rows))
                continue
            layer = index // 2
            rope = (state.cos[None], state.sin[None])
            rows, features = apart(state.hidden, self.config.hidden_size)
            out, (query, key), present = block(rows[None], rope, kv_len[layer : layer + 1], past[layer])
            presents += present
            state = state._replace(hidden=beside(out[0], features))
            state, last = self._merge(state, last, drops, call=layer + 1)
            if layer == self.schedule.prune_layer:
                state, last = self._prune(state, last, drops, query, key)
        # 3. one token is left: the last of the prompt
        assert self.head is not None
        return self.head(apart(state.hidden, self.config.hidden_size)[0][None]), state.origin, *presents

    def _mlp(self, index: int, rows: Tensor) -> Tensor:
        """Rows of hidden states and of features to come -> the same, less the features that were added."""
        width = self.config.hidden_size
        hidden, features = apart(rows, width)
        hidden = self.blocks[index](hidden[None])[0]
        if features is None or not self.plan[index].deepstack:
            return beside(hidden, features)
        added, features = apart(features, width)
        return beside(hidden + added, features)

    def _merge(self, state: TokenState, last: Tensor, drops: Tensor, call: int) -> tuple[TokenState, Tensor]:
        if call >= len(self.schedule.merge_shares):
            return state, last
        drop = drops[call : call + 1]
        length = state.hidden.shape[0] - self.record.drops[call]
        compared = state._replace(hidden=apart(state.hidden, self.config.hidden_size)[0])
        similarity = static_reduction.track_similarity(compared)
        state = static_reduction.merge_by_rank(state, similarity, drop, length, self.record.max_track)
        return state, last - drop

    def _prune(
        self, state: TokenState, last: Tensor, drops: Tensor, query: Tensor, key: Tensor
    ) -> tuple[TokenState, Tensor]:
        config = self.config
        drop = drops[-1:]
        scores = torch.ops.framefusion.importance(
            query, key, last, config.importance_rows, config.num_heads, config.num_kv_heads
        )
        length = state.hidden.shape[0] - self.record.drops[-1]
        return static_reduction.prune_by_rank(state, scores, drop, length), last - drop

    def signature(self) -> Signature:
        """All sizes are those of the record; only the cache capacities are free."""
        config = self.config
        record = self.record
        half = config.head_dim // 2
        layers = config.num_layers
        size = record.max_text + record.max_visual
        vectors = {"kv_len": layers, "last": 1, "label": size, "order": size, "drops": len(record.drops)}
        arguments: list[Any] = [
            meta(1, size, config.hidden_size),
            meta(1, size, half),
            meta(1, size, half),
            *(meta(length, dtype=torch.int64) for length in vectors.values()),
            [example_cache(config, size + EXAMPLE_CAPACITY + j) for j in range(layers)],
        ]
        shapes: list[Any] = [*[None] * 8, [CACHE_SHAPES] * layers]
        inputs = ["hidden", "cos", "sin", *vectors, *cache_names("past", layers)]
        if self.deepstack:
            arguments.append(meta(self.deepstack, size, config.hidden_size))
            shapes.append(None)
            inputs.append("deepstack")
        outputs = ("logits", "origin", *cache_names("present", layers))
        return Signature(tuple(arguments), tuple(shapes), tuple(inputs), outputs, cache_axes(layers))


def beside(hidden: Tensor, features: Tensor | None) -> Tensor:
    """[T, D] and [T, n*D] -> [T, (1+n)*D]: one row of all that merging averages. Without features the same tensor."""
    return hidden if features is None else torch.cat((hidden, features), -1)


def apart(rows: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """The first `width` columns, and the others if there are any."""
    return (rows, None) if rows.shape[-1] == width else (rows[:, :width], rows[:, width:])
