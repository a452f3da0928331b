"""`ff-export plan --calibrate`: what films put into a build, and films that a build would refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framefusion.errors import BudgetError, EvaluationError, PromptError, VideoError
from tests.commands import assert_refused, export
from tests.films import write_film, write_picture

TRAINED = Path(__file__).parents[2] / "models" / "tiny_qwen2_vl"
LAYERS = ("--num-decoder-layer", 2, "--depth", 0, "--cost", 0.6)


def plan(*flags: object) -> dict[str, object]:
    result = export("plan", TRAINED, *LAYERS, "--no-check", *flags, "--json")
    assert result.exit_code == 0, result.output
    facts: dict[str, object] = json.loads(result.stdout)
    return facts


@pytest.mark.slow
def test_what_films_put_into_codes_is_said(film: Path, tmp_path: Path) -> None:
    before = plan("--weights", "int4")
    films = [film, *(write_film(tmp_path / f"{seed}.mp4", seed=seed) for seed in range(1, 4))]
    facts = plan("--weights", "int4", *(flag for each in films for flag in ("--calibrate", each)))
    needs = facts["calibration"]
    assert before["calibration"] is None
    assert isinstance(needs, dict)
    assert needs["for"] == ["codes"]
    assert [row["files"] for row in needs["prompts"]] == [[str(each)] for each in films]
    assert needs["held_out"] == 1
    row = needs["prompts"][0]
    assert 0 < row["visual"] < row["tokens"]
    assert needs["rows"]["first_layer"] == 4 * (row["tokens"] + 32)
    assert needs["rows"]["last_layer"] == 4 * (row["tokens"] - row["visual"] + round(0.6 * row["visual"]) + 32)
    assert needs["answer"] == {"tokens": 32, "streamed": False}
    assert needs["disk"] > 2 * (4 * 128 * 96 + 3 * 128 * 384)  # a byte a weight
    assert facts["bytes"] == before["bytes"]  # films move codes and no size
    assert facts["disk"]["needed"] == before["disk"]["needed"] + needs["disk"]  # type: ignore[index]
    assert "error feedback over calibration films" in facts["weights"]["text"]  # type: ignore[index]
    text = export("plan", TRAINED, *LAYERS, "--weights", "int4", "--calibrate", film).stdout
    for phrase in (
        "codes of weights by 1 prompt about 1 file",
        "of one core, the answers besides",
        "search's: from 4 films or questions on some",
    ):
        assert phrase in text


@pytest.mark.slow
def test_a_schedule_and_scales_are_planned_by_films_too(film: Path, tmp_path: Path) -> None:
    fixed = ("--reduction", "fixed", "--max-input-len", 512, "--max-text-len", 64)
    assert_refused(export("plan", TRAINED, "--num-decoder-layer", 2, "--cost", 0.6, *fixed), BudgetError, "--calibrate")
    result = export("plan", TRAINED, "--num-decoder-layer", 2, "--cost", 0.6, *fixed, "--calibrate", film, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["calibration"]["for"] == ["schedule"]
    # of questions the films alone are run, each once
    questions = tmp_path / "mine.jsonl"
    lines = [{"video": str(film), "question": text, "answer": "a dog"} for text in ("Who?", "What?")]
    pictured = {"images": [str(write_picture(tmp_path / "a.png"))], "question": "What?", "answer": "noise"}
    questions.write_text("\n".join(map(json.dumps, [*lines, pictured])))
    again = export("plan", TRAINED, "--num-decoder-layer", 2, "--cost", 0.6, *fixed, "--calibrate", questions, "--json")
    assert json.loads(again.stdout)["calibration"]["prompts"] == json.loads(result.stdout)["calibration"]["prompts"]
    both = plan("--kv-cache-dtype", "int8", "--weights", "int4", "--calibrate", film)
    assert both["calibration"]["for"] == ["codes", "scales"]  # type: ignore[index]


@pytest.mark.slow
def test_films_that_a_build_refuses_a_plan_refuses(film: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no film")
    int4 = ("--weights", "int4", "--calibrate")
    assert_refused(export("plan", TRAINED, *LAYERS, *int4, text), VideoError, "notes.txt")
    assert_refused(export("plan", TRAINED, *LAYERS, *int4, tmp_path / "no.mp4"), VideoError, "no.mp4")
    picture = write_picture(tmp_path / "a.png")
    assert_refused(export("plan", TRAINED, *LAYERS, *int4, picture), VideoError, "a.png", "a file of questions")
    questions = tmp_path / "mine.jsonl"
    questions.write_text('{"video": "no.mp4", "question": "What?", "answer": "a dog"}')
    assert_refused(export("plan", TRAINED, *LAYERS, *int4, questions), EvaluationError, "line 1")
    row = {"images": [str(picture)], "question": "What? " * 5000, "answer": "noise", "id": "wordy"}
    questions.write_text(json.dumps(row))
    for command in (("plan",), ("build", "-o", tmp_path / "bundle")):
        result = export(*command, TRAINED, *LAYERS, *int4, questions)
        assert_refused(result, PromptError, "question wordy of", "leave it out")
    assert "choosing codes by 1 prompt\n" in result.output
    fixed = ("--reduction", "fixed", "--cost", 0.6, "--max-input-len", 64, "--max-text-len", 32)
    result = export("build", TRAINED, "-o", tmp_path / "bundle", *LAYERS, *fixed, "--calibrate", film)
    assert_refused(result, PromptError, f"{film}: the prompt has")
    assert "running 1 film to set" in result.output
    assert not (tmp_path / "bundle").exists()
    assert_refused(export("plan", TRAINED, *LAYERS, "--calibrate", text), BudgetError, "--reduction fixed", "adaptive")


@pytest.mark.slow
def test_what_no_schedule_mends_is_refused_as_that(film: Path, tmp_path: Path) -> None:
    """By the plan and the build alike, which does not call for the films that it has."""
    flags = ("--reduction", "fixed", "--kv-cache-dtype", "int8", "--calibrate", film)
    for command in (("plan", TRAINED), ("build", TRAINED, "-o", tmp_path / "bundle")):
        assert_refused(export(*command, *flags), BudgetError, "the fixed mode writes caches of floats", "adaptive")
    assert not (tmp_path / "bundle").exists()
