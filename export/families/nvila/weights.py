"""NVILA's vision tower: its geometry, and where its weights are in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.weights import AnySource, Computed
from framefusion.export.families.nvila import row as nvila
from framefusion.export.families.nvila.tower import NvilaScalesTower, NvilaTower, NvilaTowerConfig
from framefusion.export.families.reading.configs import given, prefix_of, required
from framefusion.export.families.towers import TowerPlan
from framefusion.export.families.vit import (
    activation_of,
    linear_sources,
    norm_sources,
    vit_config,
    vit_sources,
    vit_unused,
)
from framefusion.export.graphs.vit import VitConfig
from framefusion.runtime.families.nvila import BlockPooledSettings, NvilaPreprocessing, ScalesSettings
from framefusion.runtime.media.tower_kinds import PlainSettings, TowerSettings

PROJECTOR = "mm_projector.layers."
MAPS: Mapping[int, tuple[int, ...]] = {2: (2, 4), 3: (2, 5, 7)}
"""Side of a block -> numbers of the projector's linear maps; the first norm is number 1, the second one 4."""
VISION_PREFIXES = ("vision_tower.vision_tower.vision_model.", "vision_tower.vision_model.", "vision_tower.")


def tower(checkpoint: Checkpoint) -> TowerPlan:
    """The tower on the meta device, and the sources of its parameters.

    Raises:
        CheckpointError: config.json and the tensors do not agree.
    """
    rule = nvila.preprocessing(checkpoint)
    vit = encoder_config(checkpoint)
    maps = MAPS[rule.merge_size]
    if vit.num_positions != rule.side**2:
        raise CheckpointError(
            f"the vision tower has {vit.num_positions} positions, pictures of {rule.image_size} pixels have "
            f"{rule.side**2} patches: is vision_tower/config.json of another model?"
        )
    declared = int(required(nvila.vision_config(checkpoint), "num_hidden_layers", checkpoint))
    unused = vit_unused(checkpoint, vision_prefix(checkpoint), declared, vit.depth)
    _check_projector(checkpoint, rule, vit)
    widths = tuple(checkpoint.shape(f"{PROJECTOR}{number}.weight")[0] for number in maps)
    frames, tall, wide = rule.pool_sizes
    config = NvilaTowerConfig(vit, rule.side, rule.merge_size, widths, pools=tall * wide > 1)
    settings = tower_settings(rule)
    tower_class: type[NvilaTower] = NvilaTower
    if isinstance(settings, ScalesSettings):
        config = replace(config, scales=len(settings.scales), taps=settings.most**2)
        tower_class = NvilaScalesTower
    with torch.device("meta"):
        module = tower_class(config)
    return TowerPlan(
        module,
        vit_sources("vit.", vision_prefix(checkpoint), vit) | projector_sources(checkpoint, config, len(rule.scales)),
        settings,
        patch_width=vit.patch_width,
        head_dim=vit.head_dim,
        embed_dim=vit.width,
        mlp_width=max(vit.mlp_width, config.block**2 * vit.width),
        out_width=widths[-1],
        patches_per_token=frames * rule.side**2 * tall * wide / config.blocks**2,
        unused=unused,
    )


def tower_settings(rule: NvilaPreprocessing) -> TowerSettings:
    """What the graph takes beside patches, by what the preprocessing shows it."""
    frames, tall, wide = rule.pool_sizes
    patches = frames * rule.side**2  # those of a row's frames
    if rule.image_aspect_ratio == "dynamic_s2":
        # a place of the finest scale covers at most as many of a coarser one as that has tiles
        most = max((1, *rule.scales[:-1]))
        return ScalesSettings(rows=rule.blocks**2, side=rule.side, scales=rule.scales, most=most)
    if tall * wide > 1:
        return BlockPooledSettings(blocks=rule.blocks, pool_sizes=(tall, wide), patches=patches)
    return PlainSettings(rows=rule.blocks**2, patches=patches)


def encoder_config(checkpoint: Checkpoint) -> VitConfig:
    """The encoder as far as it is run: up to the layer that config.json selects, no norm after it.

    Raises:
        CheckpointError: the selected layer is none of the tower.
    """
    vision = nvila.vision_config(checkpoint)
    key = "mm_vision_select_layer"
    layers = int(required(vision, "num_hidden_layers", checkpoint))
    select = int(required(checkpoint.config, key, checkpoint))
    depth = select if select >= 0 else layers + 1 + select  # of the states before, between and after the layers
    if not 1 <= depth <= layers:
        raise CheckpointError(f"{checkpoint.folder}/config.json has {key} {select}, the tower has {layers} layers")
    return vit_config(
        checkpoint,
        vision_prefix(checkpoint),
        depth,
        int(required(vision, "num_attention_heads", checkpoint)),
        norm_eps=float(given(vision, "layer_norm_eps", 1e-6)),
        activation=activation_of(vision, "gelu_pytorch_tanh"),
    )


def vision_prefix(checkpoint: Checkpoint) -> str:
    """What the keys of the vision tower begin with; it changed between releases of transformers.

    Raises:
        CheckpointError: there is no tower under any known name.
    """
    return prefix_of(checkpoint, "embeddings.patch_embedding.weight", VISION_PREFIXES)


def projector_sources(checkpoint: Checkpoint, config: NvilaTowerConfig, scales: int) -> dict[str, AnySource]:
    """Parameter of the projector -> place in the checkpoint; the first norm is folded into the first map.

    So are the `scales` that the checkpoint takes side by side, where the graph gives one for all of them.
    """
    gain = f"{PROJECTOR}1.weight"
    shift = f"{PROJECTOR}1.bias"
    first = f"{PROJECTOR}2"
    folded = partial(_folded, config.block**2, scales // config.scales)
    sources: dict[str, AnySource] = {
        "maps.0.weight": Computed((f"{first}.weight", gain), folded),
        "maps.0.bias": Computed((f"{first}.weight", shift, f"{first}.bias"), _shifted),
    }
    for index, number in enumerate(MAPS[config.block][1:], start=1):
        sources |= linear_sources(f"maps.{index}", f"{PROJECTOR}{number}")
    return sources | norm_sources("norm", f"{PROJECTOR}4")


def _check_projector(checkpoint: Checkpoint, rule: NvilaPreprocessing, vit: VitConfig) -> None:
    """Refuse a projector that takes other blocks than config.json says."""
    gain = f"{PROJECTOR}1.weight"
    block = rule.merge_size
    scales = len(rule.scales)
    width = scales * block**2 * vit.width
    if checkpoint.shape(gain) != (width,):
        raise CheckpointError(
            f"{gain} has shape {checkpoint.shape(gain)}, {block} x {block} patches of {vit.width} numbers in {scales} "
            f"scale(s) are {width}: do mm_projector_type and dynamic_s2 belong to it?"
        )


def _folded(places: int, copies: int, weight: Tensor, gain: Tensor) -> Tensor:
    """[in, out] of a map after a norm with this gain, for an input given once instead of in copies side by side.

    The copies of one place in the block lie side by side, place by place.
    """
    scaled = weight.float() * gain.float()
    return scaled.reshape(len(weight), places, copies, -1).sum(2).flatten(1).T


def _shifted(weight: Tensor, shift: Tensor, bias: Tensor) -> Tensor:
    """The bias of a map after a norm with this shift."""
    return bias.float() + weight.float() @ shift.float()
