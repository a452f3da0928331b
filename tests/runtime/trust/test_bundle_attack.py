"""Bundles mutated by seed: none answers silently otherwise, ends in a traceback, or takes its time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.attack.bundles import ATTACKS, attack


@pytest.mark.parametrize(
    ("trials", "seed"), [pytest.param(30, 0, id="few"), pytest.param(600, 1, id="many", marks=pytest.mark.slow)]
)
def test_mutated_bundles(bundle: Path, trials: int, seed: int) -> None:
    facts = attack(trials, seed, bundle)
    assert facts["failed"] == []
    assert sum(count for name, count in facts.items() if name.split(":")[0] in ATTACKS) == trials
    assert facts["manifest: refused"] > trials / 4
    assert facts["file: refused"] > 0
    assert facts["slowest_s"] < 20
