from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import PromptError
from framefusion.runtime.batch.questions import Defaults, Shard, check_questions, read_questions
from framefusion.runtime.batch.run import over
from framefusion.runtime.request import MAX_NEW_TOKENS, Request
from framefusion.runtime.server.protocol.parts import MediaPart
from framefusion.runtime.server.protocol.request import ReductionDefaults
from framefusion.runtime.text.prompt import Visual

BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
OPENAI = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}


def lines(folder: Path, *rows: Any) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_lines_of_our_own(tmp_path: Path) -> None:
    source = lines(
        tmp_path,
        {"id": "a", "video": "a film.mp4", "prompt": "What?", "cost": 0.3, "max_tokens": 7, "label": "cats"},
        "",
        {"id": 2, "image": ["/x.png", "y.png"], "system": "Be brief."},
    )
    first, second = read_questions(source, Defaults(prompt="Default?"), Shard())
    assert (first.id, second.id) == ("a", "2")
    assert first.extra == {"label": "cats"}
    assert (first.chat.request.cost, first.chat.request.max_new_tokens) == (0.3, 7)
    (film,) = first.chat.media
    assert film == MediaPart(Visual.VIDEO, ((tmp_path / "a film.mp4").as_uri(),), "a film.mp4")
    assert [part.urls[0] for part in second.chat.media] == ["file:///x.png", (tmp_path / "y.png").as_uri()]
    assert second.chat.messages[0].role == "system"
    assert second.chat.messages[-1].parts[-1] == "Default?"


def test_a_folder_is_its_films_and_pictures(tmp_path: Path) -> None:
    for name in ("b.mp4", "a/c.PNG", "notes.txt", "a/d.webm", "e.M2TS"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = list(read_questions(tmp_path, Defaults(prompt="What?"), Shard()))
    assert [question.id for question in found] == ["a/c.PNG", "a/d.webm", "b.mp4", "e.M2TS"]
    assert [question.chat.media[0].kind for question in found] == [Visual.IMAGE, *[Visual.VIDEO] * 3]


def test_lines_of_openais_batches_ask_for_the_model_that_answers(tmp_path: Path) -> None:
    source = lines(tmp_path, OPENAI, {**OPENAI, "custom_id": "b", "body": {**BODY, "model": "tiny"}})
    assert check_questions(source, Defaults(model="tiny"), Shard()) == 2
    with pytest.raises(
        PromptError, match=r"line 2: model is 'tiny', the bundle answers as 'bundle': give --model-name"
    ):
        check_questions(source, Defaults(model="bundle"), Shard())


def test_the_runs_reduction_stands_where_a_line_of_openais_says_nothing(tmp_path: Path) -> None:
    source = lines(tmp_path, OPENAI, {**OPENAI, "custom_id": "b", "body": {**BODY, "framefusion": {"cost": 1.0}}})
    first, second = read_questions(source, Defaults(reduction=ReductionDefaults(cost=0.3)), Shard())
    assert (first.chat.request.cost, second.chat.request.cost) == (0.3, 1.0)


def test_lines_of_openais_batches(tmp_path: Path) -> None:
    (question,) = read_questions(lines(tmp_path, OPENAI), Defaults(), Shard())
    assert question.openai
    assert question.id == "a"
    assert question.chat.request.max_new_tokens == 3


def test_rows_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"id": "a", "video": "a.mp4", "prompt": "What?", "cost": 0.3}, {"id": "b", "video": None, "prompt": "Why?"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    first, second = read_questions(tmp_path / "in.parquet", Defaults(), Shard())
    assert first.chat.request.cost == 0.3
    assert second.chat.media == []
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    with pytest.raises(PromptError, match="no Parquet"):
        check_questions(tmp_path / "in.parquet", Defaults(), Shard())


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "line 2 is no JSON"),
        ("3", "give an object"),
        ({"video": "a.mp4", "prompt": "x"}, "id is None"),
        ({"id": True, "prompt": "x"}, "id is True"),
        ({"id": "b"}, "there is no prompt"),
        ({"id": "b", "prompt": "x", "video": 3}, "video is 3"),
        ({"id": "b", "prompt": "x", "video": [3]}, r"video is \[3\]"),
        ({"id": "b", "prompt": "x", "cost": 2}, "cost is 2"),
        ({"id": "a", "prompt": "x"}, "stands there twice"),
        ({**OPENAI, "custom_id": ""}, "custom_id is missing"),
        ({**OPENAI, "url": "/v1/embeddings"}, "only /v1/chat/completions"),
        ({**OPENAI, "body": {**BODY, "stream": True}}, "streams nothing"),
        ({**OPENAI, "body": {}}, "messages is None"),
    ],
)
def test_a_broken_line_is_found_before_the_first_answer(tmp_path: Path, row: Any, problem: str) -> None:
    source = lines(tmp_path, {"id": "a", "prompt": "x"}, row)
    with pytest.raises(PromptError, match=problem):
        check_questions(source, Defaults(), Shard())


