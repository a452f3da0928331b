"""The generic decoder of all families, cut anywhere between an attention and an MLP.

GQA, RoPE or M-RoPE (the tables come from outside), RMSNorm, SwiGLU, with or without biases and q/k norms. A
`Segment` is a run of half layers ("blocks"); it knows no checkpoint, no position rule and no budget.

Inputs of a segment, in order; B is 1, or free where the graph is batched, in which case rows beyond one decode a token:

    name        shape              dtype   when
    hidden      [B, S, D]          float   always
    cos, sin    [B, S, hd/2]       float   it has attention
    kv_len      [A*B]              int64   it has attention: tokens in each cache once this chunk is in it, all rows of
                                           the first layer, then of the second: [A] for one row. All layers of a
                                           row have one length, but where a graph reduces inside
    previous    [S]                int64   scores: previous token of the track, -1 for none
    last        [1]                int64   scores or head: index of the last real token
    past_key_j, past_value_j       [B, Hkv, C_j, hd]   one pair for each attention block j, int8 where caches are
    deepstack   [n, S, D]          float   n of its MLPs are those of the first layers, which add visual features

Outputs: hidden [B, S, D] or logits fp32 [B, vocab]; similarity and importance, fp32 [S], with scores; present_key_j and
present_value_j, which a runtime binds to the memory of the past ones. float is the module's own type.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

import framefusion.ops.kernels
import framefusion.ops.kv_cache  # noqa: F401  (registers the ops, as does the one before)
from framefusion.export.graphs.graph_plan import (
    EXAMPLE_BATCH,
    EXAMPLE_CAPACITY,
    EXAMPLE_LENGTH,
    FREE,
    GraphModule,
    Signature,
    meta,
)
from framefusion.export.graphs.layers import JoinedLinear, RMSNorm, linear, weight
from framefusion.export.quantization.float8 import WeightFormat
from framefusion.runtime.backends.kv_cache import cache_names


@dataclass(frozen=True)
class DecoderConfig:
    """Geometry of a decoder, read from the checkpoint."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...] | None = None  # channels (of head_dim / 2) for time, height, width
    mrope_interleaved: bool = False  # one channel after the other, instead of three blocks
    deepstack: int = 0  # first layers behind which visual features are added to the hidden states (Qwen3-VL)
    qkv_bias: bool = True
    out_bias: bool = False  # of the projection behind the attention (Llama and Qwen3 with attention_bias)
    mlp_bias: bool = False  # of gate, up and down (Llama)
    qk_norm: bool = False  # RMSNorm of each head before RoPE (Qwen3)
    importance_rows: int = 1  # query rows the importance is averaged over; a fact of the family
    kv_cache_dtype: str | None = None  # "int8": codes by scales that are weights; None: caches in the graph's type


@dataclass(frozen=True)
class Block:
    """Half of a layer: its attention or its MLP."""

    kind: Literal["attention", "mlp"]
    layer: int
    deepstack: bool = False  # adds visual features: an MLP of the first layers, where the family has them
    formats: tuple[tuple[str, WeightFormat], ...] = ()  # of its linear maps, by names of LINEARS; others are floats


LINEARS: Mapping[str, tuple[str, ...]] = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
"""Kind of a block -> its linear maps."""


Formats = Mapping[str, WeightFormat]
"""Linear map of a block -> format of its weights; what is not there is in floats."""
NO_FORMATS: Formats = MappingProxyType({})


