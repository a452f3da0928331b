"""Where a plain vision transformer's parameters are in a checkpoint: the names of SigLIP's and CLIP's releases.

Knows the encoder of `framefusion.export.graphs.vit`, no tower and no projector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.weights import Source
from framefusion.export.families.towers import NORM_BEHIND, POOLING_HEAD, head_width, run_of
from framefusion.export.graphs.vit import Activation, VitConfig

SIGLIP_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "patch_embed": "embeddings.patch_embedding",
        "positions": "embeddings.position_embedding.weight",
        "class_token": "embeddings.class_embedding",
        "pre_norm": "pre_layrnorm",  # spelled so in CLIP's checkpoints
        "post_norm": "post_layernorm",
        "blocks": "encoder.layers",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "proj": "self_attn.out_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
)

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
)


def activation_of(vision: Mapping[str, Any], default: str) -> Activation:
    """The activation that a vision tower's configuration names.

    Raises:
        CheckpointError: the activation is none that is computed here.
    """
    name = vision.get("hidden_act", default)
    if name not in ACTIVATIONS:
        raise CheckpointError(f"vision_config.hidden_act {name!r} is not supported, {', '.join(ACTIVATIONS)} are")
    return ACTIVATIONS[name]


def vit_config(checkpoint: Checkpoint, prefix: str, depth: int, heads: int, **facts: Any) -> VitConfig:
    """The geometry of an encoder in a checkpoint: widths from the tensors themselves, the rest as given."""
    width, *patch = checkpoint.shape(f"{prefix}embeddings.patch_embedding.weight")
    head_width(checkpoint, width, heads)
    return VitConfig(
        depth=depth,
        width=width,
        num_heads=heads,
        mlp_width=checkpoint.shape(f"{prefix}encoder.layers.0.mlp.fc1.weight")[0],
        patch_width=math.prod(patch),
        num_positions=checkpoint.shape(f"{prefix}embeddings.position_embedding.weight")[0],
        **facts,
    )


def vit_unused(checkpoint: Checkpoint, prefix: str, declared: int, depth: int) -> dict[str, str]:
    """Tensors of a SigLIP or CLIP tower that no output needs, while the states of an inner block are taken.

    Args:
        checkpoint: of the tower.
        prefix: of its keys, with the dot.
        declared: blocks that its configuration says it has.
        depth: the first ones, that are run.

    Returns:
        pattern -> reason, see `TowerPlan.unused`.
    """
    unused = run_of(checkpoint, f"{prefix}{SIGLIP_NAMES['blocks']}.", declared, depth)
    return unused | {f"{prefix}{SIGLIP_NAMES['post_norm']}.*": NORM_BEHIND, f"{prefix}head.*": POOLING_HEAD}


def linear_sources(name: str, key: str, rows: tuple[int, int] | None = None) -> dict[str, Source]:
    """Weight and bias of a `Linear`, perhaps some rows of a stacked one."""
    return {
        f"{name}.weight": Source(f"{key}.weight", rows, transpose=True),
        f"{name}.bias": Source(f"{key}.bias", rows),
    }


def norm_sources(name: str, key: str) -> dict[str, Source]:
    """Weight and bias of a norm."""
    return {f"{name}.{part}": Source(f"{key}.{part}") for part in ("weight", "bias")}


def vit_sources(
    ours: str, theirs: str, config: VitConfig, names: Mapping[str, str] = SIGLIP_NAMES
) -> dict[str, Source]:
    """Parameter of a `VitEncoder` -> place in the checkpoint.

    Args:
        ours: prefix of the encoder's parameters in the tower, with its dot.
        theirs: prefix of the encoder's keys in the checkpoint, with its dot.
        config: says which parts there are.
        names: of the parts.
    """
    patch = f"{theirs}{names['patch_embed']}"
    sources = {
        f"{ours}patch_embed.weight": Source(f"{patch}.weight", flatten=True, transpose=True),
        f"{ours}patch_embed.bias": Source(f"{patch}.bias"),
        f"{ours}positions": Source(theirs + names["positions"]),
        f"{ours}class_token": Source(theirs + names["class_token"]),
    }
    for norm in ("pre_norm", "post_norm"):
        sources |= norm_sources(ours + norm, theirs + names[norm])
    for index in range(config.depth):
        block = f"{ours}blocks.{index}."
        place = f"{theirs}{names['blocks']}.{index}."
        for norm in ("norm1", "norm2"):
            sources |= norm_sources(block + norm, place + names[norm])
        for part in ("q", "k", "v", "proj", "fc1", "fc2"):
            sources |= linear_sources(block + part, place + names[part])
    return sources
