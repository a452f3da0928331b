"""Reduction inside the graph, at static shapes: what the fixed mode of a bundle compiles.

The numpy twin is policy.FixedReduction; both take the same tokens. Shapes never depend on values: a step maps S tokens
to out_len = S - (the largest drop), and what is cut at the right end is padding. It is made of compares, prefix sums,
gathers and scatters of permutations, because TensorRT refuses NonZero, scatters that reduce, and TopK beyond 3840:

    1. exactly K of the highest scores: search their limit digit by digit over all floats, then take ties in index order
    2. compaction: a prefix sum sends each kept token to its new place, and each dropped one behind them
    3. means of runs: a segmented scan by doubling, in track order; prefix sums over all rows would lose digits

TensorRT-RTX builds it as it is, for 13440 visual tokens too. A plug-in, its kernel inside the engine, would save some
launches; but no other runtime could check it, and ONNX Runtime checks this one against the twin.

Knows nothing of costs, models or calls: the counts come in as tensors, the lengths as constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from framefusion.reduction.tracks import DISSIMILAR, IDENTICAL, TEXT

_LARGEST = 2.0**126  # scores beyond it count as equal: the next power of two has no successor in fp32
_NUM_STRETCHES = 509  # 254 powers of two, negative and positive, and 0
_STRETCH_DIGITS = (64, 8, 1)  # stretches are searched 8 at a time
_MANTISSA_DIGITS = (4, 4, 4, 4, 4, 3)  # bits of each further digit: 23 in all, down to neighbouring floats

State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class TokenState(NamedTuple):
    """The tokens present and all that travels with them. Text comes with label -1, and so does padding at the end.

    Attributes:
        hidden: what merging averages: hidden states, and beside them what else follows a token by mean.  [S, D]
        cos: rotary table of each token.  [S, hd]
        sin: as cos.
        label: patch_type.  [S] int64
        order: indices sorted by track, then time, text and padding last (tracks.track_order).  [S] int64
        origin: place of each token in the prompt.  [S] int64
    """

    hidden: Tensor
    cos: Tensor
    sin: Tensor
    label: Tensor
    order: Tensor
    origin: Tensor


def track_similarity(state: TokenState) -> Tensor:
    """Return the cosine of each token to the one before it in its track, in fp32.  [S]

    Text, padding, the first of each track and pairs with a zero token get DISSIMILAR.
    """
    place = _inverse(state.order)
    before = _take(torch.cat((state.order[:1], state.order[:-1])), place)
    hidden = state.hidden.float()  # [S, D]
    norms = (hidden * hidden).sum(-1).sqrt()
    scale = norms * _take(norms, before)
    alike = _take(_follows(_take(state.label, state.order)), place) & (scale > 0)
    cosine = (hidden * _take(hidden, before)).sum(-1) / torch.where(alike, scale, 1.0)
    return torch.where(alike, cosine, DISSIMILAR)


def merge_by_rank(state: TokenState, similarity: Tensor, drop: Tensor, out_len: int, max_run: int) -> TokenState:
    """Merge the `drop` tokens most similar to the one before them in their track; each run becomes its mean.

    similarity [S] fp32, drop [1] int64; out_len is S less the largest drop, max_run the length of the longest track.
    """
    return TokenState(*torch.ops.framefusion.merge_by_rank(*state, similarity, drop, out_len, max_run))


def prune_by_rank(state: TokenState, importance: Tensor, drop: Tensor, out_len: int) -> TokenState:
    """Drop the `drop` visual tokens of least importance.

    importance [S] fp32, drop [1] int64; out_len is S less the largest drop.
    """
    return TokenState(*torch.ops.framefusion.prune_by_rank(*state, importance, drop, out_len))


def _merge_by_rank(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    label: Tensor,
    order: Tensor,
    origin: Tensor,
    similarity: Tensor,
    drop: Tensor,
    out_len: int,
    max_run: int,
) -> State:
    place = _inverse(order)
    snapped = torch.where(similarity >= IDENTICAL, 1.0, similarity)  # see tracks.snap_identical
    merged = exactly(drop, snapped, among=_take(_follows(_take(label, order)), place))
    means = _take(_run_means(_take(hidden, order), _take(merged, order), max_run), place)
    return _compact(TokenState(means, cos, sin, label, order, origin), ~merged, out_len)


def _prune_by_rank(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    label: Tensor,
    order: Tensor,
    origin: Tensor,
    importance: Tensor,
    drop: Tensor,
    out_len: int,
) -> State:
    visual = label != TEXT
    kept = exactly(visual.sum() - drop, importance, among=visual)
    return _compact(TokenState(hidden, cos, sin, label, order, origin), kept | ~visual, out_len)


def exactly(count: Tensor, scores: Tensor, among: Tensor) -> Tensor:
    """Mark the `count` highest scores among the tokens marked, ties to the lower index. NaN is lower than anything.

    count [1] int64, scores [S] fp32, among [S] bool -> [S] bool
    """
    ranked = torch.where(torch.isnan(scores), -_LARGEST, scores.float()).clamp(-_LARGEST, _LARGEST)
    limit, above_limit = _limit(torch.where(among, ranked, -2 * _LARGEST), count.float())
    above = among & (ranked >= above_limit)
    ties = among & (ranked >= limit) & ~above
    return above | (ties & (ties.cumsum(0) <= count - above.sum()))


def _limit(scores: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest float that at least `count` scores reach, and the float after it.  [S], [1] -> [1], [1]"""

    def digit(thresholds: Tensor) -> Tensor:  # [T] -> [1]: how many of the thresholds are still low enough
        reached = (scores >= thresholds[:, None]).float().sum(1)  # fp32 counts to 16 million without error
        return (reached >= count).sum(0, keepdim=True)

    stretches = _stretches(scores.device)
    stretch = torch.zeros(1, dtype=torch.int64, device=scores.device)
    for step in _STRETCH_DIGITS:
        candidates = (stretch + step * torch.arange(1, 8, device=scores.device)).clamp(max=_NUM_STRETCHES - 1)
        stretch = (stretch + step * digit(_take(stretches, candidates))).clamp(max=_NUM_STRETCHES - 2)
    limit = _take(stretches, stretch)
    width = _take(stretches, stretch + 1) - limit
    for bits in _MANTISSA_DIGITS:
        width = width * 2.0**-bits
        limit = limit + width * digit(limit + width * torch.arange(1, 2**bits, device=scores.device)).float()
    return limit, limit + width


