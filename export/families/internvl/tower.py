"""InternViT with InternVL's projector: the class token dropped, blocks of merge x merge patches joined.

    patches   [N, P, C*p*p]        float   N tiles of P = side * side patches, in raster order
    -> tokens [N*P/merge^2, out]   float   blocks in raster order

Knows no checkpoint and no preprocessing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from framefusion.export.graphs.graph_plan import FREE, Signature
from framefusion.export.graphs.layers import LayerNorm, Linear
from framefusion.export.graphs.tower import Tower
from framefusion.export.graphs.vit import VitConfig, VitEncoder

PROJECTOR_EPS = 1e-5


@dataclass(frozen=True)
class InternVLTowerConfig:
    """Geometry of the tower, read from the checkpoint."""

    vit: VitConfig
    side: int  # patches along one side of a tile
    merge_size: int
    hidden_width: int  # of the projector
    out_width: int

    @property
    def joined_width(self) -> int:
        """Channels of a block of patches."""
        return self.vit.width * self.merge_size**2


class InternVLTower(Tower):
    """Encoder without its class token, blocks of patches joined, norm, two layers."""

    def __init__(self, config: InternVLTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VitEncoder(config.vit)
        self.projector_norm = LayerNorm(config.joined_width, PROJECTOR_EPS)
        self.projector_fc1 = Linear(config.joined_width, config.hidden_width, bias=True)
        self.projector_fc2 = Linear(config.hidden_width, config.out_width, bias=True)

    def forward(self, patches: Tensor) -> Tensor:
        """Tiles to rows of the LLM's width; see the module."""
        config = self.config
        (tiles, count, _) = patches.shape
        blocks = config.side // config.merge_size
        hidden = self.encoder(self.normalised(patches))[:, -count:]  # without the class token
        # Joined channels: row in the block, column in the block, channel.
        split = hidden.reshape(tiles, blocks, config.merge_size, blocks, config.merge_size, config.vit.width)
        joined = split.transpose(2, 3).reshape(tiles * blocks * blocks, config.joined_width)
        out = nn.functional.gelu(self.projector_fc1(self.projector_norm(joined)))
        return self.projector_fc2(out)  # type: ignore[no-any-return]

    def signature(self) -> Signature:
        """Tiles are free, their size is not."""
        patches = self.patches(3, self.config.side**2, self.config.vit.patch_width)
        return Signature((patches,), ({0: FREE},), ("patches",), axes={"patches": {0: "tiles"}})
