"""The live model against the pipeline over the same tiny weights: kept tokens of every layer, logits, labels.

Positions are passed explicitly where transformers' rule differs from the one that checkpoints were trained with. Logits
agree within the cases' own limit, for the reasons told there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framefusion.errors import BackendError
from framefusion.export.families import FAMILIES
from framefusion.interface import apply_framefusion, remove_framefusion
from framefusion.live.labels import FAMILIES as LIVE
from framefusion.live.labels import MultimodalInputs, tile_labels
from framefusion.live.seams import DEEPSTACK_ARGUMENTS
from framefusion.reduction.policy import Reduction
from framefusion.runtime.generation.prefill import prefill
from framefusion.runtime.pipeline import Request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual
from tests.families import CASES
from tests.families.case import CONVERSATIONS, FamilyCase, clip, picture, relative_error
from tests.families.eager import eager_pipeline
from tests.families.internvl import InternVLReference
from tests.families.test_families import OPTIONS, Conversation, Subject, read_conversation
from tests.tiers import in_tiers

ROWS = [family for family in FAMILIES if family.name in LIVE]
LIVE_CASES = [case for case in CASES if case.family in LIVE]
QUICK = ("video", "mixed")
ALL_STATES = {"output_hidden_states": True}


@pytest.fixture(params=LIVE_CASES, ids=lambda case: str(case.family), scope="module")
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    case: FamilyCase = request.param
    folder = tmp_path_factory.mktemp(case.family)
    case.write(folder, case.variants[0])
    pipeline = eager_pipeline(folder, tmp_path_factory.mktemp("bundle") / "b", OPTIONS)
    return Subject(case, folder, pipeline, case.reference(folder))


@torch.inference_mode()
def live_logits(subject: Subject, conversation: Conversation) -> Any:
    """[S, V] of the live model."""
    reference: Any = subject.reference
    if isinstance(reference, InternVLReference):
        given = {"input_ids": torch.from_numpy(conversation.prompt.token_ids)[None]}
        if conversation.media:
            given["pixel_values"] = torch.cat(
                [torch.from_numpy(reference.pictures(item)) for item in conversation.media]
            )
        return reference.model(**given).logits[0].numpy()
    return reference.logits(conversation.prompt, conversation.media, [])


def compare(subject: Subject, name: str, attention: str = "sdpa") -> None:
    conversation, pipeline = read_conversation(subject, name), subject.pipeline
    reduction = pipeline.reduction(conversation.prompt, Request())
    assert isinstance(reduction, Reduction)
    settings, model = reduction.settings, subject.reference.model  # type: ignore[attr-defined]
    prefilled = prefill(pipeline.segments, conversation.rows, reduction, 1, Stopwatch())
    model.set_attn_implementation(attention)
    handle = apply_framefusion(model, settings.cost, None, settings.ratio_lower_bound, depth=settings.depth)
    try:
        assert handle.settings == settings
        frames = {len(item.frames) for item in conversation.media if hasattr(item, "frames")}
        if subject.case.family.startswith("llava") and len(frames) > 1:  # the class takes videos of one length only
            with handle.labels(conversation.prompt.labels):
                logits = live_logits(subject, conversation)
        else:
            logits = live_logits(subject, conversation)
    finally:
        remove_framefusion(model)
    (record,) = handle.last
    expected = [own for own, cache in zip(prefilled.kept, prefilled.caches, strict=True) for _ in cache.keys]
    assert len(record.kept) == len(expected)
    for ours, theirs in zip(record.kept, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if conversation.media:
        assert record.calls == tuple(prefilled.history)
        assert record.visual_after < record.visual_before
    assert relative_error(logits[-1], prefilled.logits[: logits.shape[-1]]) < subject.case.limit


@pytest.mark.parametrize("name", in_tiers(["mixed", "video"], fast=1))
def test_equals_the_pipeline(subject: Subject, name: str) -> None:
    compare(subject, name)


@torch.inference_mode()
def test_a_static_cache_holds_the_same(subject: Subject) -> None:
    """Logits of the prompt and of tokens behind it, the static cache slipped in beside what the reference gives."""
    from transformers import DynamicCache, StaticCache

    conversation, model = read_conversation(subject, "mixed"), subject.reference.model  # type: ignore[attr-defined]
    model.set_attn_implementation("sdpa")
    config, text, heard, told = model.config.get_text_config(), np.zeros(0, np.int64), [], []
    caches: list[Any] = [DynamicCache(config=config), StaticCache(config=config, max_cache_len=2000)]
    for cache in caches:
        handle = apply_framefusion(model, 0.3)
        given = {"past_key_values": cache, "use_cache": True}
        hook = model.register_forward_pre_hook(
            lambda _, args, named, given=given: (args, named | given), with_kwargs=True
        )
        try:
            heard.append([live_logits(subject, conversation)])
            told.append(handle.last[0].tokens_per_layer)
            text = heard[0][0][-3:].argmax(-1)
            heard[-1] += [model(input_ids=torch.tensor([[token]])).logits[0].numpy() for token in text]
        finally:
            hook.remove()
            remove_framefusion(model)
    assert told[0] == told[1]
    assert told[0][-1] < told[0][0]
    for dynamic, static in zip(*heard, strict=True):
        assert relative_error(static, dynamic) < subject.case.limit


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name not in QUICK])
def test_equals_the_pipeline_whatever_is_asked(subject: Subject, name: str) -> None:
    compare(subject, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "variant"),
    [pytest.param(case, v, id=f"{case.family}-{v}") for case in LIVE_CASES for v in case.variants[1:]],
)
def test_equals_the_pipeline_for_every_kind_of_checkpoint(case: FamilyCase, variant: str, tmp_path: Path) -> None:
    """Llama, Mistral, Qwen2 and Qwen3 under the same class; with and without DeepStack."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    case.write(folder, variant)
    pipeline = eager_pipeline(folder, tmp_path / "bundle", OPTIONS)
    compare(Subject(case, folder, pipeline, case.reference(folder)), "video")


