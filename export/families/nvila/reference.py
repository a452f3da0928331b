"""NVILA by transformers' own classes and VILA's steps between them, in fp32: what a bundle is compared with."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.families.nvila import row as nvila
from framefusion.export.families.nvila.tower import NORM_EPS
from framefusion.export.families.nvila.weights import MAPS, PROJECTOR, encoder_config, vision_prefix
from framefusion.export.families.reading.configs import text_config
from framefusion.export.families.reference.composition import fill, last_logits, pixels, qwen2, siglip
from framefusion.export.families.reference.transformers_call import TransformersCall
from framefusion.runtime.media.visual_input import Grid, Tiles


def reference_logits(call: TransformersCall) -> NDArray[Any]:
    """Logits [keep, V] of the last tokens, by SiglipVisionModel and Qwen2ForCausalLM with VILA's steps between them.

    Of images at several scales only the tests have a reference.
    """
    # 1. The parts, with the weights that the checkpoint has for them.
    checkpoint = call.checkpoint
    rule = nvila.preprocessing(checkpoint)
    copies = len(rule.scales)
    vision = siglip(call, vision_prefix(checkpoint), encoder_config(checkpoint), rule.image_size, rule.patch_size)
    projector = _projector(checkpoint, rule.merge_size)
    missing = rule.blocks * rule.merge_size - rule.side

    def rows(tiles: Tiles) -> Tensor:
        # 2. Patches to pictures again, and those through the encoder, once for each scale.
        frames = tiles.grid.height // rule.side
        alone = Grid(tiles.grid.frames * frames, rule.side, rule.side)
        pictures = pixels(
            Tiles(tiles.values.reshape(alone.frames, rule.side**2, -1), alone), rule.image_size, rule.patch_size
        )
        hidden = vision(pictures, output_hidden_states=True).hidden_states[-1].repeat(1, 1, copies)
        # 3. Blocks of patches joined, the last one padded, and projected.
        padded = nn.functional.pad(
            hidden.transpose(1, 2).reshape(len(hidden), -1, *alone[1:]), (0, missing, 0, missing)
        )
        blocks = nn.functional.unfold(padded, rule.merge_size, stride=rule.merge_size)  # channels first in a column
        channels_last = blocks.reshape(*padded.shape[:2], rule.merge_size**2, -1).permute(0, 3, 2, 1).flatten(2)
        projected: Tensor = projector(channels_last)
        # 4. The mean over the frames of a group, then over blocks of rows in a video.
        projected = projected.reshape(-1, frames, *projected.shape[1:]).mean(1)
        if tiles.pool:
            grid = projected.transpose(1, 2).reshape(len(projected), -1, rule.blocks, rule.blocks)
            projected = nn.functional.avg_pool2d(grid, rule.pool_sizes[1:]).flatten(2).transpose(1, 2)
        return projected.flatten(0, 1)

    with torch.inference_mode():
        return last_logits(qwen2(call, text_config(checkpoint), "llm."), call, rows)


def _projector(checkpoint: Checkpoint, block: int) -> nn.Module:
    """The projector as VILA has it, its first layer left out, which joins blocks."""
    shapes = [checkpoint.shape(f"{PROJECTOR}{number}.weight") for number in MAPS[block]]
    layers: list[nn.Module] = [nn.Identity(), nn.LayerNorm(shapes[0][1], NORM_EPS)]
    for index, (out, width) in enumerate(shapes):
        layers += [nn.LayerNorm(width, NORM_EPS)] if index == 1 and len(shapes) == 3 else []
        layers += [nn.Linear(width, out), nn.GELU()]
    projector = nn.Sequential(*layers[:-1])
    fill(projector, checkpoint, PROJECTOR)
    return projector.eval()
