"""Two models on the same questions: points lost, what is kept otherwise, and what cannot be set side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import EvaluationError
from framefusion.export.build import build
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.evaluate.against.beside import Counterpart, beside, check_complete, render_beside
from framefusion.export.evaluate.answering import Answer, Condition, Setup
from framefusion.export.evaluate.evaluation import evaluate
from framefusion.export.evaluate.questions import Question, read_questions
from framefusion.export.evaluate.scoring import newcombe
from framefusion.export.options import BuildOptions
from tests.bundles import COST
from tests.commands import assert_refused, export

UNDER = Condition("framefusion", 0.3)
QUESTIONS = {name: Question(name, "all", name, (name,)) for name in "abcd"}


def answers(texts: str, kept: str) -> dict[Any, Answer]:
    """An answer a question, and of each what is kept: two hexadecimal digits, eight tokens."""
    pairs = zip(QUESTIONS, texts, kept.split(), strict=True)
    return {(name, UNDER.reducer, UNDER.cost): Answer(text, 0.3, 8, 4, (), bits) for name, text, bits in pairs}


@pytest.fixture(scope="module")
def questions(film: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    row = {"video": str(film), "question": "What happens in this video?", "answer": "nothing"}
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


def test_points_lost_and_kept_tokens_add_up() -> None:
    theirs = Counterpart("floats", "engine", answers("abcx", "f0 f0 f0 f0"))
    found = beside(QUESTIONS, [UNDER], answers("axxx", "f0 e1 f0 0f"), theirs)
    (row,) = found["conditions"]
    assert (row["only_first_right"], row["only_second_right"], row["difference"]) == (2, 0, 0.5)
    assert row["interval"] == pytest.approx(newcombe(1, 2, 0, 1), abs=1e-6)
    assert row["other_answers"] == 2
    assert row["kept"] == {
        "agree": pytest.approx((1 + 0.75 + 1 + 0) / 4),
        "same": {"questions": 2, "right": 1, "right_there": 2},
        "other": {"questions": 2, "right": 0, "right_there": 1},
    }
    text = "\n".join(render_beside(found))
    assert "68.75 %" in text
    assert "framefusion at cost 0.3: 2 questions keep other tokens, 0 of them right, 1 there" in text


@pytest.mark.parametrize("kept", ["f0 f0 f0 f0f0", "f0 f0 f0 ''"])
def test_of_prompts_that_cannot_be_compared_no_kept_tokens_are_reported(kept: str) -> None:
    theirs = Counterpart("floats", "engine", answers("abcd", kept.replace("''", "f0f0f0")))
    (row,) = beside(QUESTIONS, [UNDER], answers("abcd", "f0 f0 f0 f0"), theirs)["conditions"]
    assert "kept" not in row
    assert render_beside({"model": "m", "engine": "e", "conditions": [row]})


def test_a_missing_answer_is_named() -> None:
    theirs = Counterpart("floats", "engine", answers("abcd", "f0 f0 f0 f0"))
    check_complete(theirs, QUESTIONS, [UNDER])
    with pytest.raises(EvaluationError, match=r"floats has no answer to question a by framefusion at cost 0\.5"):
        check_complete(theirs, QUESTIONS, [UNDER, Condition("framefusion", 0.5)])


def test_a_bundle_loses_nothing_against_its_own_answers(bundle: Path, questions: Path, tmp_path: Path) -> None:
    """Refusals too: each is told from the file alone."""
    output = tmp_path / "out.json"
    setup = Setup(str(bundle), max_new_tokens=1, threads=1)
    evaluate(setup, read_questions(questions), [Condition("framefusion", COST)], output=output)
    flags = ("--questions", questions, "--threads", 1, "--against", output, "--cost", COST)
    result = export("eval", bundle, *flags, "--max-new-tokens", 1, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["against"]
    (row,) = found["conditions"]
    assert found["model"] == str(bundle)
    assert (row["difference"], row["other_answers"], row["kept"]["agree"]) == (0, 0, 1)
    assert_refused(export("eval", bundle, *flags), EvaluationError, "its max_new_tokens is 1, here it is 16")
    assert_refused(
        export("eval", bundle, *flags[:-1], "1", "--max-new-tokens", 1), EvaluationError, "has no answer to question 1"
    )
    (tmp_path / "none.json").write_text("{}")
    assert_refused(
        export("eval", bundle, *flags, "--against", tmp_path / "none.json"), EvaluationError, "none.json is no evaluat"
    )


@pytest.mark.slow
def test_a_quantised_bundle_is_set_beside_the_one_in_floats(
    checkpoint: Path, bundle: Path, questions: Path, tmp_path: Path
) -> None:
    options = BuildOptions(weights="int4", cost=COST, similarity_lower_bound=0.9, depth=1, max_input_len=512)
    folder = build(Checkpoint(checkpoint), tmp_path / "int4", options, verify=False).folder
    flags = ("--questions", questions, "--threads", 1, "--max-new-tokens", 4, "--against", bundle)
    result = export("eval", folder, *flags)
    assert result.exit_code == 0, result.output
    assert f"Against {bundle} by onnxruntime" in result.stdout
    found = json.loads(export("eval", folder, *flags, "--json").stdout)["against"]
    assert [row["cost"] for row in found["conditions"]] == [1.0, COST]
    assert 0 < found["conditions"][1]["kept"]["agree"] <= 1
