"""The vision tower of Qwen2-VL with its merger, as a batch of temporal grids. Knows no checkpoint and no preprocessing.

Attention stays within one temporal grid, so a grid is a row of the batch and no mask is needed.

    patches   [T, P, C*tps*p*p]   float   P = h*w patches in merge-block order
    cos, sin  [1, P, hd/2]        float   2-D RoPE of those patches
    -> tokens [T*P/merge^2, out]  float
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import framefusion.ops.kernels  # noqa: F401  (registers the ops)
from framefusion.export.graphs.graph_plan import FREE, Signature, meta
from framefusion.export.graphs.layers import LayerNorm, Linear
from framefusion.export.graphs.tower import Tower
from framefusion.export.graphs.vit import Activation, activate

NORM_EPS = 1e-6


@dataclass(frozen=True)
class TowerConfig:
    """Geometry of the tower, read from the checkpoint."""

    depth: int
    embed_dim: int
    num_heads: int
    mlp_width: int
    patch_width: int  # channels * temporal patch * patch * patch
    merge_size: int
    out_width: int
    activation: Activation = "quick_gelu"

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.embed_dim // self.num_heads


class TowerBlock(nn.Module):
    """Pre-norm attention within a grid, then the MLP."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.activation = config.activation
        width = config.embed_dim
        self.norm1 = LayerNorm(width, NORM_EPS)
        self.norm2 = LayerNorm(width, NORM_EPS)
        self.q, self.k, self.v, self.proj = (Linear(width, width, bias=True) for _ in range(4))
        self.fc1 = Linear(width, config.mlp_width, bias=True)
        self.fc2 = Linear(config.mlp_width, width, bias=True)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, P, E] -> the same shape."""
        normed = self.norm1(hidden)
        rotary = torch.ops.framefusion.rotary
        query = rotary(self.q(normed), cos, sin, self.num_heads)
        key = rotary(self.k(normed), cos, sin, self.num_heads)
        out = torch.ops.framefusion.full_attention(query, key, self.v(normed), self.num_heads)
        hidden = hidden + self.proj(out)
        return hidden + self.fc2(activate(self.fc1(self.norm2(hidden)), self.activation))  # type: ignore[no-any-return]


class Qwen2VLTower(Tower):
    """Patch embedding, blocks, merger."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        merged = config.embed_dim * config.merge_size**2
        self.config = config
        self.patch_embed = Linear(config.patch_width, config.embed_dim, bias=False)
        self.blocks = nn.ModuleList(TowerBlock(config) for _ in range(config.depth))
        self.merger_norm = LayerNorm(config.embed_dim, NORM_EPS)
        self.merger_fc1 = Linear(merged, merged, bias=True)
        self.merger_fc2 = Linear(merged, config.out_width, bias=True)

    def signature(self) -> Signature:
        """Any number of temporal grids, and of patches in whole merge blocks."""
        blocks = self.config.merge_size**2
        half = self.config.head_dim // 2
        patches = 20 * blocks  # unlike every other size, so that no axis looks equal to another
        axis = torch.export.Dim("merge_blocks", min=2, max=1 << 20) * blocks
        return Signature(
            (self.patches(3, patches, self.config.patch_width), meta(1, patches, half), meta(1, patches, half)),
            ({0: FREE, 1: axis}, {1: axis}, {1: axis}),
            ("patches", "cos", "sin"),
            axes={"patches": {0: "grids", 1: "patches"}, "cos": {1: "patches"}, "sin": {1: "patches"}},
        )

    def forward(self, patches: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See the module's table."""
        grids = patches.shape[0]
        cos = cos.expand(grids, -1, -1)
        sin = sin.expand(grids, -1, -1)
        hidden = self.patch_embed(self.normalised(patches))
        for block in self.blocks:
            hidden = block(hidden, cos, sin)
        merged = self.merger_norm(hidden).reshape(-1, self.merger_fc1.weight.shape[0])  # [T*P/4, 4E]
        return self.merger_fc2(nn.functional.gelu(self.merger_fc1(merged)))  # type: ignore[no-any-return]
