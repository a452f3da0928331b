"""The canned request is the same on every machine, and has what reduction looks for."""

from __future__ import annotations

import hashlib

import numpy as np

from framefusion.reduction.tracks import track_similarity
from framefusion.runtime.proof.canned import CannedRequest, _splitmix, drawn, drawn_indices

REQUEST = CannedRequest(0, 7, 6, 2, 4, 9, 8, 0.25)


def test_the_generator_is_splitmix64() -> None:
    """The first numbers of the published generator from seed 0."""
    assert [int(number) for number in _splitmix(0, 0, 3)] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F,
    ]  # fmt: skip


def test_the_bits_are_the_same_everywhere() -> None:
    rows = REQUEST.visual_rows(1, 64)
    digest = hashlib.sha256(rows.astype("<f4").tobytes()).hexdigest()
    assert digest == "3b783c668eb8071eba1572e81ec6e54521eabdb32170c59985c3735e01e85afd"


def test_streams_and_seeds_are_others() -> None:
    streams = [drawn(seed, stream, 1000) for seed in (0, 1) for stream in (0, 1)]
    assert all(abs(np.corrcoef(a, b)[0, 1]) < 0.1 for i, a in enumerate(streams) for b in streams[:i])
    assert set(np.unique(drawn_indices(0, 0, 1000, 5))) == set(range(5))


def test_half_precision_holds_every_number() -> None:
    rows = REQUEST.visual_rows(0, 64)
    assert np.array_equal(rows, rows.astype(np.float16).astype(np.float32))
    bits = rows.view(np.uint32)
    assert not (bits & 0xFFFF).any()  # bf16 is the upper half of fp32


def test_tokens_repeat_exactly_in_part_or_not_at_all() -> None:
    labels = np.tile(np.arange(8), 6)
    similarity = track_similarity(REQUEST.visual_rows(0, 512)[0], labels)[8:]
    exact = np.count_nonzero(similarity > 0.9999)
    none = np.count_nonzero(np.abs(similarity) < 0.15)
    part = np.count_nonzero((similarity > 0.15) & (similarity < 0.4))
    assert exact + none + part == similarity.size
    assert min(exact, none, part) >= 3
    noisy = track_similarity(REQUEST.visual_rows(0, 512, 0.1)[0], labels)[8:]
    assert np.count_nonzero(noisy > 0.9999) == exact  # what repeats still does
