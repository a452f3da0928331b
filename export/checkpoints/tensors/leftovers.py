"""Which tensors of a checkpoint nobody reads: a tensor that no slot takes would be a model other than the one given.

Every tensor is taken by a segment, the tower, the embedding table or a learned row, or its name says why it changes
nothing: what transformers itself ignores, or what the tower of a family has behind the output that is taken. All
others are refused by name. Reads no weight and knows no family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.tensors.weight_formats import SHOWN

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint

RECOMPUTED: Mapping[str, str] = MappingProxyType(
    {
        "*rotary_emb.inv_freq": "the frequencies of RoPE, which every release computes anew",
        "*rotary_emb.original_inv_freq": "the same",
        "*rotary_emb.cos_cached": "a table of RoPE, which every release computes anew",
        "*rotary_emb.sin_cached": "the same",
        "*rotary_pos_emb.inv_freq": "the frequencies of a tower's RoPE",
        "*embeddings.position_ids": "the numbers 0, 1, 2, ... of a position table's rows",
    }
)
"""Pattern of a key -> what it is: buffers that transformers wrote once and ignores when it loads."""


def check_all_read(checkpoint: Checkpoint, taken: Iterable[str], unused: Mapping[str, str]) -> None:
    """Refuse a checkpoint with a tensor that no part of a bundle would hold.

    Args:
        checkpoint: whose tensors are counted.
        taken: keys that a bundle of all layers reads.
        unused: pattern of a key -> why its tensor changes nothing, see `TowerPlan.unused`.

    Raises:
        CheckpointError: naming the tensors.
    """
    read = set(taken)
    patterns = [*RECOMPUTED, *unused]
    left = sorted(
        key for key in checkpoint.files.keys() - read if not any(fnmatchcase(key, pattern) for pattern in patterns)
    )
    if not left:
        return
    rest = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
    names = ", ".join(left[:SHOWN]) + rest
    raise CheckpointError(
        f"{checkpoint.folder} holds tensors that no part of this model reads ({names}): the model is another one than "
        "config.json says, or these are left over from training; a bundle without them would answer differently"
    )