class AttentionBlock(nn.Module):
    """Input norm, attention over the cache, residual: [B, S, D] -> the same shape."""

    def __init__(self, config: DecoderConfig, formats: Formats = NO_FORMATS) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.q = linear(config.hidden_size, width, config.qkv_bias, formats.get("q"))
        self.k = linear(config.hidden_size, kv_width, config.qkv_bias, formats.get("k"))
        self.v = linear(config.hidden_size, kv_width, config.qkv_bias, formats.get("v"))
        self.qkv: JoinedLinear | None = None  # in place of the three, where a compiler wants one product
        self.o = linear(width, config.hidden_size, config.out_bias, formats.get("o"))
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        scale = (1, config.num_kv_heads, 1, config.head_dim)
        self.key_scale = weight(*scale) if config.kv_cache_dtype else None
        self.value_scale = weight(*scale) if config.kv_cache_dtype else None

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key after RoPE, and value, of hidden [B, S, D]."""
        normed = self.norm(hidden)
        if self.qkv is None:
            query = self.q(normed)
            key = self.k(normed)
            value = self.v(normed)
        else:
            (query, key, value) = self.qkv(normed)
        if self.q_norm is not None and self.k_norm is not None:
            query = self.q_norm(query.unflatten(-1, (self.num_heads, -1))).flatten(-2)
            key = self.k_norm(key.unflatten(-1, (self.num_kv_heads, -1))).flatten(-2)
        rotary = torch.ops.framefusion.rotary
        return rotary(query, cos, sin, self.num_heads), rotary(key, cos, sin, self.num_kv_heads), value

    def forward(
        self, hidden: Tensor, rope: tuple[Tensor, Tensor], kv_len: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return hidden, (query, key) for the importance, and the present caches."""
        query, key, value = self.project(hidden, *rope)
        heads = (self.num_heads, self.num_kv_heads)
        if self.key_scale is None:
            attended = torch.ops.framefusion.cache_attention(query, key, value, *past, kv_len, *heads)
        else:
            scales = (self.key_scale, self.value_scale)
            attended = torch.ops.framefusion.quantized_cache_attention(
                query, key, value, *past, *scales, kv_len, *heads
            )
        (out, present_key, present_value) = attended
        return hidden + self.o(out), (query, key), (present_key, present_value)


class MlpBlock(nn.Module):
    """Post-attention norm, down(swish(gate) * up), residual: [B, S, D] -> the same shape."""

    def __init__(self, config: DecoderConfig, formats: Formats = NO_FORMATS) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate = linear(config.hidden_size, config.intermediate_size, config.mlp_bias, formats.get("gate"))
        self.up = linear(config.hidden_size, config.intermediate_size, config.mlp_bias, formats.get("up"))
        self.gate_up: JoinedLinear | None = None  # in place of the two, where a compiler wants one product
        self.down = linear(config.intermediate_size, config.hidden_size, config.mlp_bias, formats.get("down"))

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, D] -> the same shape."""
        normed = self.norm(hidden)
        (gate, up) = (self.gate(normed), self.up(normed)) if self.gate_up is None else self.gate_up(normed)
        down: Tensor = self.down(torch.ops.framefusion.swish(gate, 1.0) * up)
        return hidden + down


class Head(nn.Module):
    """Final norm and vocabulary projection of the last token's hidden state."""

    def __init__(self, config: DecoderConfig, form: WeightFormat | None = None) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = linear(config.hidden_size, config.vocab_size, False, form)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, 1, D] -> logits [B, vocab], always fp32: sampling happens outside."""
        logits: Tensor = self.lm_head(self.norm(hidden))[:, 0].float()
        return logits


class Segment(GraphModule):
    """A run of blocks, optionally ending in scores (similarity, importance) or in the head."""

    def __init__(
        self,
        config: DecoderConfig,
        blocks: Sequence[Block],
        *,
        scores: bool,
        head: bool,
        head_format: WeightFormat | None = None,
        one_length: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.plan = tuple(blocks)
        self.one_length = one_length
        self.scores = scores
        kinds = {"attention": AttentionBlock, "mlp": MlpBlock}
        self.blocks = nn.ModuleList(kinds[block.kind](config, dict(block.formats)) for block in blocks)
        self.head = Head(config, head_format) if head else None
        self.is_batched = False

    def batched(self) -> Segment:
        """The same segment, which decodes one token of each of B rows as well."""
        batched = copy.copy(self)
        batched.is_batched = True
        return batched

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_len: Tensor,
        previous: Tensor | None,
        last: Tensor | None,
        past: Sequence[tuple[Tensor, Tensor]],
        deepstack: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Hidden states, scores or logits, then the caches: inputs and outputs are in the module's table."""
        presents: list[Tensor] = []
        final = len(self.blocks) - 1
        added = 0
        lengths = self._lengths(kv_len, len(past))
        for index, block in enumerate(self.blocks):
            if self.head is not None and index == final and last is not None:
                hidden = hidden.index_select(1, last)  # only this token's logits are wanted: its MLP is enough
                deepstack = None if deepstack is None else deepstack.index_select(1, last)
            if isinstance(block, AttentionBlock):
                slot = len(presents) // 2
                hidden, states, present = block(hidden, (cos, sin), lengths[slot], past[slot])
                presents += present
            else:
                hidden = block(hidden)
                if self.plan[index].deepstack and deepstack is not None:
                    hidden = hidden + deepstack[added : added + 1]
                    added = added + 1
        if self.head is not None:
            return self.head(hidden), *presents
        if not self.scores:
            return hidden, *presents
        return hidden, *score_tokens(self.config, hidden, states, previous, last), *presents

    def _lengths(self, kv_len: Tensor, layers: int) -> list[Tensor]:
        """Those of each layer, [B], as views.  [A*B]

        Where they are equal all layers read the first one's. What a dialect makes of them, five small operators a
        layer, is then the same in each, and whoever runs the graph works it out once.
        """
        if layers <= 1:
            return [kv_len] * layers
        if self.one_length:
            return [kv_len.view(layers, -1)[0]] * layers
        if not self.is_batched:
            return [kv_len[slot : slot + 1] for slot in range(layers)]
        return list(kv_len.view(layers, -1).unbind(0))

    def signature(self) -> Signature:
        """Any number of tokens and of slots in each cache, and of rows where it is batched."""
        config = self.config
        half = config.head_dim // 2
        batch = EXAMPLE_BATCH if self.is_batched else 1
        rows = {0: FREE} if self.is_batched else {}
        layers = sum(block.kind == "attention" for block in self.plan)
        deepstack = sum(block.deepstack for block in self.plan)
        ends = self.scores or self.head is not None
        # 1. the module's table, an argument that this segment lacks as None
        arguments: list[Any] = [
            meta(batch, EXAMPLE_LENGTH, config.hidden_size),
            meta(batch, EXAMPLE_LENGTH, half),
            meta(batch, EXAMPLE_LENGTH, half),
            meta(layers * batch, dtype=torch.int64),
            meta(EXAMPLE_LENGTH, dtype=torch.int64) if self.scores else None,
            meta(1, dtype=torch.int64) if ends else None,
            [example_cache(config, EXAMPLE_CAPACITY + j, batch) for j in range(layers)],
        ]
        tokens = rows | {1: FREE}
        shapes: list[Any] = [tokens, tokens, tokens, rows or None, {0: FREE} if self.scores else None, None]
        shapes.append([tuple(rows | slots for slots in CACHE_SHAPES)] * layers)
        # 2. the names of those that are there, in the same order
        inputs = ["hidden", "cos", "sin", "kv_len"]
        inputs += ["previous"] * self.scores + ["last"] * ends + cache_names("past", layers)
        outputs = ["hidden_out" if self.head is None else "logits"] + ["similarity", "importance"] * self.scores
        outputs += cache_names("present", layers)
        if deepstack:
            arguments.append(meta(deepstack, EXAMPLE_LENGTH, config.hidden_size))
            shapes.append({1: FREE})
            inputs.append("deepstack")
        # 3. the free axes
        axes: dict[str, dict[int, str]]
        axes = {name: {1: "tokens"} for name in ("hidden", "cos", "sin", "deepstack", "hidden_out")}
        axes |= {name: {0: "tokens"} for name in ("previous", "similarity", "importance")}
        axes |= cache_axes(layers)
        if self.is_batched:
            caches = [*cache_names("past", layers), *cache_names("present", layers)]
            for name in ("hidden", "cos", "sin", "hidden_out", "logits", *caches):
                axes[name] = {0: BATCH} | axes.get(name, {})
            axes["kv_len"] = {0: "lengths"}
        return Signature(tuple(arguments), tuple(shapes), tuple(inputs), tuple(outputs), axes)


