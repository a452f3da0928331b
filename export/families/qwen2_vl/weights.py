"""Qwen2-VL's vision tower: its geometry and where its weights are in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.weights import AnySource, Source
from framefusion.export.families.qwen2_vl.tower import Qwen2VLTower, TowerConfig
from framefusion.export.families.reading.configs import prefix_of, required, vision_config
from framefusion.export.families.towers import TowerPlan, head_width, run_of
from framefusion.export.families.vit import linear_sources, norm_sources
from framefusion.export.graphs.tower import Tower
from framefusion.runtime.media.tower_kinds import RopeSettings

PREFIXES = ("model.visual.", "visual.")  # newest first
ROPE_THETA = 10000.0
LINEARS: Mapping[str, str] = {"proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def tower(checkpoint: Checkpoint) -> TowerPlan:
    """The tower on the meta device, and the sources of its parameters."""
    config = tower_config(checkpoint)
    settings = RopeSettings(merge_size=config.merge_size)
    return plan_of(Qwen2VLTower, config, tower_sources(find_prefix(checkpoint), config), settings)


def plan_of(
    tower_of: Callable[[Any], Tower],
    config: TowerConfig,
    sources: Mapping[str, AnySource],
    settings: RopeSettings,
    *,
    deepstack: int = 0,
) -> TowerPlan:
    """What the towers of all Qwen-VL releases have in common."""
    with torch.device("meta"):
        module = tower_of(config)
    return TowerPlan(
        module,
        sources,
        settings,
        patch_width=config.patch_width,
        head_dim=config.head_dim,
        embed_dim=config.embed_dim,
        mlp_width=config.mlp_width,
        out_width=config.out_width,
        patches_per_token=config.merge_size**2,
        deepstack=deepstack,
    )


def tower_config(checkpoint: Checkpoint) -> TowerConfig:
    """Geometry from config.json; widths from the tensors themselves."""
    vision = vision_config(checkpoint)
    prefix = find_prefix(checkpoint)
    check_vision(vision, checkpoint, "quick_gelu")
    depth = int(required(vision, "depth", checkpoint))
    run_of(checkpoint, f"{prefix}blocks.", depth)
    embed_dim, *patch = checkpoint.shape(f"{prefix}patch_embed.proj.weight")
    heads = int(required(vision, "num_heads", checkpoint))
    head_width(checkpoint, embed_dim, heads)
    return TowerConfig(
        depth=depth,
        embed_dim=embed_dim,
        num_heads=heads,
        mlp_width=checkpoint.shape(f"{prefix}blocks.0.mlp.fc1.weight")[0],
        patch_width=math.prod(patch),
        merge_size=int(required(vision, "spatial_merge_size", checkpoint)),
        out_width=checkpoint.shape(f"{prefix}merger.mlp.2.weight")[0],
    )


def check_vision(vision: Mapping[str, Any], checkpoint: Checkpoint, activation: str) -> None:
    """Refuse a tower of Qwen-VL whose numbers are other than its graph's.

    Raises:
        CheckpointError: its activation, its colours or its RoPE are other ones.
    """
    rope = vision.get("rope_parameters") or {}
    known = {"hidden_act": (activation,), "in_channels": (3,), "in_chans": (3,), "temporal_patch_size": (2,)}
    facts: dict[str, tuple[Any, tuple[Any, ...]]] = {
        key: (vision.get(key, values[0]), values) for key, values in known.items()
    }
    facts["rope_theta"] = (rope.get("rope_theta", ROPE_THETA), (ROPE_THETA,))
    facts["rope_type"] = (rope.get("rope_type", "axial"), ("axial", "default"))
    for name, (value, values) in facts.items():
        if value not in values:
            raise CheckpointError(
                f"{checkpoint.folder}/config.json: {name} {value!r:.80} of vision_config is not supported, "
                f"{values[0]!r} is"
            )


def tower_sources(prefix: str, config: TowerConfig) -> dict[str, AnySource]:
    """Parameter of `Tower` -> place in the checkpoint; q, k and v are stacked there, in this order."""
    sources: dict[str, AnySource] = {
        "patch_embed.weight": Source(f"{prefix}patch_embed.proj.weight", flatten=True, transpose=True),
        **norm_sources("merger_norm", f"{prefix}merger.ln_q"),
    }
    for name, key in (("merger_fc1", "merger.mlp.0"), ("merger_fc2", "merger.mlp.2")):
        sources |= linear_sources(name, prefix + key)
    for index in range(config.depth):
        sources |= block_sources(f"blocks.{index}.", f"{prefix}blocks.{index}.", config.embed_dim, LINEARS)
    return sources


def block_sources(ours: str, theirs: str, width: int, linears: Mapping[str, str]) -> dict[str, AnySource]:
    """Norms, attention and MLP of one block; `linears` is parameter -> key below the block's prefix."""
    sources: dict[str, AnySource] = {}
    for norm in ("norm1", "norm2"):
        sources |= norm_sources(ours + norm, theirs + norm)
    for position, part in enumerate("qkv"):
        sources |= linear_sources(ours + part, f"{theirs}attn.qkv", (position * width, (position + 1) * width))
    for name, key in linears.items():
        sources |= linear_sources(ours + name, theirs + key)
    return sources


def find_prefix(checkpoint: Checkpoint) -> str:
    """The prefix of the tower's keys in this checkpoint.

    Raises:
        CheckpointError: there is no tower under any known name.
    """
    return prefix_of(checkpoint, "patch_embed.proj.weight", PREFIXES)
