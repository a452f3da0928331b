"""Qwen2.5-VL's vision tower: its geometry and where its weights are in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.weights import AnySource, Source
from framefusion.export.families.qwen2_5_vl.tower import Qwen25VLTower, WindowTowerConfig
from framefusion.export.families.qwen2_vl.weights import (
    block_sources,
    check_vision,
    find_prefix,
    plan_of,
)
from framefusion.export.families.reading.configs import required, vision_config
from framefusion.export.families.towers import TowerPlan, head_width, run_of
from framefusion.export.families.vit import linear_sources
from framefusion.runtime.families.qwen2_5_vl import WindowSettings

LINEARS: Mapping[str, str] = {
    "proj": "attn.proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def tower(checkpoint: Checkpoint) -> TowerPlan:
    """The tower on the meta device, and the sources of its parameters."""
    config = tower_config(checkpoint)
    sources = tower_sources(find_prefix(checkpoint), config)
    settings = WindowSettings(merge_size=config.merge_size, window=config.window)
    return plan_of(Qwen25VLTower, config, sources, settings)


def tower_config(checkpoint: Checkpoint) -> WindowTowerConfig:
    """Geometry from config.json; widths from the tensors themselves.

    Raises:
        CheckpointError: a number is of another tower, or a window holds no merge block.
    """
    vision = vision_config(checkpoint)
    prefix = find_prefix(checkpoint)
    embed_dim, *patch = checkpoint.shape(f"{prefix}patch_embed.proj.weight")
    heads = int(required(vision, "num_heads", checkpoint))
    head_width(checkpoint, embed_dim, heads)
    check_vision(vision, checkpoint, "silu")
    merge = int(required(vision, "spatial_merge_size", checkpoint))
    size = required(vision, "window_size", checkpoint)
    patch_size = patch[-1]
    window = int(size) // merge // patch_size
    if window < 1:
        raise CheckpointError(
            f"window_size {size} of {checkpoint.folder}/config.json holds no block of {merge} x {merge} patches of "
            f"{patch_size} pixels: it must be {merge * patch_size} or more"
        )
    depth = int(required(vision, "depth", checkpoint))
    run_of(checkpoint, f"{prefix}blocks.", depth)
    return WindowTowerConfig(
        depth=depth,
        embed_dim=embed_dim,
        num_heads=heads,
        mlp_width=checkpoint.shape(f"{prefix}blocks.0.mlp.gate_proj.weight")[0],
        patch_width=math.prod(patch),
        merge_size=merge,
        out_width=checkpoint.shape(f"{prefix}merger.mlp.2.weight")[0],
        window=window,
        full_layers=layer_list(vision, "fullatt_block_indexes", depth, checkpoint),
    )


def layer_list(vision: Mapping[str, object], key: str, depth: int, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Indices of the tower's layers that config.json lists under a key.

    Raises:
        CheckpointError: the key has no list of layers of the tower.
    """
    layers = required(vision, key, checkpoint)
    if not isinstance(layers, (list, tuple)) or not all(
        isinstance(layer, int) and 0 <= layer < depth for layer in layers
    ):
        raise CheckpointError(f"{checkpoint.folder}/config.json: {key} {layers} are not layers 0 .. {depth - 1}")
    return tuple(layers)


def tower_sources(prefix: str, config: WindowTowerConfig) -> dict[str, AnySource]:
    """Parameter of `Qwen25VLTower` -> place in the checkpoint."""
    sources: dict[str, AnySource] = {
        "patch_embed.weight": Source(f"{prefix}patch_embed.proj.weight", flatten=True, transpose=True),
        "merger_norm.weight": Source(f"{prefix}merger.ln_q.weight"),
        **linear_sources("merger_fc1", f"{prefix}merger.mlp.0"),
        **linear_sources("merger_fc2", f"{prefix}merger.mlp.2"),
    }
    for index in range(config.depth):
        sources |= block_sources(f"blocks.{index}.", f"{prefix}blocks.{index}.", config.embed_dim, LINEARS)
    return sources
