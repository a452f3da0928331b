"""The building blocks of the decoder in numpy, in fp64: what `ff-run doctor` compares a backend with.

    hidden [S, D]   query [S, H*hd]   key and value [S, Hkv*hd]   cos and sin [S, hd/2]   caches [Hkv, C, hd]

The tests compare them with transformers' own classes. Knows no backend, no graph and no type that anything is rounded
to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.reduction.plan import Plan
from framefusion.reduction.tracks import DISSIMILAR

Array = NDArray[np.float64]


def rms_norm(hidden: Array, weight: Array, eps: float) -> Array:
    """Root mean square norm over the channels (Zhang and Sennrich, arXiv 1910.07467).  [S, D] -> [S, D]"""
    scaled: Array = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + eps) * weight
    return scaled


def rotary(query: Array, cos: Array, sin: Array, heads: int) -> Array:
    """Rotary position embedding (Su et al., arXiv 2104.09864), rotate-half layout.  [S, H*hd] -> [S, H*hd]"""
    first, second = np.split(query.reshape(len(query), heads, -1), 2, axis=-1)
    turned = (first * cos[:, None] - second * sin[:, None], second * cos[:, None] + first * sin[:, None])
    return np.concatenate(turned, -1).reshape(query.shape)


def swish(hidden: Array, alpha: float) -> Array:
    """x * sigmoid(alpha * x).  [S, D] -> [S, D]"""
    activated: Array = hidden / (1 + np.exp(-alpha * hidden))
    return activated


def attention(query: Array, keys: Array, values: Array, visible: NDArray[np.bool_]) -> Array:
    """Scaled dot product attention of groups of heads.  [S, H*hd], [Hkv, T, hd] twice, [S, T] -> [S, H*hd]"""
    groups, _, head_dim = keys.shape
    heads = query.reshape(len(query), groups, -1, head_dim)  # query head h reads keys of head h // (H / Hkv)
    weights = softmax(
        np.where(visible[:, None, None], np.einsum("sgqd,gtd->sgqt", heads, keys) / head_dim**0.5, -np.inf)
    )
    mixed: Array = np.einsum("sgqt,gtd->sgqd", weights, values).reshape(query.shape)
    return mixed


def softmax(scores: Array) -> Array:
    """Over the last axis."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    shares: Array = powers / powers.sum(-1, keepdims=True)
    return shares


def lower_right(length: int, total: int) -> NDArray[np.bool_]:
    """What `length` new tokens see of `total`, themselves the last: each sees itself and all before.  [S, T]"""
    frontier = np.arange(total - length, total)[:, None]
    visible: NDArray[np.bool_] = np.arange(total)[None] <= frontier
    return visible


def split_heads(rows: Array, heads: int) -> Array:
    """[S, n*hd] -> [n, S, hd]"""
    return rows.reshape(len(rows), heads, -1).swapaxes(0, 1)


def similarity(hidden: Array, previous: NDArray[np.int64]) -> Array:
    """Cosine of each token to the previous one of its track, DISSIMILAR where that is -1 or a norm is 0.  [S]"""
    before = hidden[np.maximum(previous, 0)]
    scale = np.linalg.norm(hidden, axis=-1) * np.linalg.norm(before, axis=-1)
    comparable = (previous >= 0) & (scale > 0)
    return np.where(comparable, (hidden * before).sum(-1) / np.where(comparable, scale, 1), DISSIMILAR)


def importance(query: Array, key: Array, last: int, rows: int, heads: int, groups: int) -> Array:
    """Attention that the `rows` tokens up to `last` pay to each token, mean over heads and rows.  [S]"""
    chosen = np.maximum(last - np.arange(rows), 0)
    keys = split_heads(key, groups)
    picked = query[chosen].reshape(rows, groups, heads // groups, -1)
    scores = np.einsum("rgqd,gtd->rgqt", picked, keys) / keys.shape[-1] ** 0.5
    visible = np.arange(len(query))[None] <= chosen[:, None]
    mean: Array = softmax(np.where(visible[:, None, None], scores, -np.inf)).mean((0, 1, 2))
    return mean


def reduced(rows: NDArray[Any], plan: Plan) -> Array:
    """What a plan makes of rows: those that stay, heads of runs as means of their runs.  [S, D] -> [K, D]"""
    result = rows[plan.kept].astype(np.float64)
    ends = np.append(plan.run_starts, plan.members.size)
    for run, slot in enumerate(plan.head_slots):
        members = plan.members[ends[run] : ends[run + 1]]
        result[slot] = rows[members].astype(np.float64).mean(0)
    return result
