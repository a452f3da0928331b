"""Similarity, importance and plans on the hidden states of a live model.

On the CPU similarity and plans are numpy's, as the memory is shared and numpy's one pass is several times faster than
torch's kernels for each step; elsewhere their torch twins. Knows rows of tokens, no layer and no call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from framefusion.ops import kernels as ops
from framefusion.reduction import plan as host_plan
from framefusion.reduction import tracks
from framefusion.reduction.plan import Plan
from framefusion.reduction.tracks import FloatArray, IntArray


def similarity(hidden: Tensor, labels: IntArray) -> Tensor:
    """Cosine of each token to the one before it in its track, in fp32: numpy's on the CPU.  [1, S, D] -> [S]"""
    if hidden.device.type == "cpu":
        return torch.from_numpy(tracks.track_similarity(_array(hidden[0]), labels))
    scores: Tensor = ops.similarity(hidden, torch.from_numpy(tracks.previous_in_track(labels)).to(hidden.device))
    return scores


def importance(query: Tensor, key: Tensor, scaling: float, rows: int) -> Tensor:
    """Attention that the last `rows` of K tokens pay to each of the K, in fp32, mean over heads and rows.

    Args:
        query: of the tokens present.  [H, K, hd]
        key: of all tokens that they attend to, those present last.  [Hkv, T, hd]
        scaling: of the scores, as the model has it.
        rows: see the op.

    Returns:
        [K], of the tokens present.
    """
    heads, present, width = query.shape
    kv_heads, attended, _ = key.shape
    factor = scaling * width**0.5  # the op divides by the root of the head's width
    q = query.transpose(0, 1).flatten(1) * factor
    q = nn.functional.pad(q, (0, 0, attended - present, 0))[None]
    k = key.transpose(0, 1).flatten(1)[None]
    last = torch.tensor([attended - 1], device=key.device)
    scores: Tensor = ops.importance(q, k, last, rows, heads, kv_heads)
    return scores[-present:]


def features_of(hidden: Tensor) -> FloatArray:
    """Hidden states of one request as a reducer reads them: in fp32 on the host.  [S, D]"""
    features: FloatArray = hidden.detach().float().cpu().numpy()
    return features


def apply_plan(hidden: Tensor, plan: Plan) -> Tensor:
    """Apply a plan to S tokens, on the CPU by reduction.plan.apply_plan itself.  [>= S, D] -> [K, D]

    Rows behind the S tokens are padding and go.
    """
    if hidden.device.type == "cpu":
        return torch.from_numpy(host_plan.apply_plan(_array(hidden), plan)).to(hidden.dtype)
    return apply_plan_on_device(hidden, plan)


def apply_plans(hidden: Tensor, plans: Sequence[Plan], length: int) -> Tensor:
    """Apply a plan to each row of a batch; shorter ones repeat their last token.  [B, S, D] -> [B, length, D]"""
    rows = [apply_plan(row, plan) for row, plan in zip(hidden, plans, strict=True)]
    if len(rows) == 1:
        return rows[0][None]
    return torch.stack([torch.cat([row, row[-1:].expand(length - len(row), -1)]) for row in rows])


def apply_plan_on_device(hidden: Tensor, plan: Plan) -> Tensor:
    """The torch twin of reduction.plan.apply_plan: the same sums in the same order, one transfer of indices.

    hidden [>= S, D] -> [K, D]
    """
    reduced = hidden[torch.from_numpy(plan.kept).to(hidden.device)]
    runs = plan.runs_longest_first()
    if not runs.heads.size:
        return reduced
    # all indices in one tensor, cut again on the device: one transfer
    tables = (runs.heads, runs.slots, runs.lengths, *runs.followers)
    indices = torch.from_numpy(np.concatenate(tables)).to(hidden.device)
    heads, slots, lengths, *followers = torch.split(indices, [table.size for table in tables])
    means = hidden[heads].float()
    for members in followers:
        means[: members.numel()] += hidden[members]
    reduced[slots] = (means / lengths[:, None]).to(hidden.dtype)
    return reduced


def _array(hidden: Tensor) -> npt.NDArray[np.floating[Any]]:
    """On the CPU: the same memory, but for bf16, which numpy lacks."""
    array: npt.NDArray[np.floating[Any]] = (hidden.float() if hidden.dtype == torch.bfloat16 else hidden).numpy()
    return array