@pytest.mark.slow
def test_equals_the_pipeline_with_eager_attention(subject: Subject) -> None:
    compare(subject, "mixed", "eager")


@pytest.mark.slow
@torch.inference_mode()
def test_hidden_states_are_the_models_own_where_nothing_is_dropped(subject: Subject) -> None:
    """Before and behind every layer, those that DeepStack adds to among them."""
    conversation, model = read_conversation(subject, "mixed"), subject.reference.model  # type: ignore[attr-defined]
    model.set_attn_implementation("sdpa")
    states: list[Any] = []
    hooks = [
        model.register_forward_pre_hook(lambda _, args, named: (args, named | ALL_STATES), with_kwargs=True),
        model.register_forward_hook(lambda _, __, output: states.append(output.hidden_states)),
    ]
    try:
        live_logits(subject, conversation)
        apply_framefusion(model, 1.0, 1.0)
        live_logits(subject, conversation)
    finally:
        remove_framefusion(model)
        for hook in hooks:
            hook.remove()
    dense, kept = states
    assert len(kept) == len(dense) == len(model.get_decoder().layers) + 1
    for ours, theirs in zip(kept, dense, strict=True):
        assert relative_error(ours.numpy(), theirs.numpy()) < subject.case.limit


@pytest.mark.slow
@torch.inference_mode()
def test_features_of_deepstack_under_another_name_are_refused(tmp_path: Path) -> None:
    """They would be added at the places of tokens that went."""
    (case,) = [case for case in LIVE_CASES if case.family == "qwen3_vl"]
    (tmp_path / "checkpoint").mkdir()
    case.write(tmp_path / "checkpoint", case.variants[0])
    pipeline = eager_pipeline(tmp_path / "checkpoint", tmp_path / "bundle", OPTIONS)
    subject = Subject(case, tmp_path / "checkpoint", pipeline, case.reference(tmp_path / "checkpoint"))
    model = subject.reference.model  # type: ignore[attr-defined]

    def renamed(_: Any, args: Any, given: dict[str, Any]) -> Any:
        return args, {"stacked" if name == DEEPSTACK_ARGUMENTS[1] else name: item for name, item in given.items()}

    model.get_decoder().register_forward_pre_hook(renamed, with_kwargs=True)
    apply_framefusion(model, 0.3)
    with pytest.raises(BackendError, match=r"no deepstack_visual_embeds .* newest version known to work"):
        live_logits(subject, read_conversation(subject, "video"))


def test_presets_are_the_rows_of_the_table() -> None:
    assert sorted(row.name for row in ROWS) == sorted(LIVE)
    for row in ROWS:
        preset = LIVE[row.name][1]
        assert (preset.similarity_lower_bound, preset.importance_rows) == (
            row.similarity_lower_bound,
            row.importance_rows,
        )


