"""Conversations that codes are calibrated on, and the rows of their answers, which are those of decode steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from framefusion.errors import BudgetError, EvaluationError, VideoError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.backend import EagerBackend
from framefusion.export.eager.calibration import prompts as calibration_prompts
from framefusion.export.eager.calibration.lockstep import decided_before
from framefusion.export.eager.calibration.prompts import (
    answered_rows,
    file_digests,
    films_of,
    read_prompts,
    tokens_digest,
)
from framefusion.export.eager.pipeline import eager_loaders, in_fp32, uncompiled_bundle
from framefusion.export.graphs.decoder import Segment
from framefusion.export.graphs.graph_plan import GraphModule
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.request import Stopwatch
from tests.films import write_film

TRAINED = Path(__file__).parents[3] / "models" / "tiny_qwen2_vl"
OPTIONS = BuildOptions(num_decoder_layer=3, depth=1, cost=0.5, similarity_lower_bound=0.97)


def test_films_and_questions_are_conversations(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "c.png"):
        (tmp_path / name).write_bytes(name.encode())
    questions = tmp_path / "mine.jsonl"
    rows = [
        {"video": "b.mp4", "question": "How many?", "answer": "two"},
        {"images": ["c.png"], "question": "Which?", "answer": "A", "choices": ["red", "blue"]},
    ]
    questions.write_text("\n".join(map(json.dumps, rows)))
    film, count, which = prompts = read_prompts([tmp_path / "a.mp4", questions])
    assert film.turns[0].parts[1] == calibration_prompts.PROMPT
    assert count.turns[0].parts[1] == "How many?"
    assert "B. blue" in str(which.turns[0].parts[1])
    assert films_of([tmp_path / "a.mp4", questions, tmp_path / "b.mp4"], "") == (tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert len(file_digests(prompts)) == 3
    # what is none
    questions.write_text(json.dumps(rows[1]))
    with pytest.raises(BudgetError, match="names no film, and a schedule is set by films"):
        films_of([questions], "a schedule is set")
    questions.write_text("{}")
    with pytest.raises(EvaluationError, match="line 1"):
        read_prompts([questions])
    with pytest.raises(VideoError, match=r"no\.mp4 cannot be read"):
        file_digests(read_prompts([tmp_path / "no.mp4"]))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tiff", "a.webp", "a.ppm", "a.pgm"])
def test_a_picture_in_place_of_a_film_is_told_where_it_belongs(name: str, tmp_path: Path) -> None:
    Image.new("L" if name == "a.pgm" else "RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(VideoError, match=r'a\.\w+ is an image \(\w+\).*file of questions, as one of the "images"'):
        read_prompts([tmp_path / name])


@pytest.mark.slow
def test_rows_of_an_answer_are_those_of_its_decode_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = BuildPlan(Checkpoint(TRAINED), OPTIONS)
    bundle = in_fp32(uncompiled_bundle(plan, tmp_path / "bundle"), plan)
    film = write_film(tmp_path / "film.mp4", frames=8, size=112, seed=3)
    prompts = read_prompts([film])
    monkeypatch.setattr(calibration_prompts, "ANSWER", 6)
    (item,) = answered_rows(plan, bundle, prompts, lambda _: None)
    assert item.answer == 5
    shorter = replace(item, prompt=item.prompt.head(item.prompt.token_ids.size - 1))
    assert len({tokens_digest(items) for items in ([item], [shorter], [item, item])}) == 3  # an answer is of it
    # 1. step by step, over the caches that the reduction left
    length = item.prompt.token_ids.size - item.answer
    prompt = item.prompt.head(length)
    pipeline = Pipeline(bundle, EagerBackend(eager_loaders(plan)))
    request = replace(item.request, max_new_tokens=6)
    rows = replace(item.rows.part(0, length))
    prefilled = pipeline.prefill(prompt, rows, request, Stopwatch())
    steps = list(pipeline.decode(prompt, prefilled, request, Stopwatch(), logits=True))
    chosen = [step for step in steps if step.token_id is not None]
    assert [step.token_id for step in chosen][:5] == item.prompt.token_ids[length:].tolist()
    # 2. in one prefill, which decides by the prompt alone
    found: dict[str, Any] = {}
    loaders = {name: partial(_shown, load, item.answer, found) for name, load in eager_loaders(plan).items()}
    whole = Pipeline(bundle, EagerBackend(loaders)).prefill(item.prompt, item.rows, item.request, Stopwatch())
    last = whole.kept[-1]
    assert last.size < item.prompt.token_ids.size
    np.testing.assert_array_equal(last[last < length], prefilled.kept[-1])
    np.testing.assert_array_equal(last[last >= length], np.arange(length, length + 5))
    step_by_step = np.stack([step.logits for step in chosen if step.logits is not None])
    np.testing.assert_allclose(found["logits"][-6:].numpy(), step_by_step, rtol=0, atol=2e-5)


def _shown(load: Callable[[], GraphModule], answer: int, found: dict[str, Any]) -> GraphModule:
    """A segment that decides before the answer, and leaves the logits of all tokens in `found`."""
    module = load()
    if isinstance(module, Segment):
        module.register_forward_pre_hook(lambda _, arguments: decided_before(arguments, answer))
        if module.head is not None:
            module.register_forward_pre_hook(lambda _, arguments: (*arguments[:5], None, *arguments[6:]))
            project = module.head.forward

            def each(hidden: torch.Tensor) -> torch.Tensor:
                logits = torch.cat([project(hidden[:, row : row + 1]) for row in range(hidden.shape[1])])
                found["logits"] = logits
                return logits[-1:]

            module.head.forward = each  # type: ignore[method-assign]
    return module
