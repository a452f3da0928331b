"""A fixed schedule from clips: medians of what the adaptive policy does, and a bundle that meets the cost with it."""

from dataclasses import replace
from pathlib import Path

import pytest

from framefusion.errors import BudgetError, VideoError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.calibrate import calibrate, median_shares, merge_shares
from framefusion.export.plan.build_plan import BuildOptions, BuildPlan
from framefusion.reduction.budget import cost_of_schedule
from framefusion.reduction.policy import CallRecord

OPTIONS = BuildOptions(reduction="fixed", cost=0.5, similarity_lower_bound=0.3, max_input_len=512, max_text_len=64)


def test_shares_of_a_run_end_with_its_last_merge() -> None:
    history = [
        CallRecord(0, "merge", 110, 70, 100, 60),
        CallRecord(1, "merge", 70, 55, 60, 45),
        CallRecord(2, "none", 55, 55, 45, 45),
        CallRecord(3, "prune", 55, 30, 45, 20),
    ]
    assert merge_shares(history) == [0.4, 0.25]
    assert merge_shares(history[2:]) == []


def test_medians_count_a_clip_that_has_ended_as_zero() -> None:
    assert median_shares([[0.4, 0.2], [0.6], [0.5, 0.1, 0.1]]) == (0.5, 0.1)
    assert median_shares([[], []]) == ()


def test_calibrated_schedule_meets_the_cost(checkpoint: Path, film: Path) -> None:
    source = Checkpoint(checkpoint)
    options = calibrate(source, OPTIONS, [film, film])
    schedule = BuildPlan(source, options).reduction.schedule
    assert schedule is not None
    assert schedule.merge_shares, "a film with a still background merges at the embeddings"
    num_layers = BuildPlan(source, options).config.num_layers
    cost = cost_of_schedule(schedule.merge_shares, schedule.prune_layer, schedule.prune_share, num_layers)
    assert cost == pytest.approx(0.5, abs=1e-9)


def test_without_clips_it_is_refused(checkpoint: Path) -> None:
    with pytest.raises(BudgetError, match="0 clips"):
        calibrate(Checkpoint(checkpoint), OPTIONS, [])


def test_a_clip_that_is_no_video_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no film")
    with pytest.raises(VideoError):
        calibrate(Checkpoint(checkpoint), OPTIONS, [tmp_path / "notes.txt"])


@pytest.mark.slow
def test_weights_of_one_dialect_alone_have_the_schedule_of_the_others(checkpoint: Path, film: Path) -> None:
    """The gqa dialect has no floats of 8 bits."""
    options = replace(OPTIONS, dialect="portable")
    in_floats = calibrate(Checkpoint(checkpoint), options, [film])
    in_float8 = calibrate(Checkpoint(checkpoint), replace(options, weights="fp8"), [film])
    assert in_float8 == replace(in_floats, weights="fp8", merge_shares=in_float8.merge_shares)
    assert in_float8.merge_shares == pytest.approx(in_floats.merge_shares, abs=0.05)
