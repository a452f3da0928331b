"""What all vision towers have in common: a graph of patches that says itself how it is to be traced.

    patches   [N, P, W]           float   N pictures (or temporal grids) of one size, P patches of W numbers each
    ...                                   what its kind adds, shared by the N pictures (runtime/media/tower_kinds.py)
    -> tokens [N*Q, D]            float   Q rows of the LLM's width a picture
       deepstack [K, N*Q, D]      float   where the family has such features

Knows no checkpoint, no preprocessing and no family.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

FREE = torch.export.Dim.DYNAMIC


@dataclass(frozen=True, eq=False)
class TowerSignature:
    """Example inputs of a tower and their names, in order.

    Attributes:
        arguments: on the meta device; only shapes and types count.
        dynamic_shapes: as torch.export takes them, one for each argument.
        inputs: names of the graph's inputs.
        outputs: names of the graph's outputs.
        axes: input -> axis -> word for it, for whoever opens the graph; an axis that is fixed stays a number.
    """

    arguments: tuple[Tensor, ...]
    dynamic_shapes: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ("tokens",)
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


class Tower(nn.Module):
    """A vision tower with its projector."""

    @abstractmethod
    def signature(self) -> TowerSignature:
        """How to trace it."""


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An example input."""
    return torch.empty(*shape, dtype=dtype, device="meta")
