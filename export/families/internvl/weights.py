"""InternVL's vision tower: its geometry and where its weights are, in both formats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.weights import AnySource, Computed, Source
from framefusion.export.families.internvl.row import merge_size, tile_size
from framefusion.export.families.internvl.tower import InternVLTower, InternVLTowerConfig
from framefusion.export.families.reading.configs import expect, given, prefix_of, required, square, vision_config
from framefusion.export.families.towers import NORM_BEHIND, TowerPlan, head_width, run_of
from framefusion.export.families.vit import linear_sources, norm_sources, vit_sources
from framefusion.export.graphs.vit import VitConfig
from framefusion.runtime.media.tower_kinds import PlainSettings

CHAT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "patch_embed": "embeddings.patch_embedding",
        "positions": "embeddings.position_embedding",
        "class_token": "embeddings.class_embedding",
        "pre_norm": "",  # neither format has one
        "post_norm": "",
        "blocks": "encoder.layers",
        "norm1": "norm1",
        "norm2": "norm2",
        "q": "attn.qkv",
        "k": "attn.qkv",
        "v": "attn.qkv",
        "proj": "attn.proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
        "scale1": "ls1",
        "scale2": "ls2",
        "q_norm": "attn.q_norm",
        "k_norm": "attn.k_norm",
    }
)
NATIVE_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "patch_embed": "embeddings.patch_embeddings.projection",
        "positions": "embeddings.position_embeddings",
        "class_token": "embeddings.cls_token",
        "pre_norm": "",
        "post_norm": "layernorm",
        "blocks": "encoder.layer",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "proj": "attention.projection_layer",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
        "scale1": "lambda_1",
        "scale2": "lambda_2",
        "q_norm": "attention.q_norm",
        "k_norm": "attention.k_norm",
    }
)
CHAT_PREFIX = "vision_model."
CHAT_PROJECTOR = ("mlp1.0", "mlp1.1", "mlp1.3")
NATIVE_PREFIXES = ("model.", "")  # newest first
NORM_EPS = 1e-6
NATIVE_PROJECTOR = tuple(f"multi_modal_projector.{part}" for part in ("layer_norm", "linear_1", "linear_2"))


class ConfigFacts(NamedTuple):
    """What the two formats write under different keys, and no tensor tells."""

    image_size: int
    depth: int  # blocks whose output is shown
    qk_norm_eps: float = 1e-6
    post_norm: bool = False


def chat_tower(checkpoint: Checkpoint) -> TowerPlan:
    """The tower of an `internvl_chat` checkpoint."""
    config = checkpoint.config
    vision = vision_config(checkpoint)
    expect(checkpoint, {"ps_version": "v1"} | config, {"ps_version": ("v2",)})  # v1 turned the picture on its side
    facts = ConfigFacts(
        image_size=tile_size(checkpoint, vision),
        depth=_depth(vision, config.get("select_layer", -1), checkpoint),
        qk_norm_eps=float(given(vision, "layer_norm_eps", NORM_EPS)),
    )
    vit = _vit(checkpoint, vision, CHAT_PREFIX, CHAT_NAMES, facts)
    plan = _plan(checkpoint, vit, CHAT_PREFIX, CHAT_NAMES, CHAT_PROJECTOR)
    return replace(plan, unused=_unused(checkpoint, vision, CHAT_PREFIX, CHAT_NAMES, vit))


def native_tower(checkpoint: Checkpoint) -> TowerPlan:
    """The tower of a checkpoint in transformers' own format."""
    config = checkpoint.config
    prefix = _native_prefix(checkpoint)
    vision = vision_config(checkpoint)
    layer = config.get("vision_feature_layer", -1)
    expect(checkpoint, config, {"vision_feature_select_strategy": ("default",), "projector_hidden_act": ("gelu",)})
    expect(checkpoint, vision, {"use_absolute_position_embeddings": (True,), "use_mask_token": (False,)})
    facts = ConfigFacts(
        image_size=square(vision, "image_size", checkpoint),
        depth=_depth(vision, layer, checkpoint),
        post_norm=layer == -1 and not vision.get("use_mean_pooling", True),  # before pooling, the class token's norm
    )
    if facts.post_norm:
        expect(checkpoint, vision, {"norm_type": ("layer_norm",)})
    place = f"{prefix}vision_tower."
    vit = _vit(checkpoint, vision, place, NATIVE_NAMES, facts)
    plan = _plan(checkpoint, vit, place, NATIVE_NAMES, tuple(prefix + part for part in NATIVE_PROJECTOR))
    return replace(plan, unused=_unused(checkpoint, vision, place, NATIVE_NAMES, vit))


def _depth(vision: Mapping[str, Any], layer: Any, checkpoint: Checkpoint) -> int:
    """Blocks up to the layer whose output is shown; 0 is the embedding's, -1 the last one's."""
    depth = int(required(vision, "num_hidden_layers", checkpoint))
    if not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
        raise CheckpointError(f"config.json shows layer {layer} of the vision tower, supported is one of its {depth}")
    return layer if layer >= 0 else depth + 1 + layer


