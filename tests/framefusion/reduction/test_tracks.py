"""Tracks, their order and the similarity along them."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from framefusion.reduction import tracks
from framefusion.reduction.tracks import IntArray

Labels = arrays(np.int64, st.integers(0, 60), elements=st.integers(-1, 5))


def previous_by_hand(labels: IntArray) -> list[int]:
    last: dict[int, int] = {}
    previous = []
    for index, label in enumerate(labels.tolist()):
        previous.append(last.get(label, -1) if label >= 0 else -1)
        last[label] = index
    return previous


@settings(max_examples=80)
@given(Labels)
def test_previous_in_track(labels: IntArray) -> None:
    assert tracks.previous_in_track(labels).tolist() == previous_by_hand(labels)


@settings(max_examples=80)
@given(Labels, st.booleans())
def test_track_order_is_stable_with_text_last(labels: IntArray, large: bool) -> None:
    labels = np.where(labels >= 0, labels + 70_000 * large, labels)  # beyond 16 bits
    expected = sorted(range(labels.size), key=lambda i: (labels[i] < 0, labels[i], i))
    assert tracks.track_order(labels).tolist() == expected


@settings(max_examples=80)
@given(Labels, st.randoms(use_true_random=False))
def test_compaction_keeps_labels_and_order_in_step(labels: IntArray, random: Random) -> None:
    kept = np.array([i for i in range(labels.size) if random.random() < 0.6], dtype=np.int64)
    compacted = tracks.compact(labels, kept)
    assert compacted.tolist() == labels[kept].tolist()
    order = tracks.compact_order(tracks.track_order(labels), kept)
    assert order.tolist() == tracks.track_order(compacted).tolist()


def test_counts() -> None:
    labels = np.array([-1, 0, 1, -1, 0, 7, 0, -1])
    assert (tracks.count_visual(labels), tracks.count_tracks(labels), tracks.longest_track(labels)) == (5, 3, 3)
    text = np.full(3, tracks.TEXT)
    assert (tracks.count_visual(text), tracks.count_tracks(text), tracks.longest_track(text)) == (0, 0, 0)


def test_request_labels_copies_and_spares_the_last_token() -> None:
    given_labels = np.array([0, 1, 0], dtype=np.int16)
    assert tracks.request_labels(given_labels).tolist() == [0, 1, -1]
    assert given_labels.tolist() == [0, 1, 0]
    assert tracks.request_labels([]).tolist() == []


@pytest.mark.parametrize(("labels", "message"), [([[0]], r"shape \(1, 1\)"), ([0, -2], "label -2 is below -1")])
def test_labels_that_are_none_are_refused(labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tracks.request_labels(labels)


def test_similarity_of_firsts_text_and_zero_tokens() -> None:
    hidden = np.array([[1, 0], [3, 4], [0, 0], [8, 6], [1, 1], [2, 2], [5, 0]], dtype=np.float32)
    labels = np.array([-1, 0, 1, 0, 1, 1, -1])
    expected = [-2, -2, -2, 0.96, -2, 1, -2]  # token 4 follows the zero token 2
    np.testing.assert_allclose(tracks.track_similarity(hidden, labels), expected, rtol=1e-6)


def test_similarity_of_many_rows_matches_float64() -> None:
    random = np.random.default_rng(0)
    labels = np.tile(np.arange(70), 20)
    hidden = random.normal(size=(1400, 33)).astype(np.float16)
    previous = hidden.astype(np.float64)[:-70]
    current = hidden.astype(np.float64)[70:]
    cosine = (previous * current).sum(1) / np.linalg.norm(previous, axis=1) / np.linalg.norm(current, axis=1)
    np.testing.assert_allclose(tracks.track_similarity(hidden, labels)[70:], cosine, atol=1e-6)


def test_long_films_take_no_table_of_all_pairs() -> None:
    """Of 300,000 tokens it would have 90 billion places."""
    labels = np.r_[np.full(20, -1), np.tile(np.arange(500), 600), np.full(30, -1)]
    assert tracks.previous_in_track(labels).tolist() == previous_by_hand(labels)
