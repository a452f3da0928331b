"""The vision tower of Qwen2.5-VL with its merger: attention in square windows, in all of a grid at a few layers.

A window at the border of a grid is smaller than the others. All are cut as if they were full, so that they are a batch:
slots without a patch hold one that is masked, and what comes out of them is not taken back. Between the attentions
patches stay in merge-block order, so nothing but attention works on slots that hold nothing.

    patches   [T, P, C*tps*p*p]   float   P = h*w patches in merge-block order
    cos, sin  [1, P, hd/2]        float   2-D RoPE of those patches
    units     [V, U]              int64   merge block in each of the U slots of each of the V windows of a grid
    slots     [P/merge^2]         int64   slot of each merge block, counted over all windows
    mask      [V, 1, S, S]        float   added to the scores, S = U*merge^2: very low for keys that hold nothing
    -> tokens [T*P/merge^2, out]  float

Knows no checkpoint and no preprocessing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from framefusion.export.families.qwen2_vl.tower import NORM_EPS, TowerConfig
from framefusion.export.graphs.graph_plan import FREE, Signature, meta
from framefusion.export.graphs.layers import Linear, RMSNorm
from framefusion.export.graphs.tower import Tower


@dataclass(frozen=True, kw_only=True)
class WindowTowerConfig(TowerConfig):
    """Geometry of the tower, read from the checkpoint."""

    window: int  # merge blocks along a side of a window
    full_layers: tuple[int, ...]  # layers whose attention sees all of its grid


class Windows(NamedTuple):
    """How to cut every grid of a batch into windows and back."""

    units: Tensor  # [V*U]
    slots: Tensor  # [P/merge^2]
    mask: Tensor  # [T*V, 1, S, S]
    block: int  # patches of a merge block

    def cut(self, x: Tensor) -> Tensor:
        """[T, P, E] -> [T*V, S, E]."""
        blocks = x.reshape(x.shape[0], -1, self.block * x.shape[2]).index_select(1, self.units)
        return blocks.reshape(-1, self.mask.shape[2], x.shape[2])

    def join(self, x: Tensor, grids: int) -> Tensor:
        """[T*V, S, E] -> [T, P, E]."""
        blocks = x.reshape(grids, -1, self.block * x.shape[2]).index_select(1, self.slots)
        return blocks.reshape(grids, -1, x.shape[2])


class WindowBlock(nn.Module):
    """Pre-norm attention within a window or a grid, then the gated MLP."""

    def __init__(self, config: WindowTowerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        width = config.embed_dim
        inner = config.mlp_width
        self.norm1 = RMSNorm(width, NORM_EPS)
        self.norm2 = RMSNorm(width, NORM_EPS)
        self.q, self.k, self.v, self.proj = (Linear(width, width, bias=True) for _ in range(4))
        self.gate = Linear(width, inner, bias=True)
        self.up = Linear(width, inner, bias=True)
        self.down = Linear(inner, width, bias=True)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, windows: Windows | None) -> Tensor:
        """[T, P, E] -> the same shape; `windows` None sees all of a grid."""
        normed = self.norm1(hidden)
        ops = torch.ops.framefusion
        query = ops.rotary(self.q(normed), cos, sin, self.num_heads)
        key = ops.rotary(self.k(normed), cos, sin, self.num_heads)
        states = (query, key, self.v(normed))
        if windows is None:
            out = ops.full_attention(*states, self.num_heads)
        else:
            out = ops.masked_attention(*(windows.cut(x) for x in states), windows.mask, self.num_heads)
            out = windows.join(out, hidden.shape[0])
        hidden = hidden + self.proj(out)
        normed = self.norm2(hidden)
        return hidden + self.down(ops.swish(self.gate(normed), 1.0) * self.up(normed))  # type: ignore[no-any-return]


class Qwen25VLTower(Tower):
    """Patch embedding, blocks, merger."""

    def __init__(self, config: WindowTowerConfig) -> None:
        super().__init__()
        merged = config.embed_dim * config.merge_size**2
        self.config = config
        self.patch_embed = Linear(config.patch_width, config.embed_dim, bias=False)
        self.blocks = nn.ModuleList(WindowBlock(config) for _ in range(config.depth))
        self.merger_norm = RMSNorm(config.embed_dim, NORM_EPS)
        self.merger_fc1 = Linear(merged, merged, bias=True)
        self.merger_fc2 = Linear(merged, config.out_width, bias=True)

    def signature(self) -> Signature:
        """Any number of temporal grids, of patches in whole merge blocks, and of windows."""
        block = self.config.merge_size**2
        half = self.config.head_dim // 2
        side = self.config.window**2
        patches = 20 * block
        windows = 7  # unlike every other size, so that no axis looks equal to another
        blocks = torch.export.Dim("merge_blocks", min=2, max=1 << 20)
        tables = (meta(1, patches, half), meta(1, patches, half))
        places = (meta(windows, side, dtype=torch.int64), meta(20, dtype=torch.int64))
        return Signature(
            (
                self.patches(3, patches, self.config.patch_width),
                *tables,
                *places,
                meta(windows, 1, side * block, side * block),
            ),
            ({0: FREE, 1: blocks * block}, {1: blocks * block}, {1: blocks * block}, {0: FREE}, {0: blocks}, {0: FREE}),
            ("patches", "cos", "sin", "units", "slots", "mask"),
            axes={
                "patches": {0: "grids", 1: "patches"},
                "cos": {1: "patches"},
                "sin": {1: "patches"},
                "units": {0: "windows"},
                "slots": {0: "merge_blocks"},
                "mask": {0: "windows"},
            },
        )

    def forward(self, patches: Tensor, cos: Tensor, sin: Tensor, units: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        """See the module's table."""
        grids = patches.shape[0]
        cos = cos.expand(grids, -1, -1)
        sin = sin.expand(grids, -1, -1)
        windows = Windows(units.flatten(), slots, mask.repeat(grids, 1, 1, 1), self.config.merge_size**2)
        hidden = self.patch_embed(self.normalised(patches))
        for layer, block in enumerate(self.blocks):
            hidden = block(hidden, cos, sin, None if layer in self.config.full_layers else windows)
        merged = self.merger_norm(hidden).reshape(-1, self.merger_fc1.weight.shape[0])  # [T*P/4, 4E]
        return self.merger_fc2(nn.functional.gelu(self.merger_fc1(merged)))  # type: ignore[no-any-return]