# --- Labels of InternVL, which writes frames and pictures with one token ---------------------------------------------


def partition(labels: Any) -> list[list[int]]:
    """Tokens by label, in the order of their first ones; text left out."""
    return sorted(np.flatnonzero(labels == label).tolist() for label in np.unique(labels[labels >= 0]))


def said(*parts: Any) -> list[Turn]:
    """Turns of the user, each a list of parts, and the same answer to each but the last."""
    turns = [turn for own in parts for turn in (Turn("user", tuple(own)), Turn("assistant", ("A cat.",)))]
    return turns[:-1]


def tall(frames: int, seed: int = 0) -> Any:
    return clip(frames, 28, 28, seed=seed)


LOOK, SEE = Visual.VIDEO, Visual.IMAGE
SQUARE = picture(28, 28)
FILMS_AND_PICTURES: dict[str, tuple[list[Turn], list[Any]]] = {
    "a film of two frames": (said([LOOK, "What?"]), [tall(2)]),
    "a film of 24 frames": (said([LOOK, "What?"]), [tall(24)]),
    "a film behind words": (said(["Look at this film: ", LOOK, "What?"]), [tall(12)]),
    "two films at once": (said([LOOK, LOOK, "Same?"]), [tall(12), tall(11, 1)]),
    "films of one frame": (said([LOOK, LOOK, "Same?"]), [tall(1), tall(1, 1)]),
    "films of two turns": (said([LOOK, "What?"], [LOOK, "What?"]), [tall(4), tall(3, 1)]),
    "pictures of two turns": (said([SEE, "What?"], [SEE, "What?"]), [SQUARE, SQUARE]),
    "pictures of four turns": (said(*[[SEE, "What?"]] * 4), [SQUARE] * 4),
    "pictures at once": (said([SEE, SEE, SEE, "What?"]), [SQUARE] * 3),
    "pictures with words between": (said([SEE, "and now this other one ", SEE, "What?"]), [SQUARE] * 2),
    "a picture and a film": (said([SEE, LOOK, "What?"]), [SQUARE, tall(3)]),
    "a film and a picture": (said([LOOK, "What?"], [SEE, "What?"]), [tall(3), SQUARE]),
}


@pytest.fixture(scope="module")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    (case,) = [case for case in LIVE_CASES if case.family == "internvl"]
    folder = tmp_path_factory.mktemp("internvl")
    case.write(folder, case.variants[0])
    pipeline = eager_pipeline(folder, tmp_path_factory.mktemp("bundle") / "b", OPTIONS)
    return Subject(case, folder, pipeline, case.reference(folder))


@pytest.mark.parametrize("name", FILMS_AND_PICTURES)
def test_films_and_pictures_are_told_apart_as_in_a_bundle(internvl: Subject, name: str) -> None:
    turns, shown = FILMS_AND_PICTURES[name]
    pipeline, model = internvl.pipeline, internvl.reference.model.base_model  # type: ignore[attr-defined]
    sampling = replace(pipeline.manifest.sampling, max_frames=32)
    prompt = pipeline.prompt(turns, pipeline.read_visuals(turns, shown, sampling, Stopwatch()))
    ids = torch.from_numpy(prompt.token_ids)[None]
    labels = tile_labels(model, MultimodalInputs(ids, {}), {})
    assert labels is not None
    assert partition(labels[0]) == partition(prompt.labels)


def test_a_chunk_may_begin_anywhere(internvl: Subject) -> None:
    """Within a frame, at its first token, at the token before: whole frames behind it are still one film."""
    turns, shown = FILMS_AND_PICTURES["a film of 24 frames"]
    pipeline, model = internvl.pipeline, internvl.reference.model.base_model  # type: ignore[attr-defined]
    prompt = pipeline.prompt(turns, pipeline.read_visuals(turns, shown, pipeline.manifest.sampling, Stopwatch()))
    ids, first = prompt.token_ids, int(np.flatnonzero(prompt.labels >= 0)[0])
    for start in range(first - 3, first + 12):
        labels = tile_labels(model, MultimodalInputs(torch.from_numpy(ids[start:])[None], {}), {})
        whole = partition(prompt.labels[start:])
        assert labels is not None
        assert [len(track) for track in partition(labels[0])][-1] >= len(whole[-1]) - 1