def test_nothing_to_ask(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="has no question"):
        check_questions(tmp_path, Defaults(prompt="x"), Shard())
    with pytest.raises(PromptError, match="is no file and no folder"):
        check_questions(tmp_path / "nowhere", Defaults(prompt="x"), Shard())


def test_parts_are_a_partition_whatever_the_order(tmp_path: Path) -> None:
    rows = [{"id": str(number), "prompt": "x"} for number in range(200)]
    parts = [Shard(index, 3) for index in range(3)]
    forward = [{q.id for q in read_questions(lines(tmp_path, *rows), Defaults(), part)} for part in parts]
    backward = [{q.id for q in read_questions(lines(tmp_path, *rows[::-1]), Defaults(), part)} for part in parts]
    assert forward == backward
    assert sorted(map(int, set.union(*forward))) == list(range(200))
    assert sum(map(len, forward)) == 200
    assert min(map(len, forward)) > 40
    assert sum(check_questions(lines(tmp_path, *rows), Defaults(), part) for part in parts) == 200


@pytest.mark.parametrize("text", ["", "1", "a", "1/1", "-1/2", "a/b", "0/0", "\u00b2/3"])
def test_parts_that_are_none(text: str) -> None:
    with pytest.raises(PromptError, match="give index/count"):
        Shard.parse(text)


def test_folders_behind_links_and_folders_that_cannot_be_read(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.mp4").touch()
    source = tmp_path / "clips"
    source.mkdir()
    (source / "linked").symlink_to(elsewhere)
    defaults = Defaults(prompt="What?")
    assert [question.id for question in read_questions(source, defaults, Shard())] == ["linked/a.mp4"]
    (elsewhere / "back").symlink_to(elsewhere)
    with pytest.raises(PromptError, match="leads back"):
        check_questions(source, defaults, Shard())
    (elsewhere / "back").unlink()
    (elsewhere / "shut").mkdir(mode=0)
    try:
        if os.access(elsewhere / "shut", os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(PromptError, match="shut"):
            check_questions(source, defaults, Shard())
    finally:
        (elsewhere / "shut").chmod(0o700)


def test_ids_that_cannot_be_encoded_have_a_part(tmp_path: Path) -> None:
    source = lines(tmp_path, {"id": "\ud800", "prompt": "What?"})
    parts = [[q.id for q in read_questions(source, Defaults(), Shard(index, 2))] for index in range(2)]
    assert sorted(parts) == [[], ["\ud800"]]


def test_columns_of_a_table_that_json_has_no_word_for(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table(
        {
            "id": [1, 2],
            "prompt": ["What?", "Who?"],
            "cost": [0.5, float("nan")],
            "taken": [datetime(2026, 1, 2), None],
            "raw": [b"\x01", b""],
        }
    )
    parquet.write_table(table, tmp_path / "in.parquet")
    first, second = read_questions(tmp_path / "in.parquet", Defaults(), Shard())
    assert json.loads(json.dumps(first.extra)) == {"taken": "2026-01-02 00:00:00", "raw": "01"}
    assert (first.chat.request.cost, second.chat.request.cost) == (0.5, None)


def test_a_line_that_says_what_is_the_rule_elsewhere(tmp_path: Path) -> None:
    """The most tokens that a request takes by itself are said all the same, and count more than the run's."""
    source = lines(
        tmp_path,
        {"id": 1, "prompt": "What?", "max_tokens": MAX_NEW_TOKENS, "repetition_penalty": 1.2},
        {"id": 2, "prompt": "What?", "temperature": 0},
    )
    run = Request(5, temperature=0.7, cost=0.4)
    first, second = (over(question, run) for question in read_questions(source, Defaults(), Shard()))
    assert first == replace(run, max_new_tokens=MAX_NEW_TOKENS, repetition_penalty=1.2)
    assert second == replace(run, temperature=0)
