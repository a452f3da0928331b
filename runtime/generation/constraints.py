"""Which tokens may not come next, from the ids that are there: repeated n-grams and forbidden sequences.

As transformers' NoRepeatNGramLogitsProcessor and NoBadWordsLogitsProcessor decide it. Knows no logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def banned_by_ngrams(size: int, ids: NDArray[np.int64]) -> list[int]:
    """Tokens that would end an n-gram of `size` tokens that `ids` [S] holds already."""
    if size < 1 or ids.size < size:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(ids, size)
    repeated = (windows[:, :-1] == ids[ids.size - size + 1 :]).all(axis=1)
    banned: list[int] = windows[repeated, -1].tolist()
    return banned


def banned_by_sequences(sequences: Iterable[Sequence[int]], ids: NDArray[np.int64]) -> list[int]:
    """Last tokens of those sequences whose other tokens `ids` [S] ends with."""
    banned = []
    for sequence in sequences:
        before = list(sequence[:-1])
        if len(before) <= ids.size and ids[ids.size - len(before) :].tolist() == before:
            banned.append(sequence[-1])
    return banned
