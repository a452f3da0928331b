"""Which prompts are held out: nothing of them is among those that codes are chosen by."""

from __future__ import annotations

from pathlib import Path

import pytest

from framefusion.export.eager.calibration import held_out as module
from framefusion.export.eager.calibration.prompts import CalibrationPrompt, file_digests
from framefusion.runtime.text.prompt import Turn, Visual


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Five contents; the last file is a copy of the first."""
    paths = [tmp_path / f"{number}.mp4" for number in range(6)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%d" % (number % 5))
    return paths


def held_out(prompts: list[CalibrationPrompt]) -> list[int]:
    return module.held_out(prompts, file_digests(prompts))


def about(*films: Path, question: str = "What happens?") -> CalibrationPrompt:
    return CalibrationPrompt((Turn("user", (*(Visual.VIDEO for _ in films), question)),), films, question)


def test_every_fourth_film_is_held_out_with_all_that_is_said_about_it(files: list[Path]) -> None:
    assert held_out([about(file) for file in files[:3]]) == []
    assert held_out([about(file) for file in files[:5]]) == [3]
    twice = [about(file, question=text) for file in files[:4] for text in ("Who?", "What?")]
    assert held_out(twice) == [6, 7]


def test_a_copy_and_a_film_beside_another_are_of_one_group(files: list[Path]) -> None:
    prompts = [about(files[0]), about(files[1]), about(files[2]), about(files[5]), about(files[3])]
    assert held_out(prompts) == [4]
    assert held_out([*prompts[:4], about(files[3], files[1]), about(files[4])]) == [5]


def test_of_few_films_every_fourth_question_is_held_out_and_no_equal_one(files: list[Path]) -> None:
    (film, copy) = (files[0], files[5])
    assert held_out([about(film)] * 8) == []
    questions = [about(film, question=text) for text in ("Who?", "What?", "Where?", "When?")]
    assert held_out(questions) == [3]
    assert held_out([*questions, about(copy, question="When?")]) == [3, 4]


def test_without_films_texts_are_told_apart() -> None:
    assert held_out([about(question=str(number)) for number in range(4)]) == [3]
