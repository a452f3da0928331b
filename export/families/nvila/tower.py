"""NVILA's vision towers: a plain encoder, blocks of k x k patches side by side, a projector, and what is averaged.

    patches  [N, F*P, W]   float   N groups of F frames, P patches each in raster order
    pool     [Q, B]        float   what each row takes of each block, where the checkpoint pools within a frame
    -> tokens [N*Q, D]     float   Q = B, the blocks of a frame, without a pool

F is free: a video has as many frames to a row as the checkpoint pools, an image has one. The projector's first norm has
no weight and no bias: both are folded into the map after it, and so are copies of a frame's features side by side,
which have the mean and variance of one.

A tower of several scales sees an image in F tiles of all scales and gives rows for the T tiles of the finest one:

    patches  [N, F*P, W]   float
    taps     [K, S*T*P]    int     patches that meet in each place at each scale, see runtime/media/tiles/scales.py
    shares   [K, S*T*P]    float
    -> tokens [N*T*B, D]   float

Knows no checkpoint.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from framefusion.export.graphs.graph_plan import FREE, Signature, meta
from framefusion.export.graphs.layers import LayerNorm, Linear
from framefusion.export.graphs.tower import Tower
from framefusion.export.graphs.vit import VitConfig, VitEncoder

NORM_EPS = 1e-5
"""Of the projector's norms: torch's own default, which no configuration tells."""


@dataclass(frozen=True)
class NvilaTowerConfig:
    """Geometry, read from the checkpoint."""

    vit: VitConfig
    side: int  # patches along one side of a frame
    block: int  # patches along one side of a block
    widths: tuple[int, ...]  # outputs of the projector's maps, first to last
    pools: bool = False  # whether rows are pooled within a frame, by a matrix
    scales: int = 1  # of an image, whose features stand side by side
    taps: int = 1  # patches that may meet in one place

    @property
    def blocks(self) -> int:
        """Blocks along one side of a frame; the last ones may be padded."""
        return -(-self.side // self.block)


class NvilaTower(Tower):
    """Encoder, blocks, projector, mean over the frames of a group."""

    def __init__(self, config: NvilaTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.scales * config.vit.width
        self.folded_width = config.block**2 * self.width
        self.vit = VitEncoder(config.vit)
        inputs = (self.folded_width, *config.widths)
        self.maps = nn.ModuleList(Linear(*pair, bias=True) for pair in itertools.pairwise(inputs))
        # three maps, as the 3 x 3 projector has them, come with a norm between the first and the second
        self.norm = LayerNorm(config.widths[0], NORM_EPS) if len(config.widths) == 3 else None

    def forward(self, patches: Tensor, pool: Tensor | None = None) -> Tensor:
        """See the module's table."""
        rows = self.project(self.encode(patches))  # [N*F, B, D]
        rows = rows.reshape(patches.shape[0], -1, *rows.shape[1:])
        rows = rows.sum(1) / rows.shape[1]  # TensorRT refuses the axis of torch's mean, which is computed in the graph
        return (rows if pool is None else pool @ rows).flatten(0, 1)

    def encode(self, patches: Tensor) -> Tensor:
        """[N, F*P, W] -> [N*F, P, E]."""
        hidden: Tensor = self.vit(self.normalised(patches).reshape(-1, self.config.side**2, patches.shape[2]))
        return hidden

    def project(self, hidden: Tensor) -> Tensor:
        """[n, P, E] -> [n, B, D]."""
        x = self.maps[0](nn.functional.layer_norm(self._side_by_side(hidden), (self.folded_width,), eps=NORM_EPS))
        for index, following in enumerate(self.maps[1:]):
            x = nn.functional.gelu(x)
            if index == 0 and self.norm is not None:
                x = self.norm(x)
            x = following(x)
        return x  # type: ignore[no-any-return]

    def _side_by_side(self, hidden: Tensor) -> Tensor:
        """[n, side*side, E] -> [n, B, k*k*E]: row in block, column in block, channel; zeros beyond the edges."""
        side = self.config.side
        k = self.config.block
        blocks = self.config.blocks
        hidden = hidden.reshape(-1, side, side, self.width)
        if missing := blocks * k - side:
            hidden = nn.functional.pad(hidden, (0, 0, 0, missing, 0, missing))
        hidden = hidden.reshape(-1, blocks, k, blocks, k, self.width).transpose(2, 3)
        return hidden.reshape(-1, blocks * blocks, self.folded_width)

    def signature(self) -> Signature:
        """Two groups of three frames stand for any number of either."""
        in_frame = self.config.side**2
        frames = torch.export.Dim("frames", min=1)
        patches = self.patches(2, 3 * in_frame, self.config.vit.patch_width)
        shapes = ({0: FREE, 1: in_frame * frames},)
        axes = {"patches": {0: "groups", 1: "patches"}, "tokens": {0: "tokens"}}
        if not self.config.pools:
            return Signature((patches,), shapes, ("patches",), axes=axes)
        pool = meta(2, self.config.blocks**2)
        axes |= {"pool": {0: "rows"}}
        return Signature((patches, pool), (*shapes, {0: FREE}), ("patches", "pool"), axes=axes)


class NvilaScalesTower(NvilaTower):
    """The same for images of several scales; a frame of a video is one tile that stands for all scales."""

    def forward(self, patches: Tensor, taps: Tensor, shares: Tensor) -> Tensor:  # type: ignore[override]
        """See the module's table."""
        config = self.config
        groups = patches.shape[0]
        hidden = self.encode(patches).reshape(groups, -1, config.vit.width)  # [N, F*P, E]
        places = torch.zeros_like(hidden[:, :1])
        for tap in range(config.taps):  # one after the other: all at once would be as many times the memory
            places = places + hidden.index_select(1, taps[tap]) * shares[tap, :, None]
        places = places.reshape(groups, config.scales, -1, config.vit.width).transpose(1, 2)  # [N, T*P, S, E]
        return self.project(places).flatten(0, 1)

    def signature(self) -> Signature:
        """Two images of five tiles, three of them of the finest scale, stand for any."""
        config = self.config
        in_tile = self.config.side**2
        tiles = torch.export.Dim("tiles", min=1)
        finest = torch.export.Dim("finest", min=1)
        places = config.scales * in_tile
        arguments = (
            self.patches(2, 5 * in_tile, config.vit.patch_width),
            meta(config.taps, 3 * places, dtype=torch.int64),
            meta(config.taps, 3 * places),
        )
        shapes = ({0: FREE, 1: in_tile * tiles}, {1: places * finest}, {1: places * finest})
        axes = {"patches": {0: "images", 1: "patches"}, "taps": {1: "places"}, "shares": {1: "places"}}
        return Signature(arguments, shapes, ("patches", "taps", "shares"), axes=axes | {"tokens": {0: "tokens"}})
