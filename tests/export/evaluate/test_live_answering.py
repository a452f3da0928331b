"""A live model of transformers that answers an evaluation: the pipeline's answers, encoded once, or a named refusal.

Random weights say anything, but always the same.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.errors import BackendError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.pipeline import eager_pipeline
from framefusion.export.evaluate import live_answering
from framefusion.export.evaluate.answering import Answer, Condition, PipelineAnswerer, Setup
from framefusion.export.evaluate.evaluation import render
from framefusion.export.evaluate.questions import Question
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.runtime.text.prompt import Visual
from tests.bundles import COST
from tests.commands import assert_refused, export
from tests.wheel import ROOT

TRAINED = ROOT / "tests" / "models" / "tiny_qwen2_vl"
UNDER = [
    Condition("framefusion", 1.0),
    *(Condition(name, COST) for name in ("framefusion", "random", "vidcom2", "evs")),
]


@pytest.fixture
def of_pictures(picture: Path) -> Question:
    visuals = ((Visual.IMAGE, picture), (Visual.IMAGE, picture))
    return Question("1", "all", "Say what you see, in one word.", ("x",), (), visuals)


@pytest.fixture
def of_a_film(film: Path) -> Question:
    return Question("1", "all", "What happens in this video?", ("x",), (), ((Visual.VIDEO, film),))


class PictureProcessor:
    """What AutoProcessor gives, of transformers' own parts; its class wants torchvision, which tests do without."""

    def __init__(self, folder: Path) -> None:
        from transformers import PreTrainedTokenizerFast
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        make: Any = PreTrainedTokenizerFast
        self.tokenizer = make(tokenizer_file=str(folder / "tokenizer.json"))
        self.tokenizer.chat_template = (TRAINED / "chat_template.jinja").read_text()
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.decode = self.tokenizer.decode

    def apply_chat_template(self, conversation: Any, **given: Any) -> str:
        text: str = self.tokenizer.apply_chat_template(conversation, **given)
        return text

    def __call__(self, text: list[str], images: list[Any], return_tensors: str) -> Any:
        pixels = self.image_processor(images=images, return_tensors=return_tensors)
        whole = text[0]
        for grid in pixels["image_grid_thw"]:
            whole = whole.replace("<|image_pad|>", "<|shown|>" * (int(grid.prod()) // 4), 1)
        ids = self.tokenizer(whole.replace("<|shown|>", "<|image_pad|>"), return_tensors=return_tensors)
        image = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return {**ids, **pixels, "mm_token_type_ids": (ids["input_ids"] == image).int()}


@pytest.fixture
def live(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> live_answering.TransformersAnswerer:
    monkeypatch.setattr(live_answering, "load_processor", PictureProcessor)
    return live_answering.TransformersAnswerer(Checkpoint(checkpoint), Setup(str(checkpoint), max_new_tokens=3))


def test_a_live_model_answers_as_the_pipeline(
    live: live_answering.TransformersAnswerer, checkpoint: Path, of_pictures: Question, tmp_path: Path
) -> None:
    """About pictures: of films transformers' positions are not those that checkpoints were trained with."""
    pipeline = eager_pipeline(BuildPlan(Checkpoint(checkpoint), BuildOptions()), tmp_path / "parts")
    eager = PipelineAnswerer(pipeline, live.setup, "")
    calls: list[int] = []
    live.model.base_model.visual.register_forward_hook(lambda *_: calls.append(1))
    theirs = list(live.answers(of_pictures, UNDER))
    assert calls == [1]  # encoded once for all conditions
    assert not hasattr(live.model, "framefusion")
    for mine, live_answer, condition in zip(eager.answers(of_pictures, UNDER), theirs, UNDER, strict=True):
        assert live_answer == Answer(
            mine.text, live_answer.reached, mine.visual_tokens, mine.visual_left, live_answer.outcomes
        ), condition
        assert live_answer.reached == pytest.approx(mine.reached, abs=1e-6)


def test_a_processor_gets_where_the_frames_stood(
    live: live_answering.TransformersAnswerer, of_a_film: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(live, "processor", _Listening(live.processor, given))
    live.inputs(of_a_film)
    (frames,), (metadata,) = given["videos"], given["video_metadata"]
    assert given["do_sample_frames"] is False
    assert frames.dtype == np.uint8
    assert len(metadata["frames_indices"]) == len(frames)
    assert metadata["total_num_frames"] > len(frames) == 2 * (len(frames) // 2)
    assert given["text"][0].count("<|video_pad|>") == 1
    assert given["text"][0].endswith("What happens in this video?<|im_end|>\n<|im_start|>assistant\n")


class _Listening:
    """A processor that says what it was called with."""

    def __init__(self, processor: Any, given: dict[str, Any]) -> None:
        self.apply_chat_template, self.given = processor.apply_chat_template, given

    def __call__(self, **given: Any) -> dict[str, Any]:
        self.given.update(given)
        return {}


def test_without_a_processor_the_checkpoint_runs_in_eager_torch(
    checkpoint: Path, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> Any:
        raise BackendError("transformers' processor cannot be loaded: it requires a package")

    monkeypatch.setattr(live_answering, "load_processor", refuse)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"video": str(film), "question": "What?", "answer": "x"}))
    flags = ("--questions", questions, "--max-new-tokens", 1, "--cost", COST)
    found = json.loads(export("eval", checkpoint, *flags, "--json").stdout)
    assert found["engine"] == f"eager (torch {version('torch')})"
    assert found["note"] == "transformers' processor cannot be loaded: it requires a package"
    assert "not by transformers" in render(found)
    assert_refused(export("eval", checkpoint, *flags, "--live", "transformers"), BackendError, "requires a package")


def test_a_folder_without_a_processor_is_refused_by_its_cause(checkpoint: Path) -> None:
    with pytest.raises(BackendError, match=r"transformers' processor of .* (cannot be loaded: |has no chat template)"):
        live_answering.load_processor(checkpoint)


@pytest.mark.slow
def test_transformers_own_processor_serves_films(of_a_film: Question) -> None:
    pytest.importorskip("torchvision")
    answerer = live_answering.TransformersAnswerer(Checkpoint(TRAINED), Setup(str(TRAINED), max_new_tokens=4))
    dense, reduced = answerer.answers(of_a_film, [Condition("framefusion", 1.0), Condition("framefusion", 0.3)])
    assert dense.visual_left == dense.visual_tokens > reduced.visual_left > 0
    assert reduced.reached == pytest.approx(0.3, abs=0.02)
