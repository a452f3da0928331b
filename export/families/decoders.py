"""The generic decoder of a checkpoint: its geometry, and where its parameters are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.weights import AnySource, Computed, Source
from framefusion.export.families.family import Family
from framefusion.export.families.reading import language
from framefusion.export.families.reading.configs import prefix_of, required, text_config
from framefusion.export.graphs.decoder import DecoderConfig
from framefusion.export.graphs.segments import SegmentPlan


def llm_prefix(checkpoint: Checkpoint, family: Family) -> str:
    """The prefix of the LLM's keys in this checkpoint; names changed between releases of transformers.

    Raises:
        CheckpointError: there is no embedding table under any of the family's prefixes.
    """
    key = f"{family.llm.names['embedding']}.weight"
    return prefix_of(checkpoint, key, family.llm.prefixes, "embedding table")


def embedding_key(checkpoint: Checkpoint, family: Family) -> str:
    """The key of the embedding table."""
    return f"{llm_prefix(checkpoint, family)}{family.llm.names['embedding']}.weight"


def head_key(checkpoint: Checkpoint, family: Family) -> str:
    """The key of the vocabulary projection: the embedding table where the head is tied.

    Raises:
        CheckpointError: there is no head, and config.json does not say that it is tied.
    """
    for key in family.llm.head_keys:
        if key in checkpoint:
            return key
    if not language.head_is_tied(checkpoint):
        tried = ", ".join(family.llm.head_keys)
        raise CheckpointError(
            f"{checkpoint.folder} has no {tried}, and tie_word_embeddings of config.json does not say that the "
            "embedding table is the head: the checkpoint is incomplete"
        )
    return embedding_key(checkpoint, family)


def decoder_config(checkpoint: Checkpoint, family: Family, num_layers: int | None = None) -> DecoderConfig:
    """Geometry of the decoder; biases and norms are read from which tensors exist.

    Args:
        checkpoint: of this family.
        family: its row.
        num_layers: take only the first layers, for a smoke test; None takes all.

    Raises:
        CheckpointError: config.json and the tensors do not agree, or the decoder is another one.
    """
    depth = stored_depth(checkpoint, family)
    language.check_llm(checkpoint)
    check_tables(checkpoint, family)
    config = text_config(checkpoint)
    heads = int(required(config, "num_attention_heads", checkpoint))
    hidden = int(required(config, "hidden_size", checkpoint))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    if heads % kv_heads or head_dim < 2 or head_dim % 2:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: {heads} num_attention_heads over {kv_heads} num_key_value_heads in "
            f"heads of {head_dim} are no geometry of attention: config.json is another one's"
        )
    theta, section, interleaved = language.rope(checkpoint, head_dim)
    if num_layers is not None and not 2 <= num_layers <= depth:
        raise CheckpointError(f"--num-decoder-layer {num_layers} is outside 2 .. {depth}, the layers of the checkpoint")
    first = f"{llm_prefix(checkpoint, family)}layers.0."
    names = family.llm.names
    biased = language.biased_slots(checkpoint, lambda slot: f"{first}{names[slot]}.bias" in checkpoint)
    return DecoderConfig(
        hidden_size=hidden,
        intermediate_size=int(required(config, "intermediate_size", checkpoint)),
        num_layers=num_layers or depth,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=checkpoint.shape(head_key(checkpoint, family))[0],
        rms_norm_eps=float(required(config, "rms_norm_eps", checkpoint)),
        rope_theta=theta,
        mrope_section=section,
        mrope_interleaved=interleaved,
        qkv_bias="attention.q" in biased,
        out_bias="attention.o" in biased,
        mlp_bias="mlp.gate" in biased,
        qk_norm=language.llm_class(checkpoint).qk_norm,
        importance_rows=family.importance_rows,
    )


def check_tables(checkpoint: Checkpoint, family: Family) -> None:
    """Refuse an embedding table and a head that are not of the size that config.json says.

    Raises:
        CheckpointError: naming vocab_size or hidden_size.
    """
    config = text_config(checkpoint)
    table = embedding_key(checkpoint, family)
    head = head_key(checkpoint, family)
    sizes = {"vocab_size": config.get("vocab_size"), "hidden_size": required(config, "hidden_size", checkpoint)}
    for key in dict.fromkeys((table, head)):
        shape = checkpoint.shape(key)
        if len(shape) != 2:
            raise CheckpointError(f"{key} has shape {shape}, a table of rows was expected: download the file again")
        if shape[1] != sizes["hidden_size"]:
            raise CheckpointError(
                f"{key} gives rows of {shape[1]}, hidden_size is {sizes['hidden_size']}: config.json is another one's"
            )
        if sizes["vocab_size"] is not None and shape[0] != sizes["vocab_size"]:
            raise CheckpointError(
                f"{checkpoint.folder}: {key} has {shape[0]} rows, config.json says vocab_size {sizes['vocab_size']}: "
                f"write {shape[0]} there if tokens were added, or save the model again after resizing both tables"
            )


def stored_depth(checkpoint: Checkpoint, family: Family) -> int:
    """Layers of the LLM, which config.json and the tensors must agree on.

    Raises:
        CheckpointError: they do not.
    """
    declared = int(required(text_config(checkpoint), "num_hidden_layers", checkpoint))
    stored = checkpoint.count_blocks(f"{llm_prefix(checkpoint, family)}layers.")
    if declared != stored:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json says num_hidden_layers {declared}, the weights are of {stored} layers: "
            "one of the two is of another model"
        )
    return declared


def decoder_sources(checkpoint: Checkpoint, family: Family, plan: SegmentPlan) -> dict[str, AnySource]:
    """Where each parameter of a segment is in the checkpoint."""
    prefix = llm_prefix(checkpoint, family)
    names = family.llm.names
    unpack = unpacking(checkpoint) if family.llm.packed_qkv else {}
    sources: dict[str, AnySource] = {}
    for index, block in enumerate(plan.blocks):
        for slot, name in names.items():
            kind, _, part = slot.partition(".")
            if kind == block.kind and part:
                key = f"{prefix}layers.{block.layer}.{name}"
                parameter = f"blocks.{index}.{part}"
                matrix = not part.endswith("norm")
                sources[f"{parameter}.weight"] = Source(f"{key}.weight", transpose=matrix)
                sources[f"{parameter}.bias"] = Source(f"{key}.bias")
                for kind_of in ("weight", "bias") if part in unpack else ():
                    sources[f"{parameter}.{kind_of}"] = Computed((f"{key}.{kind_of}",), unpack[part])
    if plan.head:
        sources["head.norm.weight"] = Source(f"{prefix}{names['norm']}.weight")
        sources["head.lm_head.weight"] = Source(head_key(checkpoint, family), transpose=True)
    return sources


def unpacking(checkpoint: Checkpoint) -> Mapping[str, Callable[[Tensor], Tensor]]:
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
