"""The vision tower of Qwen3-VL with its mergers: learned positions resampled to the grid, features of inner layers too.

    patches   [T, P, C*tps*p*p]   float   P = h*w patches in merge-block order
    cos, sin  [1, P, hd/2]        float   2-D RoPE of those patches
    corners   [4, P]              int64   rows of the position table around each patch
    shares    [4, P]              float   what each of them counts
    -> tokens    [T*P/merge^2, out]      float
       deepstack [K, T*P/merge^2, out]   float   merged features of K inner layers, where the checkpoint has any

Knows no checkpoint and no preprocessing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from framefusion.export.families.qwen2_vl.tower import NORM_EPS, TowerBlock, TowerConfig
from framefusion.export.graphs.graph_plan import FREE, Signature, meta
from framefusion.export.graphs.layers import LayerNorm, Linear, weight
from framefusion.export.graphs.tower import Tower


@dataclass(frozen=True, kw_only=True)
class DeepstackTowerConfig(TowerConfig):
    """Geometry of the tower, read from the checkpoint."""

    num_positions: int  # rows of the position table, a square
    deepstack_layers: tuple[int, ...]  # layers after which features are taken, in the order of their mergers


class Merger(nn.Module):
    """Norm and MLP over whole merge blocks; the norm is of each patch, or of the block."""

    def __init__(self, config: TowerConfig, *, norm_of_block: bool) -> None:
        super().__init__()
        self.merged = config.embed_dim * config.merge_size**2
        self.norm_of_block = norm_of_block
        self.norm = LayerNorm(self.merged if norm_of_block else config.embed_dim, NORM_EPS)
        self.fc1 = Linear(self.merged, self.merged, bias=True)
        self.fc2 = Linear(self.merged, config.out_width, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, P, E] -> [T*P/merge^2, out]."""
        if self.norm_of_block:
            blocks = self.norm(hidden.reshape(-1, self.merged))
        else:
            blocks = self.norm(hidden).reshape(-1, self.merged)
        return self.fc2(nn.functional.gelu(self.fc1(blocks)))  # type: ignore[no-any-return]


class Qwen3VLTower(Tower):
    """Patch embedding, positions, blocks, mergers."""

    def __init__(self, config: DeepstackTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = Linear(config.patch_width, config.embed_dim, bias=True)
        self.positions = weight(config.num_positions, config.embed_dim)
        self.blocks = nn.ModuleList(TowerBlock(config) for _ in range(config.depth))
        self.merger = Merger(config, norm_of_block=False)
        self.deepstack_mergers = nn.ModuleList(Merger(config, norm_of_block=True) for _ in config.deepstack_layers)

    def signature(self) -> Signature:
        """Any number of temporal grids, and of patches in whole merge blocks."""
        block = self.config.merge_size**2
        half = self.config.head_dim // 2
        patches = 20 * block  # unlike every other size, so that no axis looks equal to another
        axis = torch.export.Dim("merge_blocks", min=2, max=1 << 20) * block
        inputs = ("patches", "cos", "sin", "corners", "shares")
        tables = (meta(1, patches, half), meta(1, patches, half))
        return Signature(
            (
                self.patches(3, patches, self.config.patch_width),
                *tables,
                meta(4, patches, dtype=torch.int64),
                meta(4, patches),
            ),
            ({0: FREE, 1: axis}, *({1: axis} for _ in inputs[1:])),
            inputs,
            ("tokens", "deepstack") if self.config.deepstack_layers else ("tokens",),
            axes={name: {1: "patches"} for name in inputs} | {"patches": {0: "grids", 1: "patches"}},
        )

    def forward(
        self, patches: Tensor, cos: Tensor, sin: Tensor, corners: Tensor, shares: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See the module's table."""
        grids = patches.shape[0]
        layers = self.config.deepstack_layers
        cos = cos.expand(grids, -1, -1)
        sin = sin.expand(grids, -1, -1)
        hidden = self.patch_embed(self.normalised(patches)) + self._resampled(corners, shares)
        features: dict[int, Tensor] = {}
        for layer, block in enumerate(self.blocks):
            hidden = block(hidden, cos, sin)
            if layer in layers:
                features[layer] = self.deepstack_mergers[layers.index(layer)](hidden)
        tokens = self.merger(hidden)
        return (tokens, torch.stack([features[layer] for layer in sorted(layers)])) if layers else tokens

    def _resampled(self, corners: Tensor, shares: Tensor) -> Tensor:
        """The position table at the patches, [P, E]."""
        rows = self.positions.index_select(0, corners.flatten()).reshape(4, -1, self.config.embed_dim)
        return (rows * shares[:, :, None]).sum(0)
