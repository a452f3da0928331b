"""The generic decoder of a checkpoint: its geometry, and where its parameters are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.export.checkpoint import Checkpoint
from framefusion.export.families.family import Family
from framefusion.export.families.reading import required, rope_scaling, rope_type, text_config
from framefusion.export.graph.decoder import DecoderConfig
from framefusion.export.segments import SegmentPlan
from framefusion.export.weights import AnySource, Computed, Source


def llm_prefix(checkpoint: Checkpoint, family: Family) -> str:
    """The prefix of the LLM's keys in this checkpoint; names changed between releases of transformers."""
    name = f"{family.llm.names['embedding']}.weight"
    for prefix in family.llm.prefixes:
        if prefix + name in checkpoint:
            return prefix
    tried = ", ".join(prefix + name for prefix in family.llm.prefixes)
    raise CheckpointError(f"{checkpoint.folder} has no embedding table under any known name ({tried})")


def embedding_key(checkpoint: Checkpoint, family: Family) -> str:
    """The key of the embedding table."""
    return f"{llm_prefix(checkpoint, family)}{family.llm.names['embedding']}.weight"


def head_key(checkpoint: Checkpoint, family: Family) -> str:
    """The key of the vocabulary projection: the embedding table where the head is tied."""
    for key in family.llm.head_keys:
        if key in checkpoint:
            return key
    if checkpoint.config.get("tie_word_embeddings", text_config(checkpoint).get("tie_word_embeddings")) is False:
        tried = ", ".join(family.llm.head_keys)
        raise CheckpointError(f"{checkpoint.folder} has no {tried}, and config.json says that the head is not tied")
    return embedding_key(checkpoint, family)


def decoder_config(checkpoint: Checkpoint, family: Family, num_layers: int | None = None) -> DecoderConfig:
    """Geometry of the decoder; biases and norms are read from which tensors exist.

    Args:
        checkpoint: of this family.
        family: its row.
        num_layers: take only the first layers, for a smoke test; None takes all.
    """
    config, prefix = text_config(checkpoint), llm_prefix(checkpoint, family)
    heads, hidden = required(config, "num_attention_heads", checkpoint), required(config, "hidden_size", checkpoint)
    theta, section, interleaved = _rope(config, checkpoint)
    depth = int(required(config, "num_hidden_layers", checkpoint))
    if num_layers is not None and not 2 <= num_layers <= depth:
        raise CheckpointError(f"--num-decoder-layer {num_layers} is outside 2 .. {depth}, the layers of the checkpoint")
    first = f"{prefix}layers.0."
    return DecoderConfig(
        hidden_size=int(hidden),
        intermediate_size=int(required(config, "intermediate_size", checkpoint)),
        num_layers=num_layers or depth,
        num_heads=int(heads),
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        vocab_size=checkpoint.shape(head_key(checkpoint, family))[0],
        rms_norm_eps=float(required(config, "rms_norm_eps", checkpoint)),
        rope_theta=theta,
        mrope_section=section,
        mrope_interleaved=interleaved,
        qkv_bias=f"{first}{family.llm.names['attention.q']}.bias" in checkpoint,
        qk_norm=f"{first}{family.llm.names['attention.q_norm']}.weight" in checkpoint,
        importance_rows=family.importance_rows,
    )


def _rope(config: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[float, tuple[int, ...] | None, bool]:
    """theta, M-RoPE sections and whether they are interleaved.

    They stand in `rope_parameters` since transformers 5, in `rope_theta` and `rope_scaling` before.
    """
    scaling = rope_scaling(config)
    theta = scaling.get("rope_theta") or required(config, "rope_theta", checkpoint)
    kind = rope_type(config)
    # "dynamic" is the plain rule up to max_position_embeddings, and no bundle is built for more: see plan.py.
    if kind not in ("default", "mrope", "dynamic"):
        raise CheckpointError(f"rope type {kind!r} is not supported, only default, mrope and dynamic are")
    section = scaling.get("mrope_section")
    return float(theta), tuple(map(int, section)) if section else None, bool(scaling.get("mrope_interleaved"))


def decoder_sources(checkpoint: Checkpoint, family: Family, plan: SegmentPlan) -> dict[str, AnySource]:
    """Where each parameter of a segment is in the checkpoint."""
    prefix, names = llm_prefix(checkpoint, family), family.llm.names
    unpack = _unpacking(checkpoint) if family.llm.packed_qkv else {}
    sources: dict[str, AnySource] = {}
    for index, block in enumerate(plan.blocks):
        for slot, name in names.items():
            kind, _, part = slot.partition(".")
            if kind == block.kind and part:
                key, parameter = f"{prefix}layers.{block.layer}.{name}", f"blocks.{index}.{part}"
                matrix = not part.endswith("norm")
                sources[f"{parameter}.weight"] = Source(f"{key}.weight", transpose=matrix)
                sources[f"{parameter}.bias"] = Source(f"{key}.bias")
                for kind_of in ("weight", "bias") if part in unpack else ():
                    sources[f"{parameter}.{kind_of}"] = Computed((f"{key}.{kind_of}",), unpack[part])
    if plan.head:
        sources["head.norm.weight"] = Source(f"{prefix}{names['norm']}.weight")
        sources["head.lm_head.weight"] = Source(head_key(checkpoint, family), transpose=True)
    return sources


def _unpacking(checkpoint: Checkpoint) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """q, k and v out of rows that stand by key-value head: its query heads, its key, its value (InternLM2)."""
    config = text_config(checkpoint)
    heads = int(required(config, "num_attention_heads", checkpoint))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    queries = heads // kv_heads

    def rows(chosen: slice) -> Callable[[Tensor], Tensor]:
        def unpack(packed: Tensor) -> Tensor:
            groups = packed.reshape(kv_heads, queries + 2, -1, *packed.shape[1:])
            taken: Tensor = groups[:, chosen].flatten(0, 2)
            return taken.T if taken.ndim == 2 else taken

        return unpack

    return {"q": rows(slice(queries)), "k": rows(slice(queries, queries + 1)), "v": rows(slice(queries + 1, None))}
