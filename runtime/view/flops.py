"""Floating point operations of a prefill, from the geometry of an LLM and the tokens in each layer: nothing is run."""

from __future__ import annotations

from collections.abc import Sequence

from framefusion.runtime.format.manifest import ModelRecord


def layer_flops(model: ModelRecord, attended: int, through_mlp: int) -> float:
    """Floating point operations of one layer: projections and causal attention of some tokens, MLP of others."""
    heads = model.num_heads * model.head_dim
    projections = 2 * model.hidden_size * (2 * heads + 2 * model.num_kv_heads * model.head_dim)
    attention = 2 * 2 * heads * (attended + 1) / 2
    mlp = 2 * 3 * model.hidden_size * model.intermediate_size
    return attended * (projections + attention) + through_mlp * mlp


def prefill_flops(model: ModelRecord, lengths: Sequence[int]) -> float:
    """Operations of a prefill whose layer i sees lengths[i] tokens; the last MLP and the head see one token."""
    total = 2.0 * model.hidden_size * model.vocab_size
    for layer, length in enumerate(lengths):
        through_mlp = lengths[layer + 1] if layer + 1 < len(lengths) else 1
        total += layer_flops(model, length, through_mlp)
    return total
