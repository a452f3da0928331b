"""What a static graph cannot take is refused on the host, before it runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from framefusion.errors import BudgetError, PromptError
from framefusion.reduction.budget import FixedSchedule
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest import FixedRecord, Manifest, ReductionRecord
from framefusion.runtime.generation.fixed_prefill import drops_of_prompt


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    """Up to 64 tokens of text and 1000 visual ones: 700 merge, then 30 of the 300 left are pruned."""
    reduction = ReductionRecord("fixed", schedule=FixedSchedule((0.7,), 1, 0.1))
    return replace(
        Bundle(bundle, verify=False).manifest, reduction=reduction, fixed=FixedRecord(64, 1000, 16, (), (700, 30))
    )


def prompt(frames: int, places: int, text: int = 8) -> NDArray[np.int64]:
    return np.concatenate([np.tile(np.arange(places), frames), np.full(text, -1)])


def test_drops_follow_the_schedule(manifest: Manifest) -> None:
    assert drops_of_prompt(manifest, prompt(10, 100, text=64)) == [700, 30]
    assert drops_of_prompt(manifest, prompt(10, 50)) == [350, 15]


def test_a_still_picture_that_overfills_a_step_is_refused(manifest: Manifest) -> None:
    """350 tokens of one frame fit the room left by the merge, but the prune would drop 35 of them."""
    with pytest.raises(BudgetError, match="drops 35 tokens"):
        drops_of_prompt(manifest, prompt(1, 350))


@pytest.mark.parametrize(
    ("labels", "flag"),
    [(prompt(2, 4, text=65), "--max-text-len"), (prompt(11, 100), "--max-input-len"), (prompt(17, 2), "--max-frames")],
)
def test_a_prompt_beyond_the_sizes_names_the_flag(manifest: Manifest, labels: NDArray[np.int64], flag: str) -> None:
    with pytest.raises(PromptError, match=flag):
        drops_of_prompt(manifest, labels)
