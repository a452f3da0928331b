"""MiniCPM-V 2.6 put together of Idefics2VisionTransformer, MultiheadAttention and Qwen2ForCausalLM: what bundles are
compared with, since transformers has no class for it. Knows no graph of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from framefusion.export.families.minicpmv.tower import RESAMPLER_EPS, ResamplerConfig
from framefusion.export.families.minicpmv.weights import RESAMPLER, VISION, encoder_config, resampler_config
from framefusion.export.families.reference.composition import fill, last_logits, qwen2
from framefusion.export.families.reference.transformers_call import TransformersCall
from framefusion.export.families.vit import ACTIVATIONS
from framefusion.runtime.media.visual_input import Tiles
from framefusion.runtime.text.positions import sincos_table


class Resampler(nn.Module):
    """The parameters under the checkpoint's own names."""

    def __init__(self, config: ResamplerConfig, patch_width: int) -> None:
        super().__init__()
        width = config.width
        self.query = nn.Parameter(torch.empty(config.queries, width))
        self.proj = nn.Parameter(torch.empty(width, width))
        self.kv_proj = nn.Linear(patch_width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, config.num_heads, batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=RESAMPLER_EPS) for _ in range(3))

    def forward(self, hidden: Tensor, sincos: Tensor) -> Tensor:
        """[N, P, E] -> [N*Q, D]."""
        kv = self.ln_kv(self.kv_proj(hidden))
        query = self.ln_q(self.query).expand(len(hidden), -1, -1)
        out, _ = self.attn(query, kv + sincos, kv, need_weights=False)
        normed: Tensor = self.ln_post(out)
        return (normed @ self.proj).flatten(0, 1)


@torch.inference_mode()
def reference_logits(call: TransformersCall) -> NDArray[Any]:
    """Logits [keep, V] of the last tokens.

    transformers' buckets of positions are not the released code's for 49 or 58 patches along an axis (see `off_floor`):
    pictures of these sizes differ here.
    """
    checkpoint = call.checkpoint
    config = encoder_config(checkpoint)
    vision = vision_tower(call)
    resampler = Resampler(resampler_config(checkpoint), config.width).eval()
    fill(resampler, checkpoint, RESAMPLER)
    patch = int(checkpoint.config["vision_config"]["patch_size"])

    def rows(tiles: Tiles) -> Tensor:
        _, height, width = tiles.grid
        patches = torch.from_numpy(tiles.values).mT
        pictures = nn.functional.fold(patches, (height * patch, width * patch), patch, stride=patch)
        sincos = sincos_table(height, width, resampler.query.shape[1])
        shown: Tensor = resampler(vision(pictures).last_hidden_state, torch.from_numpy(sincos))
        return shown

    return last_logits(qwen2(call, checkpoint.config, "llm."), call, rows)


def vision_tower(call: TransformersCall) -> nn.Module:
    """Idefics2VisionTransformer with the layers that are stored."""
    from transformers import Idefics2VisionConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

    vit = encoder_config(call.checkpoint)
    sizes = call.checkpoint.config["vision_config"]
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    config = Idefics2VisionConfig(
        hidden_size=vit.width, intermediate_size=vit.mlp_width, num_hidden_layers=vit.depth,
        num_attention_heads=vit.num_heads, image_size=sizes["image_size"], patch_size=sizes["patch_size"],
        layer_norm_eps=vit.norm_eps, hidden_act=names[vit.activation],
    )  # fmt: skip
    tower: nn.Module = call.module(Idefics2VisionTransformer, config=config, prefix=VISION)
    return tower
