"""Qwen2-VL's vision tower: its geometry and where its weights are in a checkpoint."""

from __future__ import annotations

import torch

from framefusion.errors import CheckpointError
from framefusion.export.checkpoint import Checkpoint
from framefusion.export.families.reading import required
from framefusion.export.graph.qwen2_vl_tower import Tower, TowerConfig
from framefusion.export.weights import Source

PREFIXES = ("model.visual.", "visual.")  # newest first


def tower(checkpoint: Checkpoint) -> tuple[Tower, dict[str, Source]]:
    """The tower on the meta device, and the sources of its parameters."""
    prefix = _prefix(checkpoint)
    config = tower_config(checkpoint)
    with torch.device("meta"):
        module = Tower(config)
    return module, tower_sources(prefix, config)


def tower_config(checkpoint: Checkpoint) -> TowerConfig:
    """Geometry from config.json; widths from the tensors themselves."""
    vision, prefix = required(checkpoint.config, "vision_config", checkpoint), _prefix(checkpoint)
    embed_dim, *patch = checkpoint.shape(f"{prefix}patch_embed.proj.weight")
    width = 1
    for size in patch:
        width *= size
    return TowerConfig(
        depth=int(required(vision, "depth", checkpoint)),
        embed_dim=embed_dim,
        num_heads=int(required(vision, "num_heads", checkpoint)),
        mlp_width=checkpoint.shape(f"{prefix}blocks.0.mlp.fc1.weight")[0],
        patch_width=width,
        merge_size=int(vision.get("spatial_merge_size", 2)),
        out_width=checkpoint.shape(f"{prefix}merger.mlp.2.weight")[0],
    )


def tower_sources(prefix: str, config: TowerConfig) -> dict[str, Source]:
    """Parameter of `Tower` -> place in the checkpoint; q, k and v are stacked there, in this order."""
    sources = {
        "patch_embed.weight": Source(f"{prefix}patch_embed.proj.weight", flatten=True, transpose=True),
        "merger_norm.weight": Source(f"{prefix}merger.ln_q.weight"),
        "merger_norm.bias": Source(f"{prefix}merger.ln_q.bias"),
    }
    for name, key in (("merger_fc1", "merger.mlp.0"), ("merger_fc2", "merger.mlp.2")):
        sources |= _linear(name, prefix + key)
    for index in range(config.depth):
        ours, theirs = f"blocks.{index}.", f"{prefix}blocks.{index}."
        for norm in ("norm1", "norm2"):
            sources[f"{ours}{norm}.weight"] = Source(f"{theirs}{norm}.weight")
            sources[f"{ours}{norm}.bias"] = Source(f"{theirs}{norm}.bias")
        for position, part in enumerate("qkv"):
            rows = (position * config.embed_dim, (position + 1) * config.embed_dim)
            sources |= _linear(ours + part, f"{theirs}attn.qkv", rows)
        for name, key in (("proj", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")):
            sources |= _linear(ours + name, theirs + key)
    return sources


def _linear(name: str, key: str, rows: tuple[int, int] | None = None) -> dict[str, Source]:
    return {
        f"{name}.weight": Source(f"{key}.weight", rows, transpose=True),
        f"{name}.bias": Source(f"{key}.bias", rows),
    }


def _prefix(checkpoint: Checkpoint) -> str:
    for prefix in PREFIXES:
        if f"{prefix}patch_embed.proj.weight" in checkpoint:
            return prefix
    tried = ", ".join(f"{prefix}patch_embed.proj.weight" for prefix in PREFIXES)
    raise CheckpointError(f"{checkpoint.folder} has no vision tower under any known name ({tried})")
