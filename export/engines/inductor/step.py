"""A decode step of B rows in plain torch: a token of each, over caches of unequal lengths, in one call.

    hidden     [B, 1, D]             cos, sin   [B, 1, hd/2]        kv_len   [A*B], as decoder.py has it
    shown_j    [L, 0], no memory     past_*_j   [B, Hkv, C_j, hd]   -> hidden [B, 1, D] or logits [B, V]

The first L slots of a layer's caches are looked at, which is as many as its longest row has, rounded up to whole blocks
(SLOTS_AT_ONCE in runtime/backends/inductor/step.py); of those a row has not it sees nothing. Nothing that is computed
for a row depends on what runs beside it, or on how many do:

- Products. Libraries take other kernels for one row than for several, and MKL others for two than for eight, each with
  an order of sums of its own. A row more than there are is computed, a copy of the first, so that one row is never by
  itself; and on CPUs products in fp32 are oneDNN's (`linear`), which takes one kernel for any number from two on and
  costs little more for eight rows than for one. torch's own (`mm`) is MKL's there, eight rows of which cost several
  times one.
- Attention. The kernel adds up block by block of keys; whole blocks have the same shape in every call, and a block
  that a row has nothing in changes no bit of it. Queries of a head are filled up to an even number, of which MKL adds
  up each alike on every thread, and are in two parts at least: a product that is alone is split between threads.

All this is so by experience with these libraries and by no promise of theirs: tests compare every bit, and so does the
proof on each device (runtime/proof). Knows no compiler but for the one operator that it adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from framefusion.export.graphs.decoder import AttentionBlock, DecoderConfig, Segment, example_cache
from framefusion.export.graphs.graph_plan import (
    EXAMPLE_BATCH,
    EXAMPLE_CAPACITY,
    FREE,
    GraphModule,
    Signature,
    meta,
)
from framefusion.runtime.backends.inductor.step import shown_name
from framefusion.runtime.backends.kv_cache import cache_names

LINEAR = "linear"
MM = "mm"
QUERIES_AT_ONCE = 2
"""Of a head of keys: with an odd number MKL adds up otherwise on one thread than on another."""
BATCHED = ("cpu",)
"""Devices whose engines hold a step: on CUDA, where a mask would mean the math path, requests take turns."""
_ATEN: Any = torch.ops.aten


@torch.library.custom_op("inductor_step::product", mutates_args=())
def product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [R, in] @ weight [in, out] by oneDNN, which reads the weight where it lies.  -> [R, out]"""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight.t(), None, "none", [], "")
    return result


@product.register_fake
def _(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1]))


def product_form(dtype: torch.dtype, device: str) -> str:
    """Which products a step has; half types are oneDNN's in torch's own, too."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return LINEAR if device == "cpu" and dtype == torch.float32 and has_onednn else MM


def replacements(form: str) -> dict[Any, Any]:
    """Operators of a traced step, and what is to stand in their place."""
    if form == MM:
        return {}
    _declare_lowering()
    return {_ATEN.matmul.default: _product}


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [B, 1, in] @ weight [in, out]"""
    result: Tensor = torch.ops.inductor_step.product(rows.flatten(0, -2), weight)
    return result.view(*rows.shape[:-1], weight.shape[1])


def _declare_lowering() -> None:
    """Tell inductor of the product. Its own wants the weight [out, in] in memory, and would copy it in each step."""
    from torch._inductor import ir, lowering, mkldnn_ir

    op = torch.ops.inductor_step.product.default
    if op in lowering.lowerings:
        return

    @lowering.register_lowering(op, type_promotion_kind=None)
    def _(rows: Any, weight: Any) -> Any:
        rows = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(rows))
        turned = ir.ExternKernel.realize_input(lowering.lowerings[_ATEN.permute.default](weight, [1, 0]))  # a view
        size = [*rows.get_size()[:-1], turned.get_size()[0]]
        layout = ir.FixedLayout(device=rows.get_device(), dtype=rows.get_dtype(), size=size)
        constants = [None, "none", [-1], ""]
        return ir.TensorBox.create(mkldnn_ir.LinearUnary(layout, [rows, turned], constants))


