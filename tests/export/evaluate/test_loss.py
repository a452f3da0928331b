"""Points that quantized weights lose: counted by hand here, and a build that loses more ends without a bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from framefusion.errors import BudgetError, CheckFailedError, EvaluationError
from framefusion.export.build import build
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.evaluate.acceptance.loss import Acceptance, check_loss, doubt, points_lost
from framefusion.export.evaluate.questions import Question, read_questions
from framefusion.export.options import BuildOptions
from framefusion.export.report.inspection import weight_facts
from framefusion.runtime.format.manifest import LossRecord
from tools.tiny.make_clips import make_clips

TRAINED = Path(__file__).parents[2] / "models" / "tiny_qwen2_vl"


def loss(points: float) -> LossRecord:
    return LossRecord("framefusion", 0.3, 100, 90, 90 - round(points), points, points - 4, points + 4)


def test_only_more_than_is_allowed_is_refused(tmp_path: Path) -> None:
    check_loss([loss(-1), loss(2)], 2.0, tmp_path)
    with pytest.raises(CheckFailedError, match=r"loses 3\.0 points at cost 0\.3 .* 90 .* 87 quantized"):
        check_loss([loss(3), loss(2)], 2.0, tmp_path)


def test_what_few_questions_do_not_show_is_said() -> None:
    assert doubt([loss(-1), loss(-3)], 3.0) == ""
    assert (
        "100 questions do not show that at most 2 points are lost: at cost 0.3 the 95 % interval reaches 3.0"
        in doubt([loss(-1), loss(-3)], 2.0)
    )


def test_no_question_and_no_quantized_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no question"):
        Acceptance((), 1.0)
    accepted = Acceptance((Question("first", "film", "What?", ("nothing",)),), 1.0)
    with pytest.raises(BudgetError, match="give --weights"):
        build(Checkpoint(TRAINED), tmp_path / "bundle", BuildOptions(), acceptance=accepted)
    assert not list(tmp_path.glob("bundle*"))


@pytest.mark.slow
def test_a_build_that_loses_more_is_not_published(tmp_path: Path) -> None:
    make_clips(tmp_path / "clips", 2)
    questions = tuple(read_questions(tmp_path / "clips" / "questions.jsonl", None))
    options = BuildOptions(weights="int8", reduction="none", max_frames=4, num_decoder_layer=3)
    place = tmp_path / "bundle"
    # 1. what is more than allowed, as anything is here, ends the build: nothing has the output's name
    with pytest.raises(CheckFailedError, match="it was not published"):
        build(Checkpoint(TRAINED), place, options, verify=False, acceptance=Acceptance(questions, -101.0))
    assert not place.exists()
    # 2. with more allowed the same build goes on from its parts; what is lost is kept beside how weights are stored
    built = build(Checkpoint(TRAINED), place, options, verify=False, acceptance=Acceptance(questions, 100.0))
    record = built.manifest.quantization
    assert record is not None
    (found,) = record.losses
    assert (found.reducer, found.cost, found.questions) == ("none", 1.0, 2)
    assert found.points == pytest.approx(100 * (found.right_in_floats - found.right_quantized) / 2, abs=1e-3)
    assert "points lost on 2 questions" in weight_facts(built.manifest)["text"]
    # 3. a bundle beside itself loses nothing
    (none,) = points_lost(built.folder, built.folder, questions)
    assert none.points == 0
    assert none.right_in_floats == found.right_quantized