def _vit(
    checkpoint: Checkpoint, vision: Mapping[str, Any], prefix: str, names: Mapping[str, str], facts: ConfigFacts
) -> VitConfig:
    """Geometry from config.json; widths, biases and norms from the tensors themselves."""
    expect(checkpoint, vision, {"hidden_act": ("gelu",), "num_channels": (3,)})
    width, *patch = checkpoint.shape(f"{prefix}{names['patch_embed']}.weight")
    heads = int(required(vision, "num_attention_heads", checkpoint))
    positions = checkpoint.shape(prefix + names["positions"])[1]
    side = facts.image_size // patch[-1]
    if positions != side**2 + 1:
        raise CheckpointError(
            f"{prefix}{names['positions']} has {positions} positions, tiles of {side} x {side} patches need "
            f"{side**2 + 1}: tables of another size are not interpolated"
        )
    head_width(checkpoint, width, heads)
    first = f"{prefix}{names['blocks']}.0."
    stored = _stored_facts(checkpoint, vision, first, names)
    return VitConfig(
        depth=facts.depth,
        width=width,
        num_heads=heads,
        mlp_width=checkpoint.shape(f"{first}{names['fc1']}.weight")[0],
        patch_width=math.prod(patch),
        num_positions=positions,
        norm_eps=float(given(vision, "layer_norm_eps", NORM_EPS)),
        activation="gelu",
        norm="layer" if stored["norm"] == "layer" else "rms",
        class_token=True,
        post_norm=facts.post_norm,
        qkv_bias=bool(stored["bias"]),
        qk_norm=bool(stored["qk_norm"]),
        qk_norm_eps=facts.qk_norm_eps,
        layer_scale=True,
    )


def _stored_facts(
    checkpoint: Checkpoint, vision: Mapping[str, Any], first: str, names: Mapping[str, str]
) -> dict[str, str | bool]:
    """What the tensors of the first block say of its norms and biases; config.json must not say otherwise."""
    stored: dict[str, str | bool] = {
        "norm": "layer" if f"{first}{names['norm1']}.bias" in checkpoint else "rms",
        "bias": f"{first}{names['q']}.bias" in checkpoint,
        "qk_norm": f"{first}{names['q_norm']}.weight" in checkpoint,
    }
    said: dict[str, Any] = {
        "norm": str(vision.get("norm_type", f"{stored['norm']}_norm")).removesuffix("_norm"),
        "bias": vision.get("qkv_bias", vision.get("attention_bias", stored["bias"])),
        "qk_norm": vision.get("qk_normalization", vision.get("use_qk_norm", stored["qk_norm"])),
    }
    for fact, value in stored.items():
        if said[fact] != value:
            raise CheckpointError(
                f"{checkpoint.folder}: vision_config says {said[fact]!r} of the tower's {fact}, the tensors at "
                f"{first}* mean {value!r}: one of the two is of another model"
            )
    return stored


def _unused(
    checkpoint: Checkpoint, vision: Mapping[str, Any], prefix: str, names: Mapping[str, str], vit: VitConfig
) -> dict[str, str]:
    """See `TowerPlan.unused`."""
    declared = int(required(vision, "num_hidden_layers", checkpoint))
    unused = run_of(checkpoint, f"{prefix}{names['blocks']}.", declared, vit.depth)
    if names["post_norm"] and not vit.post_norm:
        unused[f"{prefix}{names['post_norm']}.*"] = NORM_BEHIND
    return unused


def _plan(
    checkpoint: Checkpoint, vit: VitConfig, prefix: str, names: Mapping[str, str], projector: Sequence[str]
) -> TowerPlan:
    norm, first, second = projector
    merge = merge_size(checkpoint)
    config = InternVLTowerConfig(
        vit=vit,
        side=round((vit.num_positions - 1) ** 0.5),
        merge_size=merge,
        hidden_width=checkpoint.shape(f"{first}.weight")[0],
        out_width=checkpoint.shape(f"{second}.weight")[0],
    )
    sources = encoder_sources(vit, prefix, names) | norm_sources("projector_norm", norm)
    sources |= linear_sources("projector_fc1", first) | linear_sources("projector_fc2", second)
    with torch.device("meta"):
        module = InternVLTower(config)
    return TowerPlan(
        module,
        sources,
        PlainSettings(rows=(config.side // merge) ** 2),
        patch_width=vit.patch_width,
        head_dim=vit.head_dim,
        embed_dim=vit.width,
        mlp_width=vit.mlp_width,
        out_width=config.out_width,
        patches_per_token=merge**2,
    )


def encoder_sources(vit: VitConfig, prefix: str, names: Mapping[str, str]) -> dict[str, AnySource]:
    """Parameter of the encoder -> place in the checkpoint."""
    sources: dict[str, AnySource] = {**vit_sources("encoder.", prefix, vit, names)}
    sources["encoder.class_token"] = Computed((prefix + names["class_token"],), Tensor.flatten)
    sources["encoder.positions"] = Computed((prefix + names["positions"],), Tensor.squeeze)
    packed = names["q"] == names["k"]
    for index in range(vit.depth):
        ours = f"encoder.blocks.{index}."
        theirs = f"{prefix}{names['blocks']}.{index}."
        for part in ("q", "k", "v") if packed else ():  # stacked, in this order
            start = ("q", "k", "v").index(part) * vit.width
            sources |= linear_sources(ours + part, theirs + names[part], (start, start + vit.width))
        for scale in ("scale1", "scale2"):
            sources[ours + scale] = Source(theirs + names[scale])
        for part in ("q_norm", "k_norm"):
            sources[f"{ours}{part}.weight"] = Source(f"{theirs}{names[part]}.weight")
    return sources


def _native_prefix(checkpoint: Checkpoint) -> str:
    return prefix_of(checkpoint, f"vision_tower.{NATIVE_NAMES['class_token']}", NATIVE_PREFIXES)
