"""LLaVA's vision towers: their geometry, and where their weights are in a checkpoint."""

from __future__ import annotations

from dataclasses import replace

import torch

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.families.llava import hf_rows as llava_hf
from framefusion.export.families.llava import row as llava
from framefusion.export.families.llava.tower import LlavaTower, LlavaTowerConfig
from framefusion.export.families.reading.configs import expect, required
from framefusion.export.families.towers import TowerPlan
from framefusion.export.families.vit import activation_of, linear_sources, vit_config, vit_sources, vit_unused
from framefusion.export.graphs.vit import VitConfig
from framefusion.runtime.families.llava import NEWLINE
from framefusion.runtime.media.tower_kinds import PooledSettings

PROJECTOR = "model.mm_projector."


def original_tower(checkpoint: Checkpoint) -> TowerPlan:
    """The tower of a checkpoint in its authors' format: all layers but the last, no norm after them."""
    facts = llava.vision_tower(checkpoint)
    prefix = llava.VISION_PREFIX
    unused = vit_unused(checkpoint, prefix, facts.num_layers, facts.num_layers - 1)
    vit = vit_config(checkpoint, prefix, facts.num_layers - 1, facts.num_heads, norm_eps=facts.norm_eps)
    plan = _plan(checkpoint, prefix, vit, (f"{PROJECTOR}0", f"{PROJECTOR}2"), f"model.{NEWLINE}")
    return replace(plan, unused=unused)


def onevision_tower(checkpoint: Checkpoint) -> TowerPlan:
    """SigLIP in Hugging Face's format; the rows are pooled after the projector."""
    return _hf_plan(checkpoint, pool_first=False)


def next_tower(checkpoint: Checkpoint) -> TowerPlan:
    """CLIP in Hugging Face's format; the patches are pooled before the projector."""
    return _hf_plan(checkpoint, pool_first=True)


def _hf_plan(checkpoint: Checkpoint, pool_first: bool) -> TowerPlan:
    prefix, config, depth = llava_hf.vision(checkpoint)
    kind = config.get("model_type")
    clip = config.get("model_type") == "clip_vision_model"
    if kind not in ("siglip_vision_model", "clip_vision_model"):
        raise CheckpointError(f"vision_config.model_type {kind!r} is not supported, siglip and clip _vision_model are")
    strategy = checkpoint.config.get("vision_feature_select_strategy", "default" if pool_first else "full")
    if (strategy == "default") != clip:
        raise CheckpointError(f"vision_feature_select_strategy {strategy!r} does not leave the patches of {kind} alone")
    activation = checkpoint.config.get("projector_hidden_act", "gelu")
    if activation != "gelu":
        raise CheckpointError(f"projector_hidden_act {activation!r} is not supported, 'gelu' is")
    expect(checkpoint, config, {"num_channels": (3,)})
    unused = vit_unused(checkpoint, prefix, int(required(config, "num_hidden_layers", checkpoint)), depth)
    vit = vit_config(
        checkpoint,
        prefix,
        depth,
        int(required(config, "num_attention_heads", checkpoint)),
        norm_eps=float(required(config, "layer_norm_eps", checkpoint)),
        activation=activation_of(config, "gelu_pytorch_tanh"),
        class_token=clip,
        pre_norm=clip,
        patch_bias=not clip,
    )
    outer = prefix[: prefix.index("vision_tower.")]
    if f"{outer}{NEWLINE}" not in checkpoint:  # of a file that mixes old and new names
        outer = ""
    linears = (f"{outer}multi_modal_projector.linear_1", f"{outer}multi_modal_projector.linear_2")
    return replace(_plan(checkpoint, prefix, vit, linears, f"{outer}{NEWLINE}", pool_first), unused=unused)


def _plan(
    checkpoint: Checkpoint,
    prefix: str,
    vit: VitConfig,
    linears: tuple[str, str],
    newline: str,
    pool_first: bool = False,
) -> TowerPlan:
    config = LlavaTowerConfig(vit, checkpoint.shape(f"{linears[1]}.weight")[0], pool_first)
    with torch.device("meta"):
        module = LlavaTower(config)
    return TowerPlan(
        module=module,
        sources=vit_sources("encoder.", prefix, vit)
        | linear_sources("fc1", linears[0])
        | linear_sources("fc2", linears[1]),
        settings=PooledSettings(),
        patch_width=vit.patch_width,
        head_dim=vit.head_dim,
        embed_dim=vit.width,
        mlp_width=max(vit.mlp_width, config.out_width),
        out_width=config.out_width,
        patches_per_token=4.0,
        extra_rows={NEWLINE: newline},
    )
