"""The clips that the pages tell a reader to draw: their questions are a file that `ff-export eval` reads."""

from pathlib import Path

from framefusion.export.questions import read_questions
from tools.tiny.make_clips import make_clips


def test_the_questions_of_drawn_clips_are_read_by_an_evaluation(tmp_path: Path) -> None:
    rows = make_clips(tmp_path, 2)
    questions = read_questions(tmp_path / "questions.jsonl")
    assert [(question.text, question.answers, question.type) for question in questions] == [
        (row["question"], (row["answer"],), row["kind"]) for row in rows
    ]
    assert [[Path(file).name for _, file in question.visuals] for question in questions] == [
        ["clip_000.mp4"],
        ["clip_001.mp4"],
    ]