BATCH = "batch"
"""Name of the free axis of rows, by which whoever opens a graph knows that it is batched."""

CACHE_SHAPES = ({2: FREE}, {2: FREE})
"""Dynamic shapes of one layer's key and value cache: the slots are free, and each layer has its own number of them."""


def example_cache(config: DecoderConfig, capacity: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Key and value cache [batch, Hkv, capacity, hd] of one layer, as example inputs."""
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    dtype = torch.int8 if config.kv_cache_dtype else torch.float32
    return meta(*shape, dtype=dtype), meta(*shape, dtype=dtype)


def cache_axes(layers: int) -> dict[str, dict[int, str]]:
    """Names of the free axes of all caches: `capacity_j` slots for layer j."""
    names = [name for prefix in ("past", "present") for name in cache_names(prefix, layers)]
    return {name: {2: f"capacity_{name.rpartition('_')[2]}"} for name in names}


def score_tokens(
    config: DecoderConfig, hidden: Tensor, states: tuple[Tensor, Tensor], previous: Tensor | None, last: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Similarity and importance, each fp32 [S], of the tokens after an attention."""
    query, key = states
    return (
        torch.ops.framefusion.similarity(hidden, previous),
        torch.ops.framefusion.importance(
            query, key, last, config.importance_rows, config.num_heads, config.num_kv_heads
        ),
    )
