"""Files of questions: what is read, what is asked, what is right, and which lines are refused by their number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import EvaluationError
from framefusion.export.evaluate.questions import Question, choice_of, normalised, read_questions
from framefusion.runtime.text.prompt import Turn, Visual

PLAIN = {"video": "a.mp4", "question": "What color is it?", "answer": "red"}
CHOICES = ("A cat", "Two dogs", "a bird.")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.png", "c.png"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def written(folder: Path, *rows: Any) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "questions.jsonl"


def test_a_film_and_pictures_are_read_in_order(folder: Path) -> None:
    pictures = {"images": ["b.png", "c.png"], "question": "Same?", "answer": ["no", "different"], "type": "pair"}
    film, pair = read_questions(written(folder, PLAIN, "", pictures))
    assert film == Question("1", "all", "What color is it?", ("red",), (), ((Visual.VIDEO, folder / "a.mp4"),))
    assert film.turns() == [Turn("user", (Visual.VIDEO, "What color is it?"))]
    assert pair.turns("Be brief.") == [
        Turn("system", ("Be brief.",)),
        Turn("user", (Visual.IMAGE, Visual.IMAGE, "Same?")),
    ]
    assert (pair.name, pair.type, pair.files) == ("3", "pair", [folder / "b.png", folder / "c.png"])


def test_choices_are_asked_with_letters(folder: Path) -> None:
    row = PLAIN | {"choices": list(CHOICES), "answer": "B", "id": "q7"}
    (question,) = read_questions(written(folder, row))
    assert question.prompt.splitlines()[:4] == [PLAIN["question"], "A. A cat", "B. Two dogs", "C. a bird."]
    assert question.answers == ("Two dogs",)
    assert question.is_right("(B)")
    assert question.is_right("two  dogs.")
    assert not question.is_right("A")
    assert not question.is_right("")


@pytest.mark.parametrize(
    ("said", "choice"),
    [
        ("B", 1), ("b", 1), ("(B)", 1), ("B.", 1), ("B) Two dogs", 1), ("B: dogs", 1), ("Answer: C", 2),
        ("The answer is (C).", 2), ("A bird", 2), ("A cat!", 0), ("A dog", None), ("D", None), ("both A and B", None),
        ("Bats", None), ("", None), ("option B.", 1),
    ],
)  # fmt: skip
def test_a_choice_is_named_by_words_or_by_a_letter_alone(said: str, choice: int | None) -> None:
    assert choice_of(said, CHOICES) == (None if choice is None else CHOICES[choice])


def test_free_answers_are_compared_without_case_space_and_outer_punctuation() -> None:
    question = Question("1", "all", "Who?", ("Mr. Smith", "smith"))
    assert all(map(question.is_right, ("mr. smith", " Mr.  Smith. ", "SMITH", '"Smith"')))
    assert not any(map(question.is_right, ("Mr Smith", "Smithers", "", "not Smith")))
    assert normalised("?!") == ""


def test_limit_takes_the_first_questions_and_reads_no_further(folder: Path) -> None:
    path = written(folder, PLAIN, PLAIN | {"question": "Where?"}, "no json")
    assert [question.name for question in read_questions(path, 2)] == ["1", "2"]
    with pytest.raises(EvaluationError, match="line 3: no JSON"):
        read_questions(path)


def test_a_key_follows_words_and_files(folder: Path) -> None:
    def key(**changes: Any) -> str:
        return read_questions(written(folder, PLAIN | changes))[0].key

    assert key() == key(type="color", id="x")
    keys = {key(), key(question="Which color?"), key(answer="blue"), key(choices=["red", "blue"])}
    (folder / "a.mp4").write_bytes(b"another film")
    assert len(keys | {key()}) == 5
    (question,) = read_questions(written(folder, PLAIN))
    (folder / "a.mp4").unlink()
    with pytest.raises(EvaluationError, match=r"a\.mp4 cannot be read"):
        _ = question.key


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", "holds a list, expected an object"),
        ('{"video": ', "no JSON"),
        (PLAIN | {"vidoe": "a.mp4"}, "unknown key 'vidoe'; known are video, images"),
        ({"question": "What?", "answer": "x"}, "has neither video nor images"),
        (PLAIN | {"images": ["b.png"]}, "has video and images, give one"),
        (PLAIN | {"video": "gone.mp4"}, r"gone\.mp4 is missing"),
        (PLAIN | {"video": 3}, "video is 3"),
        ({"images": [], "question": "What?", "answer": "x"}, r"images are \[\]"),
        (PLAIN | {"question": " "}, "question is ' '"),
        ({"video": "a.mp4", "question": "What?"}, "answer is None"),
        (PLAIN | {"answer": "..."}, r"answer is '\.\.\.'"),
        (PLAIN | {"answer": []}, r"answer is \[\]"),
        (PLAIN | {"type": 4}, "type is 4"),
        (PLAIN | {"choices": ["red"]}, "two or more different texts"),
        (PLAIN | {"choices": ["red", "Red."]}, "two or more different texts"),
        (PLAIN | {"choices": "red"}, "two or more different texts"),
        (PLAIN | {"choices": ["red", "blue"], "answer": "C"}, "answer 'C' is none of the choices"),
        (PLAIN | {"choices": [str(n) for n in range(27)]}, "27 choices, at most 26"),
        (PLAIN | {"id": "1"}, "id '1' is that of line 1, too"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(folder: Path, row: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=rf"questions\.jsonl, line 2: .*{message}"):
        read_questions(written(folder, PLAIN, row))


def test_files_that_hold_no_question_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="holds no question"):
        read_questions(written(tmp_path, "", " "))
    with pytest.raises(EvaluationError, match=r"gone\.jsonl cannot be read"):
        read_questions(tmp_path / "gone.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="binary cannot be read"):
        read_questions(tmp_path / "binary")
