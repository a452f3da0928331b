"""LLaVA by transformers' own classes, in fp32: what a bundle's dense logits are compared with."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from framefusion.export.families.llava import row as llava
from framefusion.export.families.llava.tower import LlavaTower
from framefusion.export.families.llava.weights import original_tower
from framefusion.export.families.reading.configs import text_config
from framefusion.export.families.reference.composition import last_logits, pixels, qwen2, siglip, two_layers
from framefusion.export.families.reference.transformers_call import TransformersCall
from framefusion.runtime.media.visual_input import Tiles


def hf_logits(call: TransformersCall) -> NDArray[Any]:
    """Logits [keep, V] of the last tokens, by the class that config.json names.

    Images are laid out by this project's rule.
    """
    model = call.model(call.checkpoint.config["architectures"][0])
    config = model.config
    pool_first = hasattr(model.model, "vision_resampler")
    size = config.vision_config.image_size
    patch = config.vision_config.patch_size

    def rows(tiles: Tiles) -> Tensor:
        pictures = pixels(tiles, size, patch)
        project = model.model.multi_modal_projector
        if tiles.pool == ("average" if pool_first else "bilinear"):  # as the class itself pools
            rows_of_class: Tensor = model.get_video_features(pictures[None]).pooler_output[0]
            return rows_of_class.flatten(0, -2)  # transformers 5.10 has an axis of frames
        states = model.model.vision_tower(pictures, output_hidden_states=True).hidden_states
        hidden: Tensor = states[config.vision_feature_layer]
        hidden = hidden[:, 1:] if config.vision_feature_select_strategy == "default" else hidden
        hidden = project(_pooled(hidden, tiles)) if pool_first else _pooled(project(hidden), tiles)
        return hidden.flatten(0, 1)

    with torch.inference_mode():
        return last_logits(model, call, rows, model.model.image_newline)


def original_logits(call: TransformersCall) -> NDArray[Any]:
    """Logits [keep, V] of the last tokens, by SiglipVisionModel and Qwen2ForCausalLM with LLaVA's steps between."""
    tower, projector, model = _original_parts(call)
    rule = llava.preprocessing(call.checkpoint)

    def rows(tiles: Tiles) -> Tensor:
        hidden = tower(pixels(tiles, rule.image_size, rule.patch_size), output_hidden_states=True).hidden_states[-1]
        return _pooled(projector(hidden), tiles).flatten(0, 1)

    with torch.inference_mode():
        return last_logits(model, call, rows, call.checkpoint.tensor("model.image_newline").float())


def _original_parts(call: TransformersCall) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Vision tower, projector and LLM."""
    checkpoint = call.checkpoint
    rule = llava.preprocessing(checkpoint)
    plan = original_tower(checkpoint)
    assert isinstance(plan.module, LlavaTower)
    vit = plan.module.config.vit
    tower = siglip(call, llava.VISION_PREFIX, vit, rule.image_size, rule.patch_size)
    projector = two_layers(checkpoint, "model.mm_projector.")
    return tower, projector, qwen2(call, text_config(checkpoint))


def _pooled(hidden: Tensor, tiles: Tiles) -> Tensor:
    """[N, P, D] -> [N, Q, D], as the checkpoint's authors pool."""
    if not tiles.pool:
        return hidden
    grid = hidden.reshape(*tiles.grid, -1).permute(0, 3, 1, 2)
    if tiles.pool == "average":
        pooled = nn.functional.avg_pool2d(grid, 2)
    else:
        pooled = nn.functional.interpolate(grid, size=[-(-side // 2) for side in tiles.grid[1:]], mode="bilinear")
    return pooled.flatten(2).transpose(1, 2)
