"""LLaVA's vision tower: encoder, pooling by a matrix, projector of two layers. Knows no checkpoint.

    patches  [N, P, W]   float   N pictures of the one size that the position table is for
    pool     [Q, P]      float   what each row takes of each patch; an identity pools nothing
    -> tokens [N*Q, D]   float

The rows of `pool` sum to one, so a pooling that follows the projector may be done before its last layer already.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from framefusion.export.graphs.graph_plan import FREE, Signature, meta
from framefusion.export.graphs.layers import Linear
from framefusion.export.graphs.tower import Tower
from framefusion.export.graphs.vit import VitConfig, VitEncoder

_PICTURES = 3
_ROWS = 5  # example sizes


@dataclass(frozen=True)
class LlavaTowerConfig:
    """Geometry of encoder and projector."""

    vit: VitConfig
    out_width: int
    pool_first: bool  # before the projector; else as if after it

    @property
    def num_patches(self) -> int:
        """Patches of a picture, the class token not counted."""
        return self.vit.num_positions - self.vit.class_token


class LlavaTower(Tower):
    """Encoder, pooling, projector."""

    def __init__(self, config: LlavaTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VitEncoder(config.vit)
        self.fc1 = Linear(config.vit.width, config.out_width, bias=True)
        self.fc2 = Linear(config.out_width, config.out_width, bias=True)

    def forward(self, patches: Tensor, pool: Tensor) -> Tensor:
        """See the module's table."""
        hidden = self.encoder(self.normalised(patches))
        if self.config.vit.class_token:
            hidden = hidden[:, 1:]
        if self.config.pool_first:
            hidden = pool @ hidden
        hidden = nn.functional.gelu(self.fc1(hidden))
        if not self.config.pool_first:
            hidden = pool @ hidden
        return self.fc2(hidden).flatten(0, 1)  # type: ignore[no-any-return]

    def signature(self) -> Signature:
        """Any number of pictures and of rows."""
        patches = self.config.num_patches
        return Signature(
            arguments=(self.patches(_PICTURES, patches, self.config.vit.patch_width), meta(_ROWS, patches)),
            dynamic_shapes=({0: FREE}, {0: FREE}),
            inputs=("patches", "pool"),
            axes={"patches": {0: "pictures"}, "pool": {0: "rows"}},
        )