class Step(GraphModule):
    """One token of each of B rows through a segment.

    Args:
        segment: whose weights these are; it stays as it is. Scores are of no use behind a prompt, and not computed.
    """

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.config: DecoderConfig = segment.config
        self.plan = segment.plan
        self.blocks: nn.ModuleList = segment.blocks
        self.head = segment.head
        self.layers = sum(block.kind == "attention" for block in self.plan)

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_len: Tensor,
        shown: Sequence[Tensor],
        past: Sequence[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        """Hidden states or logits of the rows, then the caches: see the module's table."""
        rows = hidden.shape[0]
        lengths = kv_len.view(self.layers, rows)
        presents: list[Tensor] = []
        # 1. One row more than there are: a product of one alone would be another kernel's.
        hidden = _with_first(hidden)
        rope = (_with_first(cos), _with_first(sin))
        for block in self.blocks:
            if not isinstance(block, AttentionBlock):
                hidden = block(hidden)
                continue
            # 2. Attention is of the rows that there are, each over what it holds.
            slot = len(presents) // 2
            (query, key, value) = (part[:rows] for part in block.project(hidden, *rope))
            out, *present = attend(query, key, value, *past[slot], lengths[slot], shown[slot].shape[0])
            presents += present
            hidden = hidden + block.o(_with_first(out))
        result = hidden if self.head is None else self.head(hidden)
        return result[:rows], *presents

    def signature(self) -> Signature:
        """Any number of rows and of slots, and of each cache's slots any number that are looked at."""
        config = self.config
        batch = EXAMPLE_BATCH
        half = config.head_dim // 2
        layers = range(self.layers)
        slots = [EXAMPLE_CAPACITY + layer for layer in layers]
        arguments = (
            meta(batch, 1, config.hidden_size),
            meta(batch, 1, half),
            meta(batch, 1, half),
            meta(self.layers * batch, dtype=torch.int64),
            [meta(slots[layer] - 2, 0, dtype=torch.uint8) for layer in layers],
            [example_cache(config, slots[layer], batch) for layer in layers],
        )
        row = {0: FREE}
        shapes = (row, row, row, row, [row] * self.layers, [({0: FREE, 2: FREE},) * 2] * self.layers)
        names = ["hidden", "cos", "sin", "kv_len", *map(shown_name, layers), *cache_names("past", self.layers)]
        outputs = ["hidden_out" if self.head is None else "logits", *cache_names("present", self.layers)]
        return Signature(arguments, shapes, tuple(names), tuple(outputs))


def _with_first(rows: Tensor) -> Tensor:
    """[B, ...] -> [B + 1, ...], the first one twice."""
    return torch.cat((rows, rows[:1]))


def attend(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, lengths: Tensor, shown: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A token of each row over what the row holds with it.

    Args:
        query: [B, 1, H*hd]
        key: of the tokens, [B, 1, Hkv*hd]
        value: likewise
        past_key: [B, Hkv, C, hd]
        past_value: likewise
        lengths: of the rows, these tokens among them.  [B]
        shown: slots that are looked at, as many as the longest row has or more.

    Returns:
        [B, 1, H*hd], and the caches.
    """
    (rows, groups, _, width) = past_key.shape
    # 1. Each row's slot is its own: one index for row, head and slot.
    places = torch.arange(rows)[:, None], torch.arange(groups)[None], (lengths - 1)[:, None]
    keys = past_key.index_put(places, key.view(rows, groups, width))
    values = past_value.index_put(places, value.view(rows, groups, width))
    # 2. Heads that share keys are rows of one product. What a row has not is masked: its own block is all that counts.
    slots = torch.arange(shown)
    is_held = slots[None] < lengths[:, None]  # [B, L]
    mask = torch.where(is_held, 0.0, -torch.inf).to(query.dtype)[:, None, None]
    grouped = query.view(rows, groups, -1, width)
    shown_keys = keys[:, :, :shown]
    shown_values = values[:, :, :shown]
    if groups == 1:  # the kernel's work is divided by rows and heads: one row of one head is never alone
        grouped = in_two(grouped)
        shown_keys = shown_keys.expand(-1, 2, -1, -1)
        shown_values = shown_values.expand(-1, 2, -1, -1)
    queries = grouped.shape[2]
    grouped = nn.functional.pad(grouped, (0, 0, 0, -queries % QUERIES_AT_ONCE))
    flash = _ATEN._scaled_dot_product_flash_attention_for_cpu
    out = flash(grouped, shown_keys, shown_values, attn_mask=mask)[0][:, :, :queries]
    heads = query.shape[2] // width
    return out.reshape(rows, -1, width)[:, :heads].reshape(query.shape), keys, values


def in_two(queries: Tensor) -> Tensor:
    """[B, 1, n, hd] -> [B, 2, ceil(n / 2), hd], a row of zeros last where n is odd."""
    rows, _, count, width = queries.shape
    return nn.functional.pad(queries, (0, 0, 0, count % 2)).reshape(rows, 2, -1, width)
