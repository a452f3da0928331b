"""Pictures without a film are reduced where a request asks for it, and only there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framefusion.runtime.bundle import Bundle
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.text.prompt import Turn, Visual
from tests.bundles import shared
from tests.commands import run

ALONE = [Turn("user", (Visual.IMAGE, "What is it?"))]
TWO = [Turn("user", (Visual.IMAGE, Visual.IMAGE, "What is it?"))]
BOTH = [Turn("user", (Visual.VIDEO, Visual.IMAGE, "What is it?"))]
NEW = 3


@pytest.mark.parametrize("turns", [ALONE, TWO])
def test_pictures_alone_are_kept_whole(pipeline: Pipeline, picture: Path, turns: list[Turn]) -> None:
    files = [picture] * (len(turns[0].parts) - 1)
    answer = pipeline.generate(turns, files, Request(NEW))
    dense = pipeline.generate(turns, files, Request(NEW, cost=1.0))
    assert answer.visual_tokens > 0
    assert answer.reduction == ()
    assert set(answer.kv_lengths) == {answer.prompt_tokens}
    assert (answer.token_ids, answer.cost) == (dense.token_ids, 1.0)


@pytest.mark.parametrize(
    "request_", [{"cost": 0.4}, {"reducer": "framefusion"}, {"similarity_lower_bound": 0.5}, {"ratio_lower_bound": 0.2}]
)
def test_whoever_asks_for_a_reduction_gets_it(pipeline: Pipeline, picture: Path, request_: dict[str, float]) -> None:
    answer = pipeline.generate(ALONE, [picture], Request(NEW, **request_))  # type: ignore[arg-type]
    assert answer.reduction
    assert answer.kv_lengths[-1] < answer.prompt_tokens


def test_a_film_is_reduced_and_a_picture_beside_it_too(pipeline: Pipeline, film: Path, picture: Path) -> None:
    answer = pipeline.generate(BOTH, [film, picture], Request(NEW))
    assert answer.kv_lengths[-1] < answer.prompt_tokens
    asked = pipeline.generate(BOTH, [film, picture], Request(NEW, cost=pipeline.manifest.reduction.cost))
    assert answer.token_ids == asked.token_ids


def test_in_a_session_each_turn_goes_by_what_it_shows(pipeline: Pipeline, film: Path, picture: Path) -> None:
    session = pipeline.session()
    first = session.ask(ALONE, [picture], Request(NEW))
    assert first.kv_lengths[-1] == first.prompt_tokens
    second = session.ask([Turn("user", (Visual.VIDEO, "And here?"))], [film], Request(NEW))
    assert second.reduction
    third = session.ask(ALONE, [picture], Request(NEW))
    assert third.reduction == ()


def test_a_built_in_reduction_is_as_it_is_built(picture: Path) -> None:
    fixed = Pipeline(Bundle(shared("fixed-gqa"), verify=False), threads=1)
    answer = fixed.generate(ALONE, [picture], Request(NEW))
    assert answer.kv_lengths[-1] < answer.prompt_tokens


def test_the_command_says_what_was_kept_and_view_draws_it(bundle: Path, picture: Path, tmp_path: Path) -> None:
    question = ("--image", picture, "--prompt", "What is it?", "--max-new-tokens", NEW)
    facts = json.loads(run("generate", bundle, *question, "--json").stdout)
    assert (facts["cost"]["asked"], facts["cost"]["reached"]) == (1.0, 1.0)
    assert "a picture is kept whole unless --cost asks for less" in run("generate", bundle, *question).stderr
    asked = json.loads(run("generate", bundle, *question, "--cost", 0.4, "--json").stdout)
    assert asked["cost"]["asked"] == 0.4
    assert asked["reduction"]
    page = json.loads(run("view", bundle, *question, "-o", tmp_path / "page.html", "--json").stdout)
    assert page["cost"]["reached"] == 1.0
    compared = run("view", bundle, *question, "--compare", "-o", tmp_path / "compared.html", "--json")
    assert json.loads(compared.stdout)["cost"]["reached"] < 1.0
