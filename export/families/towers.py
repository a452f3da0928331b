"""What a family says of a checkpoint's vision tower: the module, where its weights are, and what its graph wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from framefusion.export.graph.tower import Tower
from framefusion.export.weights import AnySource


@dataclass(frozen=True)
class TowerPlan:
    """One checkpoint's tower.

    Attributes:
        module: on the meta device.
        sources: of its parameters, by name.
        kind: what the graph wants beside patches: see `framefusion.runtime.vision`.
        patch_width: numbers of a patch.
        head_dim, embed_dim, mlp_width: geometry, for tables and for planning memory.
        out_width: of a row; it must be the LLM's.
        patches_per_token: patches that the tower sees for each row of a video.
        deepstack: further outputs, one for each of the first layers of the LLM.
        settings: numbers of the kind.
        extra_rows: name -> key of learned rows [D] that a prompt shows and no tokenizer knows.
    """

    module: Tower
    sources: Mapping[str, AnySource]
    kind: str
    patch_width: int
    head_dim: int
    embed_dim: int
    mlp_width: int
    out_width: int
    patches_per_token: float
    deepstack: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    extra_rows: Mapping[str, str] = field(default_factory=dict)
