"""Where the tower's parameters are, and the same model by transformers' own classes, which the build compares with."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.families.llava.tower import LlavaTower, LlavaTowerConfig
from framefusion.export.families.reading.configs import required, text_config, vision_config
from framefusion.export.families.reference.composition import last_logits, pixels, qwen2, siglip, two_layers
from framefusion.export.families.reference.transformers_call import TransformersCall
from framefusion.export.families.towers import TowerPlan
from framefusion.export.families.vit import linear_sources, vit_config, vit_sources
from framefusion.export.graphs.vit import VitConfig
from framefusion.runtime.media.tower_kinds import PooledSettings
from framefusion.runtime.media.visual_input import Tiles

from .row import preprocessing

VISION = "vision_tower."
PROJECTOR = "projector."


def encoder_config(checkpoint: Checkpoint) -> VitConfig:
    """SigLIP, its last norm included."""
    vision = vision_config(checkpoint)
    depth, heads = (int(required(vision, f"num_{name}", checkpoint)) for name in ("hidden_layers", "attention_heads"))
    return vit_config(checkpoint, VISION, depth, heads, post_norm=True)


def tower(checkpoint: Checkpoint) -> TowerPlan:
    """LLaVA's graph and the kind `pooled`, which keeps all patches where nothing is pooled."""
    vit = encoder_config(checkpoint)
    width = checkpoint.shape(f"{PROJECTOR}2.weight")[0]
    with torch.device("meta"):
        module = LlavaTower(LlavaTowerConfig(vit, width, pool_first=True))
    sources = vit_sources("encoder.", VISION, vit)
    sources |= linear_sources("fc1", f"{PROJECTOR}0") | linear_sources("fc2", f"{PROJECTOR}2")
    return TowerPlan(
        module, sources, PooledSettings(), patch_width=vit.patch_width, head_dim=vit.head_dim, embed_dim=vit.width,
        mlp_width=vit.mlp_width, out_width=width, patches_per_token=1.0,
    )  # fmt: skip


def reference_logits(call: TransformersCall) -> NDArray[Any]:
    """Logits [keep, V] of the last tokens."""
    rule = preprocessing(call.checkpoint)
    encoder = siglip(call, VISION, encoder_config(call.checkpoint), rule.tile_size, rule.patch_size)
    projector = two_layers(call.checkpoint, PROJECTOR)
    model = qwen2(call, text_config(call.checkpoint), "language_model.")

    def rows(tiles: Tiles) -> Tensor:
        states = encoder(pixels(tiles, rule.tile_size, rule.patch_size)).last_hidden_state
        return projector(states).flatten(0, 1)  # type: ignore[no-any-return]

    with torch.inference_mode():
        return last_logits(model, call, rows)
