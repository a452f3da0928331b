"""A whole answer from a bundle: what is shown, what is kept, what is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from framefusion.errors import PromptError
from framefusion.runtime.pipeline import Generation, Pipeline, Request
from framefusion.runtime.text.prompt import Turn, Visual
from tests.films import write_film

NEW = 6
VIDEO, IMAGE = Visual.VIDEO, Visual.IMAGE


def ask(pipeline: Pipeline, *shown: tuple[Visual, Path], request: Request | None = None) -> Generation:
    turn = Turn("user", (*(kind for kind, _ in shown), "What happens in this video?"))
    return pipeline.generate([turn], [file for _, file in shown], request or Request(max_new_tokens=NEW))


def test_text_alone(pipeline: Pipeline) -> None:
    answer = ask(pipeline)
    assert answer.visual_tokens == 0
    assert answer.cost == 1
    assert 1 <= len(answer.token_ids) <= NEW
    assert set(answer.kv_lengths) == {answer.prompt_tokens}


def test_a_film_is_reduced_to_the_bundles_cost(pipeline: Pipeline, film: Path) -> None:
    answer = ask(pipeline, (VIDEO, film))
    assert answer.visual_tokens == 64  # 8 frames, 2 a grid, 4x4 tokens
    assert answer.cost == pytest.approx(0.4, abs=1 / 64)
    assert answer.finish_reason in ("stop", "length")


def test_cache_lengths_are_those_of_the_history(pipeline: Pipeline, film: Path) -> None:
    answer = ask(pipeline, (VIDEO, film))
    assert answer.reduction[0].tokens_before == answer.prompt_tokens
    for before, after in zip(answer.reduction, answer.reduction[1:], strict=False):
        assert after.tokens_before == before.tokens_after
    present = answer.prompt_tokens
    for layer, length in enumerate(answer.kv_lengths):
        present = answer.reduction[layer].tokens_after if layer < len(answer.reduction) else present
        assert length == present


@pytest.mark.parametrize("cost", [0.3, 0.7, 1.0])
def test_the_cost_is_chosen_at_run_time(pipeline: Pipeline, film: Path, cost: float) -> None:
    answer = ask(pipeline, (VIDEO, film), request=Request(max_new_tokens=1, cost=cost))
    assert answer.cost == pytest.approx(cost, abs=1 / 64)


def test_without_reduction_nothing_is_dropped(pipeline: Pipeline, film: Path) -> None:
    answer = ask(pipeline, (VIDEO, film), request=Request(max_new_tokens=1, cost=1.0))
    assert set(answer.kv_lengths) == {answer.prompt_tokens}
    assert answer.reduction == ()


def test_two_films(pipeline: Pipeline, film: Path, tmp_path: Path) -> None:
    other = write_film(tmp_path / "other.mp4", frames=8, seed=1)
    single, both = ask(pipeline, (VIDEO, film)), ask(pipeline, (VIDEO, film), (VIDEO, other))
    assert both.visual_tokens == single.visual_tokens + 32
    assert both.cost == pytest.approx(0.4, abs=1 / 64)


def test_a_picture_and_a_film(pipeline: Pipeline, film: Path, picture: Path) -> None:
    answer = ask(pipeline, (IMAGE, picture), (VIDEO, film))
    assert answer.visual_tokens == 64 + 16
    assert answer.text == ask(pipeline, (IMAGE, picture), (VIDEO, film)).text


def test_pieces_join_to_the_text(pipeline: Pipeline, film: Path) -> None:
    pieces: list[str] = []
    turn = Turn("user", (VIDEO, "What?"))
    answer = pipeline.generate([turn], [film], Request(max_new_tokens=24), on_text=pieces.append)
    assert "".join(pieces) == answer.text
    ended = answer.finish_reason == "stop"
    assert answer.text == pipeline.tokenizer.decode(answer.token_ids[: len(answer.token_ids) - ended])


def test_a_seed_is_an_answer(pipeline: Pipeline, film: Path) -> None:
    drawn = replace(pipeline.manifest.generation, do_sample=True, temperature=1.5, top_k=0)
    request = Request(max_new_tokens=12, generation=drawn, seed=3)
    answers = [ask(pipeline, (VIDEO, film), request=replace(request, seed=seed)).token_ids for seed in (3, 3, 4)]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_a_random_reduction_meets_the_same_cost(pipeline: Pipeline, film: Path) -> None:
    answer = ask(pipeline, (VIDEO, film), request=Request(max_new_tokens=1, reducer="random", seed=1))
    assert answer.cost == pytest.approx(0.4, abs=1 / 64)


def test_files_and_turns_must_agree(pipeline: Pipeline, film: Path) -> None:
    with pytest.raises(PromptError, match=r"shows 0 video\(s\) and image\(s\), 1 were given"):
        pipeline.generate([Turn("user", ("What?",))], [film])


def test_new_tokens_stop_where_the_caches_end(pipeline: Pipeline) -> None:
    endless = replace(pipeline.manifest.generation, eos_token_ids=())
    room = pipeline.manifest.limits.max_kv_cache_capacity
    answer = ask(pipeline, request=Request(max_new_tokens=room, generation=endless))
    assert len(answer.token_ids) == room - answer.prompt_tokens
    assert answer.finish_reason == "length"


def test_one_question_about_pictures_of_every_kind(pipeline: Pipeline) -> None:
    still = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
    sources: list[Any] = [Image.fromarray(still), still.astype(np.float32) / 255, [still, Image.fromarray(still)]]
    prompt, rows = pipeline.read([Turn("user", (IMAGE, IMAGE, VIDEO, "What?"))], sources)
    tokens = prompt.num_visual // 3
    assert prompt.num_visual == 3 * tokens > 0
    shown = np.asarray(rows.hidden)[prompt.row_places]
    np.testing.assert_array_equal(shown[:tokens], shown[tokens : 2 * tokens])  # the same picture, held in another way
    with pytest.raises(PromptError, match=r"files is one name, 'a\.png': give a list"):
        pipeline.read([Turn("user", (IMAGE, "What?"))], "a.png")
