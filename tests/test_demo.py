"""The demo's table says what was measured, and calls noise by its name."""

from __future__ import annotations

from typing import Any

import pytest

from tools.demo import comparison, timed


@pytest.mark.parametrize(
    ("dense", "reduced", "verdict"),
    [
        ((0.048, 0.050, 0.055), (0.013, 0.014, 0.02), "3.6x faster"),
        ((0.048, 0.050, 0.055), (0.047, 0.052, 0.06), "level: 48 to 55 ms, 47 to 60 ms"),
        ((0.048, 0.050, 0.055), (0.040, 0.041, 0.048), "level: 48 to 55 ms, 40 to 48 ms"),
        ((0.049, 0.050, 0.051), (0.047, 0.048, 0.0485), "level: 49 to 51 ms, 47 to 48 ms"),  # not "1.0x faster"
        ((0.010, 0.010, 0.011), (0.020, 0.020, 0.03), "2.0x slower"),
    ],
)
def test_a_difference_within_the_spread_of_both_is_none(
    dense: tuple[float, float, float], reduced: tuple[float, float, float], verdict: str
) -> None:
    assert timed("LLM prefill", dense, reduced)[3] == verdict


def way(text: str, kept: int, milliseconds: float, *, same: bool) -> dict[str, Any]:
    taken = {"min_s": milliseconds / 1000, "median_s": milliseconds / 1000, "max_s": milliseconds / 1000}
    stages = {"prefill": taken, "reduction": taken}
    return {
        "text": text, "visual_tokens_kept": kept, "kv_bytes": 1000 * kept, "first_token": taken, "stages": stages,
        "same_answer": same,
    }  # fmt: skip


def test_another_answer_is_said_to_be_one() -> None:
    facts = {"visual_tokens": 1000, "ways": [way("red", 1000, 40, same=True), way("blue\n", 300, 10, same=False)]}
    lines = comparison(facts, "red")
    assert lines[1].split() == ["answer", "red", "blue", "ANOTHER", "answer;", "right", "is:", "red"]
    assert lines[2].endswith("70 % fewer in the last layer")
    assert lines[4].split() == ["LLM", "prefill", "80", "ms", "20", "ms", "4.0x", "faster"]
    assert max(map(len, lines)) <= 80
