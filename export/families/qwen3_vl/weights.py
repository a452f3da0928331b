"""Qwen3-VL's vision tower: its geometry and where its weights are in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.weights import AnySource, Source
from framefusion.export.families.qwen2_5_vl.weights import layer_list
from framefusion.export.families.qwen2_vl.weights import (
    block_sources,
    check_vision,
    find_prefix,
    plan_of,
)
from framefusion.export.families.qwen3_vl.tower import DeepstackTowerConfig, Qwen3VLTower
from framefusion.export.families.reading.configs import required, vision_config
from framefusion.export.families.towers import TowerPlan, head_width, run_of
from framefusion.export.families.vit import linear_sources, norm_sources
from framefusion.runtime.families.qwen3_vl import TableSettings

LINEARS: Mapping[str, str] = {"proj": "attn.proj", "fc1": "mlp.linear_fc1", "fc2": "mlp.linear_fc2"}


def tower(checkpoint: Checkpoint) -> TowerPlan:
    """The tower on the meta device, and the sources of its parameters."""
    config = tower_config(checkpoint)
    sources = tower_sources(find_prefix(checkpoint), config)
    side = math.isqrt(config.num_positions)
    features = len(config.deepstack_layers)
    settings = TableSettings(merge_size=config.merge_size, table_side=side)
    return plan_of(Qwen3VLTower, config, sources, settings, deepstack=features)


def tower_config(checkpoint: Checkpoint) -> DeepstackTowerConfig:
    """Geometry from config.json; widths from the tensors themselves.

    Raises:
        CheckpointError: a number is of another tower, or the position table is no square.
    """
    vision = vision_config(checkpoint)
    prefix = find_prefix(checkpoint)
    embed_dim, *patch = checkpoint.shape(f"{prefix}patch_embed.proj.weight")
    heads = int(required(vision, "num_heads", checkpoint))
    head_width(checkpoint, embed_dim, heads)
    check_vision(vision, checkpoint, "gelu_pytorch_tanh")
    rows = checkpoint.shape(f"{prefix}pos_embed.weight")[0]
    depth = int(required(vision, "depth", checkpoint))
    run_of(checkpoint, f"{prefix}blocks.", depth)
    if math.isqrt(rows) ** 2 != rows:
        raise CheckpointError(
            f"{prefix}pos_embed.weight has {rows} rows, they are no square: the checkpoint is another's"
        )
    return DeepstackTowerConfig(
        depth=depth,
        embed_dim=embed_dim,
        num_heads=heads,
        mlp_width=checkpoint.shape(f"{prefix}blocks.0.mlp.linear_fc1.weight")[0],
        patch_width=math.prod(patch),
        merge_size=int(required(vision, "spatial_merge_size", checkpoint)),
        out_width=checkpoint.shape(f"{prefix}merger.linear_fc2.weight")[0],
        activation="gelu_tanh",
        num_positions=rows,
        deepstack_layers=layer_list(vision, "deepstack_visual_indexes", depth, checkpoint),
    )


def tower_sources(prefix: str, config: DeepstackTowerConfig) -> dict[str, AnySource]:
    """Parameter of `Qwen3VLTower` -> place in the checkpoint."""
    sources: dict[str, AnySource] = {
        "patch_embed.weight": Source(f"{prefix}patch_embed.proj.weight", flatten=True, transpose=True),
        "patch_embed.bias": Source(f"{prefix}patch_embed.proj.bias"),
        "positions": Source(f"{prefix}pos_embed.weight"),
    }
    mergers = {"merger": "merger"}
    mergers |= {f"deepstack_mergers.{i}": f"deepstack_merger_list.{i}" for i in range(len(config.deepstack_layers))}
    for ours, theirs in mergers.items():
        sources |= norm_sources(f"{ours}.norm", f"{prefix}{theirs}.norm")
        for part in ("fc1", "fc2"):
            sources |= linear_sources(f"{ours}.{part}", f"{prefix}{theirs}.linear_{part}")
    for index in range(config.depth):
        sources |= block_sources(f"blocks.{index}.", f"{prefix}blocks.{index}.", config.embed_dim, LINEARS)
    return sources
