"""Tables and prose fit the columns that there are, and no figure is cut."""

from __future__ import annotations

import random
import re

import pytest

from framefusion.console.layout import cells_of, counted, prose, table

HEAD = ("engine", "size", "seconds", "cache")
ROWS = [
    ("engines/inductor/segments-rest-graph.pt2", "2.16 MB", 17.11, "miss: nothing like it was compiled before"),
    ("engines/inductor/vision-graph.pt2", "1.87 MB", 10.85, "hit"),
]


def test_a_row_is_a_line_where_nobody_says_how_wide_it_may_be() -> None:
    assert len(table(HEAD, ROWS).splitlines()) == 2 + len(ROWS)


def test_a_table_wraps_between_words_and_behind_folders() -> None:
    assert table(HEAD, ROWS, 80).splitlines() == [
        "engine                          size     seconds  cache",
        "------------------------------  -------  -------  ------------------------------",
        "engines/inductor/               2.16 MB    17.11  miss: nothing like it was",
        "segments-rest-graph.pt2                           compiled before",
        "engines/inductor/               1.87 MB    10.85  hit",
        "vision-graph.pt2",
    ]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_no_figure_is_cut_and_nothing_is_wider_than_it_must_be(width: int) -> None:
    drawn = random.Random(width)
    for _ in range(40):
        columns = drawn.randint(1, 9)
        head: list[str] = [
            drawn.choice(("tokens left", "cost", "95 % interval", "a name/of a path")) for _ in range(columns)
        ]
        rows: list[list[object]] = [
            [drawn.choice((123456, 0.25, "4.26 MB", "no difference", "映像の中", "")) for _ in head] for _ in "12"
        ]
        text = table(head, rows, width)
        narrowest = (
            max(map(len, head)) + 2 + max(cells_of(word) for row in rows for word in ("difference", str(row[0])))
        )
        assert max(map(cells_of, text.splitlines())) <= max(width, narrowest)
        for row in rows:
            for cell in row:
                figure = str(cell)
                if re.match(r"\d", figure):
                    assert figure in text


def test_many_columns_become_a_block_for_each_row() -> None:
    text = table([f"column {index}" for index in range(12)], [[10**9] * 12] * 2, 80)
    assert text.count("column 3   1000000000") == 2


def test_wide_characters_and_foreign_text_keep_the_columns_in_line() -> None:
    lines = table(("name", "size"), [("映像", 1), ("ab\x1b[2J", 2)]).splitlines()
    assert lines[2] == "映像          1"
    assert lines[3] == "ab\\x1b[2J     2"
    assert {cells_of(line) for line in lines[1:]} == {cells_of(lines[1])}


def test_prose_breaks_between_words_and_a_command_stays_whole() -> None:
    text = "memory of a run, 8192 tokens of prompt and 128 new ones: 292 MB expected, 292 MB at worst"
    assert prose(text, 80).splitlines() == [text[: text.index(" at worst")], "  at worst"]
    command = f"rebuild because X, with: ff-export compile {'long/' * 20} --backend inductor"
    assert prose(command, 80) == command
    assert prose(text, None) == text


def test_what_is_counted_has_its_number() -> None:
    assert [counted(count, "film") for count in range(3)] == ["0 films", "1 film", "2 films"]