def _stretches(device: torch.device) -> Tensor:
    """Return 0 and all powers of two, ascending: between two of them neighbouring floats are equally far apart.  [509]

    Built by doubling, which is exact; a constant tensor could not be traced inside a decomposition.
    """
    powers = torch.full((1,), 2.0**-126, device=device)
    for doubling in (1, 2, 4, 8, 16, 32, 64):
        powers = torch.cat((powers, powers * 2.0**doubling))  # up to 2^1
    powers = torch.cat((powers, powers[:126] * 2.0**64 * 2.0**64))  # up to 2^127; 2^128 is no float
    return torch.cat((-powers.flip(0), torch.zeros_like(powers[:1]), powers))


def _follows(label_by_track: Tensor) -> Tensor:
    """Mark, in track order, the tokens that have one before them in their track.  [S] -> [S] bool"""
    same = (label_by_track[1:] == label_by_track[:-1]) & (label_by_track[1:] != TEXT)
    return torch.cat((torch.zeros_like(same[:1]), same))


def _run_means(hidden: Tensor, merged: Tensor, max_run: int) -> Tensor:
    """Return, in track order, each token's mean with the merged tokens that follow it.  [S, D], [S] -> [S+1, D]"""
    last = merged.shape[0]  # one row more, of zeros: what a token gathers whose run has ended
    tokens = torch.arange(last + 1, device=merged.device)
    run = _with_zero((~merged).cumsum(0))
    sums = _with_zero(hidden.float())
    lengths = _with_zero(torch.ones_like(run[:-1]))
    shift = 1
    while shift < max_run:
        further = (tokens + shift).clamp(max=last)  # where the sum of the next `shift` tokens lies
        further = torch.where(_take(run, further) == run, further, last)
        sums = sums + _take(sums, further)
        lengths = lengths + _take(lengths, further)
        shift *= 2
    return (sums / lengths.clamp(min=1)[:, None].float()).to(hidden.dtype)


def _with_zero(rows: Tensor) -> Tensor:
    return torch.cat((rows, torch.zeros_like(rows[:1])))


def _compact(state: TokenState, kept: Tensor, out_len: int) -> State:
    source = _inverse(_places(kept))[:out_len]
    by_track = _inverse(_places(_take(kept, state.order)))[:out_len]
    order = _take(_places(kept), _take(state.order, by_track))
    return (
        _take(state.hidden, source),
        _take(state.cos, source),
        _take(state.sin, source),
        _take(state.label, source),
        order,
        _take(state.origin, source),
    )


def _places(kept: Tensor) -> Tensor:
    """Return where each token goes: kept ones to the front in order, the others behind them.  [S] bool -> [S]"""
    before = kept.cumsum(0)  # kept tokens up to and including this one
    tokens = torch.arange(kept.shape[0], device=kept.device)
    return torch.where(kept, before - 1, before[-1:] + tokens - before)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index)  # indexing with [] becomes GatherND, this one Gather


def _inverse(permutation: Tensor) -> Tensor:
    tokens = torch.arange(permutation.shape[0], device=permutation.device)
    return torch.zeros_like(permutation).scatter(0, permutation, tokens)


def _fake(*operands: Any) -> State:
    """Outputs of either op by shape: the six tables of the state, each of out_len rows."""
    hidden, cos, sin, label, order, origin, _scores, _drop, out_len = operands[:9]  # merges have a tenth: max_run

    def rows_of(table: Tensor) -> Tensor:
        return table.new_empty((out_len, *table.shape[1:]))

    return rows_of(hidden), rows_of(cos), rows_of(sin), rows_of(label), rows_of(order), rows_of(origin)


torch.library.custom_op("framefusion::merge_by_rank", _merge_by_rank, mutates_args=()).register_fake(_fake)
torch.library.custom_op("framefusion::prune_by_rank", _prune_by_rank, mutates_args=()).register_fake(_fake)

DECOMPOSITIONS: dict[OpOverload, Callable[..., State]] = {
    torch.ops.framefusion.merge_by_rank.default: _merge_by_rank,
    torch.ops.framefusion.prune_by_rank.default: _prune_by_rank,
}
"""For `exported_program.run_decompositions`: puts the plain functions in place of the ops, before ONNX conversion."""
