"""MiniCPM-V 2.6's vision graph: a NaViT encoder for pictures of any shape, then a perceiver resampler to Q rows each.

    patches   [N, P, W]   float   P = rows * columns patches of N pictures of one size, in raster order
    places    [P]         int64   row of the position table for each patch
    sincos    [1, P, D]   float   2-D sine-cosine table of the patches, added to the resampler's keys
    -> tokens [N*Q, D]    float

                      +sincos-> k --+
    x -> kv_proj -> ln_kv -+-> v ---+-> attention -> attn_proj -> ln_post -> proj
                            query --+       query: learned, the same for all pictures, projected when it is exported

Knows no checkpoint and no preprocessing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from framefusion.export.graphs.graph_plan import FREE, Signature, meta
from framefusion.export.graphs.layers import LayerNorm, Linear, weight
from framefusion.export.graphs.tower import Tower
from framefusion.export.graphs.vit import VitConfig, VitEncoder

RESAMPLER_EPS = 1e-6
"""Of the resampler's norms: fixed in the released code."""


@dataclass(frozen=True)
class ResamplerConfig:
    """Geometry of the resampler, read from the checkpoint."""

    queries: int
    width: int  # of the LLM
    num_heads: int


class Resampler(nn.Module):
    """Learned queries look at all patches of a picture."""

    def __init__(self, config: ResamplerConfig, patch_width: int) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.query = weight(config.queries, width)
        self.kv_proj = Linear(patch_width, width, bias=False)
        self.ln_kv = LayerNorm(width, RESAMPLER_EPS)
        self.ln_post = LayerNorm(width, RESAMPLER_EPS)
        self.k, self.v, self.attn_proj = (Linear(width, width, bias=True) for _ in range(3))
        self.proj = Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, sincos: Tensor) -> Tensor:
        """[N, P, E] -> [N, Q, D]."""
        hidden = self.ln_kv(self.kv_proj(hidden))
        query = self.query.expand(hidden.shape[0], -1, -1)
        key = self.k(hidden + sincos)
        value = self.v(hidden)
        out = torch.ops.framefusion.full_attention(query, key, value, self.num_heads)
        return self.proj(self.ln_post(self.attn_proj(out)))  # type: ignore[no-any-return]


class MiniCpmVTower(Tower):
    """Encoder with its last norm, then the resampler."""

    def __init__(self, encoder: VitConfig, resampler: ResamplerConfig) -> None:
        super().__init__()
        self.encoder = VitEncoder(encoder)
        self.resampler = Resampler(resampler, encoder.width)
        self.width = resampler.width

    def forward(self, patches: Tensor, places: Tensor, sincos: Tensor) -> Tensor:
        """See the module's table."""
        rows: Tensor = self.resampler(self.encoder(self.normalised(patches), places), sincos)
        return rows.reshape(-1, self.width)

    def signature(self) -> Signature:
        """Pictures and patches are free."""
        return Signature(
            arguments=(
                self.patches(2, 6, self.encoder.config.patch_width),
                meta(6, dtype=torch.int64),
                meta(1, 6, self.width),
            ),
            dynamic_shapes=({0: FREE, 1: FREE}, {0: FREE}, {1: FREE}),
            inputs=("patches", "places", "sincos"),
            axes={"patches": {0: "pictures", 1: "patches"}, "places": {0: "patches"}, "sincos": {1: "patches"}},
        )
