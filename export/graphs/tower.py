"""What all vision towers have in common: a graph of patches that says itself how it is to be traced.

    patches   [N, P, W]           uint8   N pictures (or temporal grids) of one size, P patches of W levels each; floats
                                          that are normalised where the tower has no `levels`
    ...                                   what its kind adds, shared by the N pictures (runtime/media/tower_kinds.py)
    -> tokens [N*Q, D]            float   Q rows of the LLM's width a picture
       deepstack [K, N*Q, D]      float   where the family has such features

Knows no checkpoint, no preprocessing and no family.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from framefusion.export.graphs.graph_plan import GraphModule, meta

CHANNELS = 3


class Levels(NamedTuple):
    """What the levels 0..255 of each channel become: `level * scale + shift`, in fp32."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]


class Tower(GraphModule):
    """A vision tower with its projector.

    Attributes:
        levels: of a tower that takes bytes; None for one that takes floats, normalised before.
    """

    levels: Levels | None = None

    @property
    def takes_bytes(self) -> bool:
        """Whether the first input of the graph is uint8."""
        return self.signature().arguments[0].dtype is torch.uint8

    def patches(self, *shape: int) -> Tensor:
        """An example of the tower's first input [N, P, W], on the meta device."""
        return meta(*shape, dtype=torch.float32 if self.levels is None else torch.uint8)

    def normalised(self, patches: Tensor) -> Tensor:
        """Patches as the checkpoint's processor gives them, in the tower's type: [N, P, W] -> [N, P, W].

        Bytes come as they lie in pictures, channels last, and become channel by channel.
        """
        if self.levels is None:
            return patches
        count, number, width = patches.shape
        # 1. Floats at once: TensorRT takes bytes for inputs and for nothing else.
        planes = patches.float().reshape(count, number, width // CHANNELS, CHANNELS).transpose(2, 3)
        # 2. A channel after the other, and one vector for all patches: on a CPU that is the fastest way to say it.
        scale = _of_channels(self.levels.scale, width, patches.device)
        shift = _of_channels(self.levels.shift, width, patches.device)
        values = planes.reshape(count, number, width) * scale + shift
        return values.to(next(self.parameters()).dtype)


def _of_channels(numbers: tuple[float, ...], width: int, device: torch.device) -> Tensor:
    """[W], a run for each channel; made in the graph, since a tensor of the meta device would hold no numbers."""
    return torch.cat([torch.full((width // CHANNELS,), number, device=device) for number in numbers])
