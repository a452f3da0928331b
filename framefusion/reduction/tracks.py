"""Tracks: the tokens that show one place of the picture through time, read off the labels.

A label is a token's patch_type: 0 .. P-1 for a place in its frame, -1 for text and everything structural. The tokens of
one label, in sequence order, are a track. Similarity compares each token with the one before it in its track.

Knows nothing of budgets, thresholds or which tokens go: what precedes what, and how alike the two are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TEXT = -1
# Below every cosine: the similarity of a token that has nothing it could merge into.
DISSIMILAR = -2.0
# Cosines from here on are 1 but for rounding. Separators and still pictures repeat one row many times: which of them
# merges must not hang on the last bit of a sum, which differs from one machine to the next.
IDENTICAL = 1 - 1e-6

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

_ROWS_AT_ONCE = 512  # of two gathered copies: both stay in cache at 3584 channels


def request_labels(labels: npt.ArrayLike) -> IntArray:
    """Return the labels of one request as reduction uses them: checked, and the last token counted as text.  [S]

    The last token is the query: importance is its attention and the logits are its own, so it never goes.

    Raises:
        ValueError: labels with more than one axis, or below -1.
    """
    array = np.array(labels, dtype=np.int64)  # a copy: the caller's own array is left alone
    if array.ndim != 1:
        raise ValueError(f"labels have shape {array.shape}; give one label per token, [S]")
    if array.size and array.min() < TEXT:
        raise ValueError(f"label {array.min()} is below {TEXT}; give {TEXT} for text and 0 upwards for patches")
    array[-1:] = TEXT
    return array


def track_order(labels: IntArray) -> IntArray:
    """Return the permutation that sorts tokens by track, in sequence order within each, text last.  [S]"""
    if labels.size and labels.max() < 0xFFFF:
        # numpy sorts 16-bit integers by radix, several times faster; -1 becomes the largest of them.
        return np.argsort(labels.astype(np.uint16), kind="stable")
    return np.argsort(np.where(labels == TEXT, np.iinfo(np.int64).max, labels), kind="stable")


def previous_in_track(labels: IntArray, order: IntArray | None = None) -> IntArray:
    """Return the index of the token before each one in its track, -1 where there is none.  [S]"""
    order = track_order(labels) if order is None else order
    previous = np.full(labels.size, -1, dtype=np.int64)
    by_track = labels[order]
    follows = (by_track[1:] == by_track[:-1]) & (by_track[1:] != TEXT)
    previous[order[1:][follows]] = order[:-1][follows]
    return previous


def count_visual(labels: IntArray) -> int:
    """Return the number of visual tokens among labels [S]."""
    return int(np.count_nonzero(labels != TEXT))


def count_tracks(labels: IntArray) -> int:
    """Return the number of tracks among labels [S]: visual tokens that have none before them."""
    return int(np.unique(labels[labels != TEXT]).size)


def longest_track(labels: IntArray) -> int:
    """Return the length of the longest track of labels [S], 0 without visual tokens: no run is longer."""
    visual = labels[labels != TEXT]
    return int(np.unique(visual, return_counts=True)[1].max()) if visual.size else 0


def place_in_track(labels: IntArray) -> IntArray:
    """Return how many tokens of its track precede each token: its time; -1 for text.  [S]"""
    order = track_order(labels)
    by_track = labels[order]
    starts = np.flatnonzero(np.diff(by_track, prepend=TEXT - 1))
    lengths = np.diff(starts, append=labels.size)
    place = np.empty(labels.size, dtype=np.int64)
    place[order] = np.arange(labels.size) - np.repeat(starts, lengths)
    return np.where(labels == TEXT, TEXT, place)


def frame_numbers(labels: IntArray) -> IntArray:
    """Return the frame of each visual token of a whole prompt, counted from 0; -1 for text.  [S]

    A frame ends where the next visual token has another time. Pictures that follow each other have time 0 alike and
    count as one frame.
    """
    time = place_in_track(labels)
    visual = np.flatnonzero(labels != TEXT)
    frames = np.full(labels.size, TEXT, dtype=np.int64)
    frames[visual] = np.cumsum(np.diff(time[visual], prepend=time[visual][:1]) != 0)
    return frames


def compact(labels: IntArray, kept: IntArray) -> IntArray:
    """Return the labels of the kept tokens, in sequence order.  [K]"""
    return labels[kept]


def compact_order(order: IntArray, kept: IntArray) -> IntArray:
    """Return the track order of the kept tokens without sorting again.  [K]"""
    place = np.full(order.size, -1, dtype=np.int64)
    place[kept] = np.arange(kept.size)
    moved = place[order]
    return moved[moved >= 0]


def track_similarity(hidden: npt.NDArray[np.floating], labels: IntArray) -> FloatArray:
    """Return the cosine of each token to the one before it in its track, in fp32.  hidden [S, D] -> [S]

    Tokens without a previous one, and pairs with a zero token, get DISSIMILAR.
    """
    previous = previous_in_track(labels)
    similarity = np.full(labels.size, DISSIMILAR, dtype=np.float32)
    tokens = np.flatnonzero(previous >= 0)
    for start in range(0, tokens.size, _ROWS_AT_ONCE):
        rows = tokens[start : start + _ROWS_AT_ONCE]
        similarity[rows] = _cosine(hidden[rows], hidden[previous[rows]])
    return similarity


def snap_identical(similarity: FloatArray) -> FloatArray:
    """Return the similarity with identical tokens at exactly 1, so that they tie and the first ones go.  [S]"""
    return np.where(similarity >= IDENTICAL, np.float32(1), similarity)


def _cosine(left: npt.NDArray[np.floating], right: npt.NDArray[np.floating]) -> FloatArray:
    a = left.astype(np.float32, copy=False)
    b = right.astype(np.float32, copy=False)  # fp16 products overflow
    dot = np.einsum("sd,sd->s", a, b)
    aa = np.einsum("sd,sd->s", a, a)
    bb = np.einsum("sd,sd->s", b, b)
    scale = np.sqrt(aa) * np.sqrt(bb)
    cosine = np.full(scale.shape, DISSIMILAR, dtype=np.float32)
    np.divide(dot, scale, out=cosine, where=scale > 0)
    return cosine
