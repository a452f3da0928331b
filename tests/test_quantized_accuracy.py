"""What quantised weights cost in answers and in kept tokens: counted by hand here, and measured on two questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools import quantized_tables
from tools.accuracy import questions
from tools.quantized_accuracy import CASES, DEEP, Asking, Case, answered, summary
from tools.quantized_bundles import FLOATS, FORMATS

UNDER = {"reducer": "framefusion", "cost": 0.1, "bound": None}


def row(question: str, name: str, right: bool, agree: float, otherwise: int) -> dict[str, Any]:
    decision = {"call": 1, "kind": "prune", "last": True, "visual": 20, "dropped": 10, "otherwise": otherwise}
    facts = {"question": question, "format": name, **UNDER, "text": str(right), "right": right, "left": 10}
    facts |= {"agree": agree, "agree_by_call": [1.0, agree], "begins_right": True}
    return facts if name == FLOATS else facts | {"decisions": [decision], "right_by_floats_decisions": True}


LOWEST = ("framefusion", 0.1, None)


def _case(row: dict[str, Any]) -> tuple[str, float, float | None]:
    return row["reducer"], row["cost"], row["bound"]


def test_points_tokens_and_decisions_add_up() -> None:
    rows = [row("a", FLOATS, True, 1, 0), row("b", FLOATS, True, 1, 0), row("c", FLOATS, False, 1, 0)]
    rows += [row("a", "int4", True, 1, 0), row("b", "int4", False, 0.8, 4), row("c", "int4", False, 0.9, 2)]
    _, int4 = summary(rows)["formats"]
    assert int4["against_floats"]["difference"] == pytest.approx(1 / 3)
    assert (int4["agree"], int4["agree_by_call"], int4["other_texts"]) == (0.9, [1.0, 0.9], 1)
    assert int4["same_kept"] == {"questions": 1, "right": 1, "right_in_floats": 1}
    assert int4["other_kept"] == {"questions": 2, "right": 0, "right_in_floats": 1}
    assert int4["flips"] == {"prune by rank": {"calls": 3, "calls_otherwise": 2, "tokens": 60, "tokens_otherwise": 6}}
    assert int4["right_by_floats_decisions"] == 3
    assert int4["begins_right"] == 3
    assert "floats_right_by_these" not in int4  # it was not asked
    assert quantized_tables.turned(int4["flips"]) == "- / - / 10.00"
    assert quantized_tables.both(int4) == "2 (+50.0), 1 (+0.0), by fp32's decisions -33.3"


@pytest.mark.slow
def test_the_tool_asks_every_format_under_every_case_and_goes_on_from_its_file(tmp_path: Path) -> None:
    bundles = {name: FORMATS[name](tmp_path) for name in (FLOATS, "int4:128")}
    question_list = questions(2)
    first = answered(bundles, question_list[:1], Asking(deep=1), tmp_path / "rows.jsonl", jobs=1)
    both = answered(bundles, question_list, Asking(deep=1), tmp_path / "rows.jsonl", jobs=1)
    in_turn = answered(bundles, question_list[:1], Asking(CASES[-1:], in_turn=True), tmp_path / "films.jsonl", jobs=1)
    found_alone = [
        r for r in both if (r["question"], r["format"], *_case(r)) == (question_list[0].key, "int4:128", *LOWEST)
    ]
    led = in_turn[1]
    assert led.pop("floats_right_by_these") in (True, False)
    assert [led] == found_alone  # a question that was embedded once is the same question
    assert both[: len(first)] == first
    found = {(r["question"], r["format"], Case(r["reducer"], r["cost"], r["bound"])) for r in both}
    assert found == {
        (question.key, name, case)
        for index, question in enumerate(question_list)
        for name in bundles
        for case in (*CASES, *(DEEP if index < 1 else ()))
    }
    deep = [r for r in both if r["format"] != FLOATS and r["reducer"] == "fastv"]
    assert all(decision["kind"] == "prune" and decision["visual"] == 256 for r in deep for decision in r["decisions"])
    assert all(r["agree"] == 1 for r in both if r["format"] == FLOATS)
    assert len(summary(both)["formats"]) == 2 * (len(CASES) + len(DEEP))
