"""What every family reads from a checkpoint in the same way: decoder geometry, key prefixes, pixel limits, sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from framefusion.errors import CheckpointError
from framefusion.export.checkpoint import Checkpoint
from framefusion.export.families import Family
from framefusion.export.graph.decoder import DecoderConfig
from framefusion.export.segments import SegmentPlan
from framefusion.export.weights import Source
from framefusion.runtime.preprocess import Preprocessing
from framefusion.runtime.sampling import GenerationConfig
from framefusion.runtime.video import FrameSampling

EMBEDDING = "embed_tokens.weight"


def text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The LLM's part of config.json: nested in `text_config` since transformers 4.52, flat before."""
    nested = checkpoint.config.get("text_config")
    return nested if isinstance(nested, dict) else checkpoint.config


def required(config: Mapping[str, Any], key: str, checkpoint: Checkpoint) -> Any:
    """A value of the configuration that has no default."""
    if config.get(key) is None:
        raise CheckpointError(f"{checkpoint.folder}/config.json has no {key}: the checkpoint is incomplete")
    return config[key]


def llm_prefix(checkpoint: Checkpoint, family: Family) -> str:
    """The prefix of the LLM's keys in this checkpoint; names changed between releases of transformers."""
    for prefix in family.llm_prefixes:
        if prefix + EMBEDDING in checkpoint:
            return prefix
    tried = ", ".join(prefix + EMBEDDING for prefix in family.llm_prefixes)
    raise CheckpointError(f"{checkpoint.folder} has no embedding table under any known name ({tried})")


def head_key(checkpoint: Checkpoint, family: Family) -> str:
    """The key of the vocabulary projection: the embedding table where the head is tied."""
    for key in family.head_keys:
        if key in checkpoint:
            return key
    if text_config(checkpoint).get("tie_word_embeddings", checkpoint.config.get("tie_word_embeddings")) is False:
        tried = ", ".join(family.head_keys)
        raise CheckpointError(f"{checkpoint.folder} has no {tried}, and config.json says that the head is not tied")
    return llm_prefix(checkpoint, family) + EMBEDDING


def decoder_config(checkpoint: Checkpoint, family: Family, num_layers: int | None = None) -> DecoderConfig:
    """Geometry of the decoder; biases and norms are read from which tensors exist.

    Args:
        checkpoint: of this family.
        family: its row.
        num_layers: take only the first layers, for a smoke test; None takes all.
    """
    config, prefix = text_config(checkpoint), llm_prefix(checkpoint, family)
    heads, hidden = required(config, "num_attention_heads", checkpoint), required(config, "hidden_size", checkpoint)
    theta, section = _rope(config, checkpoint)
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
        qkv_bias=f"{first}{family.names['attention.q']}.bias" in checkpoint,
        qk_norm=f"{first}{family.names['attention.q_norm']}.weight" in checkpoint,
        importance_rows=family.importance_rows,
    )


def _rope(config: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[float, tuple[int, ...] | None]:
    """theta and M-RoPE sections, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or required(config, "rope_theta", checkpoint)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "mrope"):
        raise CheckpointError(f"rope type {kind!r} is not supported, only default and mrope are")
    section = scaling.get("mrope_section")
    return float(theta), tuple(map(int, section)) if section else None


def decoder_sources(checkpoint: Checkpoint, family: Family, plan: SegmentPlan) -> dict[str, Source]:
    """Where each parameter of a segment is in the checkpoint."""
    prefix = llm_prefix(checkpoint, family)
    sources: dict[str, Source] = {}
    for index, block in enumerate(plan.blocks):
        for slot, name in family.names.items():
            kind, _, part = slot.partition(".")
            if kind == block.kind:
                key, parameter = f"{prefix}layers.{block.layer}.{name}", f"blocks.{index}.{part}"
                matrix = not part.endswith("norm")
                sources[f"{parameter}.weight"] = Source(f"{key}.weight", transpose=matrix)
                sources[f"{parameter}.bias"] = Source(f"{key}.bias")
    if plan.head:
        sources["head.norm.weight"] = Source(f"{prefix}norm.weight")
        sources["head.lm_head.weight"] = Source(head_key(checkpoint, family), transpose=True)
    return sources


def preprocessing(checkpoint: Checkpoint, family: Family) -> Preprocessing:
    """Patch geometry, pixel limits and normalisation, as far as the checkpoint tells them; the family's otherwise.

    The limits of video_preprocessor_config.json count; those of preprocessor_config.json are for single images, and
    taken only where the checkpoint's own video file is absent and they are narrower.
    """
    video = checkpoint.read_optional_json("video_preprocessor_config.json")
    told = checkpoint.read_optional_json("preprocessor_config.json") | video
    known: dict[str, Any] = {
        name: int(told[name]) for name in ("patch_size", "merge_size", "temporal_patch_size") if told.get(name)
    } | {name: tuple(map(float, told[name])) for name in ("image_mean", "image_std") if told.get(name)}
    result, size = replace(family.preprocessing, **known), video.get("size") or {}
    low = video.get("min_pixels") or size.get("shortest_edge") or result.min_pixels
    high = video.get("max_pixels") or size.get("longest_edge") or result.max_pixels
    return replace(result, min_pixels=int(low), max_pixels=int(high))


def sampling(checkpoint: Checkpoint, family: Family) -> FrameSampling:
    """Frame sampling, as far as the checkpoint tells it; the family's otherwise."""
    video, result = checkpoint.read_optional_json("video_preprocessor_config.json"), family.sampling
    return replace(
        result,
        fps=float(video.get("fps") or result.fps),
        min_frames=int(video.get("min_frames") or result.min_frames),
        max_frames=int(video.get("max_frames") or result.max_frames),
    )


def generation(checkpoint: Checkpoint) -> GenerationConfig:
    """generation_config.json; the end tokens of config.json where it names none."""
    told = checkpoint.read_optional_json("generation_config.json")
    if told.get("eos_token_id") is None:
        told = told | {"eos_token_id": text_config(checkpoint).get("eos_token_id")}
    return GenerationConfig.from_dict(told)
