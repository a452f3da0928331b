from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest

from framefusion.errors import StorageError
from framefusion.runtime.batch.answers import AnswerFile

SETTINGS = {"bundle": "digest", "cost": 0.3}


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_goes_on_where_one_ended(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, SETTINGS) as answers:
        answers.add("a", {"id": "a", "text": "é"})
        answers.add("b", {"id": "b", "error": {"code": "VideoError"}})
        answers.add("c", {"custom_id": "c", "error": None})
    with path.open("ab") as file:
        file.write(b'{"id": "d", "te')  # killed while it wrote
    with AnswerFile(path, SETTINGS) as answers:
        assert answers.done == {"a", "b", "c"}
        assert answers.errors == 1
        answers.add("d", {"id": "d"})
    assert [row.get("id") or row["custom_id"] for row in rows(path)] == ["a", "b", "c", "d"]


def test_errors_can_be_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, SETTINGS) as answers:
        answers.add("a", {"id": "a", "error": {"code": "VideoError"}})
        answers.add("b", {"id": "b"})
    with AnswerFile(path, SETTINGS, retry_errors=True) as answers:
        assert answers.done == {"b"}
        answers.add("a", {"id": "a"})
        assert answers.errors == 0
    assert rows(path) == [{"id": "b"}, {"id": "a"}]


def test_answers_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, SETTINGS) as answers:
        answers.add("a", {"id": "a"})
    with pytest.raises(StorageError, match=r"cost was 0\.3 and is 0\.5"):
        AnswerFile(path, {**SETTINGS, "cost": 0.5})
    assert rows(path) == [{"id": "a"}]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "out.jsonl", SETTINGS), pytest.raises(StorageError, match="another run writes"):
        AnswerFile(tmp_path / "out.jsonl", SETTINGS)
    with AnswerFile(tmp_path / "out.jsonl", SETTINGS):
        pass


def test_what_is_somebody_elses_stays(tmp_path: Path) -> None:
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine")
    with pytest.raises(StorageError, match="of no batch"):
        AnswerFile(foreign, SETTINGS)
    link = tmp_path / "link.jsonl"
    link.symlink_to(foreign)
    with pytest.raises(StorageError, match="is a link"):
        AnswerFile(link, SETTINGS)
    assert foreign.read_text() == "mine"
    assert not list(tmp_path.glob("*.batch"))
    ours = tmp_path / "out.jsonl"
    with AnswerFile(ours, SETTINGS):
        pass
    ours.write_text("no answer\n")
    with pytest.raises(StorageError, match="line 1 is no answer"):
        AnswerFile(ours, SETTINGS)
    ours.with_name("out.jsonl.batch").write_text("[]")
    with pytest.raises(StorageError, match="no file of a batch"):
        AnswerFile(ours, SETTINGS)


def test_names_that_are_not_utf_8_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for _ in range(2):
        with AnswerFile(path, SETTINGS) as answers:
            for identity in ("\udcff.mp4", "\ud800", "é\n"):
                if identity not in answers.done:
                    answers.add(identity, {"id": identity})
    assert [row["id"] for row in rows(path)] == ["\udcff.mp4", "\ud800", "é\n"]


def test_of_runs_that_begin_at_once_one_writes(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    begun = Barrier(8)
    opened: list[AnswerFile] = []

    def begin(number: int) -> None:
        begun.wait()
        with suppress(StorageError):
            opened.append(AnswerFile(tmp_path / f"{number}.jsonl", SETTINGS))

    for number in range(20):
        threads = [Thread(target=begin, args=(number,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(opened) == 1
        with opened.pop():
            pass


def test_a_device_is_no_place(tmp_path: Path) -> None:
    """It would be read for earlier answers, and may never end."""
    pipe = tmp_path / "out.jsonl"
    os.mkfifo(pipe)
    with pytest.raises(StorageError, match="no plain file"):
        AnswerFile(pipe, SETTINGS)
    assert list(tmp_path.iterdir()) == [pipe]
