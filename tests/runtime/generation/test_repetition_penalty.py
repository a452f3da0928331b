"""The repetition penalty of a whole answer about a picture beside transformers' own `generate`: what it counts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual
from tests.versions import needs_torch, needs_transformers

NEW = 16
PENALTY = 1.9
QUESTION = "What is this? What is this?"


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    from transformers import Qwen2VLForConditionalGeneration

    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype="float32")
    return model.eval()


def ours(pipeline: Pipeline, picture: Path, penalty: float) -> list[int]:
    turn = Turn("user", (Visual.IMAGE, QUESTION))
    request = Request(NEW, cost=1.0, repetition_penalty=penalty)
    return list(pipeline.generate([turn], [picture], request).token_ids)


def theirs(model: Any, pipeline: Pipeline, picture: Path, penalty: float, *, embeds: bool = False) -> list[int]:
    """The same picture and ids; by their embeddings alone where it is said."""
    import torch

    turn = Turn("user", (Visual.IMAGE, QUESTION))
    visuals = pipeline.read_visuals([turn], [picture], pipeline.manifest.sampling, Stopwatch())
    prompt = pipeline.prompt([turn], visuals)
    tiles = [tiles for visual in visuals for tiles in visual.tiles]
    ids = torch.from_numpy(prompt.token_ids)[None]
    images = ids == model.config.image_token_id
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat([torch.from_numpy(t.values).flatten(0, 1) for t in tiles]),
        "image_grid_thw": torch.tensor([list(t.grid) for t in tiles]),
        "mm_token_type_ids": images.int(),
    }
    if embeds:
        text = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": inputs["attention_mask"]}
        inputs = text
    # rows of the table that no token of the tokenizer stands for are not said here
    unsaid = list(range(pipeline.tokenizer.vocab_size, model.config.get_text_config().vocab_size))
    settings = {"do_sample": False, "max_new_tokens": NEW, "repetition_penalty": penalty, "suppress_tokens": unsaid}
    with torch.inference_mode():
        result = model.generate(**inputs, **settings)
    chosen: list[int] = result[0, 0 if embeds else ids.shape[1] :].tolist()
    return chosen


@pytest.mark.slow
@needs_torch
@needs_transformers
def test_it_counts_the_prompt_and_its_placeholders(pipeline: Pipeline, model: Any, picture: Path) -> None:
    plain = theirs(model, pipeline, picture, 1.0)
    penalised = theirs(model, pipeline, picture, PENALTY)
    assert plain != penalised
    assert ours(pipeline, picture, 1.0) == plain
    assert ours(pipeline, picture, PENALTY) == penalised


@pytest.mark.slow
@needs_torch
@needs_transformers
def test_transformers_counts_the_answer_alone_behind_embeddings(pipeline: Pipeline, model: Any, picture: Path) -> None:
    """As docs/texts.md says; it warns of that itself."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs(model, pipeline, picture, PENALTY, embeds=True)
    assert any("only to newly generated tokens" in str(warning.message) for warning in caught)


def test_a_bundles_own_penalty_is_kept(pipeline: Pipeline) -> None:
    """What a checkpoint says in generation_config.json acts without a flag, and a flag takes its place."""
    from dataclasses import replace

    from framefusion.runtime.text.sampling import Sampler

    base = replace(pipeline.manifest.generation, repetition_penalty=1.3)
    logits = np.array([1.0, 1.2], np.float32)
    assert Sampler(Request().generation_over(base)).next_token(logits, [1]) == 0
    assert Sampler(Request(repetition_penalty=1.0).generation_over(base)).next_token(logits, [1]) == 1
