"""What a family says of a checkpoint's vision tower: the module, where its weights are, and what its graph wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.weights import AnySource
from framefusion.export.graphs.tower import Tower
from framefusion.runtime.media.tower_kinds import TowerSettings


@dataclass(frozen=True)
class TowerPlan:
    """One checkpoint's tower.

    Attributes:
        module: on the meta device.
        sources: of its parameters, by name.
        settings: of its kind, which says what the graph takes beside patches and how many rows it gives.
        patch_width: numbers of a patch.
        head_dim, embed_dim, mlp_width: geometry, for tables and for planning memory.
        out_width: of a row; it must be the LLM's.
        patches_per_token: patches that the tower sees for each row of a video.
        deepstack: further outputs, one for each of the first layers of the LLM.
        extra_rows: name -> key of learned rows [D] that a prompt shows and no tokenizer knows.
        unused: pattern of keys, as of a shell -> why their tensors change nothing: blocks behind the one whose output
            is taken, norms and heads behind it.
    """

    module: Tower
    sources: Mapping[str, AnySource]
    settings: TowerSettings
    patch_width: int
    head_dim: int
    embed_dim: int
    mlp_width: int
    out_width: int
    patches_per_token: float
    deepstack: int = 0
    extra_rows: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)


BEHIND = "a block behind the one whose output is taken"
NORM_BEHIND = "the norm behind the last block, while the states before it are taken"
POOLING_HEAD = "the head that makes one vector of a whole picture"


def head_width(checkpoint: Checkpoint, width: int, heads: int) -> int:
    """Numbers of one head of a tower.

    Raises:
        CheckpointError: the heads do not share the width evenly, or RoPE and attention could not halve them.
    """
    if width % heads:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: {heads} heads of the vision tower do not share its width {width} "
            "evenly: config.json is another one's"
        )
    return width // heads


def run_of(checkpoint: Checkpoint, prefix: str, declared: int, depth: int | None = None) -> dict[str, str]:
    """Check how many blocks of a tower are stored, and say which of them no output needs.

    Args:
        checkpoint: of the tower.
        prefix: of its blocks' keys, with the dot.
        declared: blocks that config.json says it has.
        depth: the first ones, that are run; None for all.

    Returns:
        pattern -> reason, see `TowerPlan.unused`.

    Raises:
        CheckpointError: fewer blocks are stored than are run, or more than declared.
    """
    stored = checkpoint.count_blocks(prefix)
    needed = declared if depth is None else depth
    if not needed <= stored <= declared:
        raise CheckpointError(
            f"{checkpoint.folder} has {stored} blocks at {prefix}*, config.json says {declared} of which {needed} are "
            "run: one of the two is of another model"
        )
    return {f"{prefix}{block}.*": BEHIND for block in range(needed, stored)}
