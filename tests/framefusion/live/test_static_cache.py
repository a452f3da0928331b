"""A static cache under `apply_framefusion` holds what a dynamic one does: tokens, logits, turns; compiled decode steps.

The dynamic cache is vouched for by test_interface.py. Logits agree to SAME: masks take another kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from framefusion.errors import BackendError
from framefusion.interface import apply_framefusion, remove_framefusion
from tests.framefusion.test_interface import (
    SAME,
    SHOWN,
    WAYS,
    answer_of,
    film_prompt,
    flash,
    greedy,
    live,
    llama,
    padded,
    relative,
    seeing,
    seen_prompt,
    together,
)

__all__ = ["live", "seeing"]  # fixtures
STATIC = {"cache_implementation": "static"}
QUESTION = torch.tensor([[5, 9, 2, 77]])


def static_of(model: Any, length: int = 400) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config.get_text_config(), max_cache_len=length)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return relative(ours, theirs.numpy()) < SAME


def buffers(cache: Any) -> list[tuple[int, tuple[int, ...]]]:
    """Where each layer's tensors lie, and their shapes."""
    return [(one.data_ptr(), tuple(one.shape)) for layer in cache.layers for one in (layer.keys, layer.values)]


def batch(number: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels and mask of prompts of unlike lengths, the last one of text alone."""
    prompts = [film_prompt(0), film_prompt(1, frames=5), film_prompt(2, frames=0, before=20)][:number]
    parts = [[*prompt, torch.ones_like(prompt[0])] for prompt in prompts]
    ids, labels, mask = (padded([rows[i] for rows in parts], "left", fill) for i, fill in enumerate((0, -1, 0)))
    return ids, labels, mask


# --- Forwards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.inference_mode()
def test_turns_and_their_buffers(live: tuple[Any, Any], attention: str) -> None:
    """A film, tokens one by one, a second film; reset() and all of it again: buffers of one place and shape."""
    model, _ = live
    model.set_attn_implementation(attention)
    handle = apply_framefusion(model, 0.4, 0.8)
    (ids, labels), (film, film_labels) = film_prompt(), film_prompt(3)
    labels = torch.cat([labels, torch.full_like(QUESTION, -1), film_labels], dim=1)

    def turns(cache: Any) -> Iterator[tuple[torch.Tensor, Any]]:
        with handle.labels(labels):
            yield model(ids, past_key_values=cache).logits, handle.last[0].tokens_per_layer
            for token in QUESTION[0]:
                yield model(token[None, None], past_key_values=cache).logits, cache.get_seq_length()
            yield model(film, past_key_values=cache).logits, handle.last[0].tokens_per_layer

    from transformers import DynamicCache

    expected, static = list(turns(DynamicCache())), static_of(model)
    for _ in range(2):
        places = None
        for (ours, told), (theirs, known) in zip(turns(static), expected, strict=True):
            assert same(ours, theirs)
            assert told == known
            places = buffers(static) if places is None else places
            assert buffers(static) == places
        assert {shape for _, shape in buffers(static)} == {(1, 2, 400, 12)}
        static.reset()
        assert static.get_seq_length() == 0
        assert same(model(ids, past_key_values=static).logits, model(ids).logits), "text alone after a film"
        static.reset()


@torch.inference_mode()
def test_a_film_behind_a_turn_of_text(live: tuple[Any, Any]) -> None:
    """Layers that hold dense tokens, one row of them padded, take reduced ones on."""
    model, handle = live
    text, mask = torch.arange(1, 13).reshape(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    film, labels = (part.repeat(2, 1) for part in film_prompt())
    whole_mask = torch.cat([mask, torch.ones_like(film)], dim=1)
    answers = []
    for cache in (None, static_of(model)):
        past = model(text, attention_mask=mask, past_key_values=cache, use_cache=True).past_key_values
        with handle.labels(torch.cat([torch.full_like(text, -1), labels], dim=1)):
            answers.append(model(film, attention_mask=whole_mask, past_key_values=past).logits)
        assert handle.last[0].visual_after < handle.last[0].visual_before
    assert same(answers[1], answers[0])


@torch.inference_mode()
def test_a_cache_that_is_too_short_is_refused_by_name(live: tuple[Any, Any]) -> None:
    model, handle = live
    ids, labels = film_prompt()
    with handle.labels(labels), pytest.raises(BackendError, match=r"static cache of 100 .* 105: give max_cache_len"):
        model(ids, past_key_values=static_of(model, 100))


@pytest.mark.parametrize("static", [False, True])
@torch.inference_mode()
def test_a_reduced_cache_is_of_no_use_to_a_model_that_is_restored(live: tuple[Any, Any], static: bool) -> None:
    model, handle = live
    ids, labels = film_prompt()
    with handle.labels(labels):
        past = model(ids, past_key_values=static_of(model) if static else None).past_key_values
    remove_framefusion(model)
    with pytest.raises(BackendError, match="begin with a new cache"):
        model(QUESTION, past_key_values=past)


# --- generate() -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [name for name in WAYS if name != "prompt lookup"])  # needs a cache that gives back
@torch.inference_mode()
def test_every_way_to_generate(live: tuple[Any, Any], way: str) -> None:
    model, handle = live
    ids, labels = film_prompt()
    answers = []
    for told in ({}, STATIC):
        torch.manual_seed(0)
        with handle.labels(labels):
            answers.append(greedy(model, ids, **WAYS[way], **told).tolist())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.inference_mode()
def test_a_batch_with_padding(live: tuple[Any, Any], attention: str) -> None:
    """generate() makes masks of four axes for a static cache: padding is read from them."""
    model, _ = live
    model.set_attn_implementation(attention)
    handle = apply_framefusion(model, 0.4, 0.8)
    ids, labels, mask = batch()
    with handle.labels(labels):
        expected = greedy(model, ids, attention_mask=mask)
        records = [(record.tokens_per_layer, record.calls) for record in handle.last]
        assert torch.equal(greedy(model, ids, attention_mask=mask, **STATIC), expected)
    assert [(record.tokens_per_layer, record.calls) for record in handle.last] == records


@torch.inference_mode()
def test_a_conversation_on_one_cache(live: tuple[Any, Any]) -> None:
    model, handle = live
    ids, labels = film_prompt()
    answers = []
    for cache in (None, static_of(model)):
        with handle.labels(labels):
            past = model(ids, past_key_values=cache).past_key_values
            answers.append(greedy(model, torch.cat([ids, QUESTION], dim=1), past_key_values=past).tolist())
    assert answers[0] == answers[1]


@torch.inference_mode()
def test_layers_of_unlike_kinds() -> None:
    """Masks by kind of attention, and static layers of a window; beyond it they are refused as ever."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention"] * 3
    config = Qwen2Config(
        vocab_size=120, hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=128, layer_types=kinds,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model: Any = Qwen2ForCausalLM(config)
    model.eval()
    handle = apply_framefusion(model, 0.4, 0.8)
    ids, labels, mask = batch()
    with handle.labels(labels):
        expected = greedy(model, ids, attention_mask=mask)
        assert torch.equal(greedy(model, ids, attention_mask=mask, **STATIC), expected)
        with pytest.raises(BackendError, match="window of 128"):
            greedy(model, ids, attention_mask=mask, max_new_tokens=40, **STATIC)


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_films_and_pictures(seeing: Any, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    prompts = together([seen_prompt(seeing, grids, seed) for seed, grids in enumerate(SHOWN)])
    seeing.set_attn_implementation("sdpa")
    apply_framefusion(seeing, 0.4)
    expected = answer_of(seeing, prompts)
    if attention == "flash":  # the kernels need a GPU: a function with their contract stands for them
        masks = ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", masks)
        monkeypatch.setattr(seeing.config.text_config, "_attn_implementation_internal", "flash_attention_2")
    assert answer_of(seeing, prompts, **STATIC) == expected
    remove_framefusion(seeing)


# --- Compiled decode steps ------------------------------------------------------------------------------------------


@pytest.fixture
def compiling() -> Iterator[Callable[..., Any]]:
    """A compile_config for the CPU, where generate() compiles by itself only on accelerators."""
    from transformers import CompileConfig

    def config(**named: Any) -> Any:
        asked: dict[str, Any] = {"backend": "aot_eager", "fullgraph": True, "mode": None} | named
        told: Any = CompileConfig(**asked)
        told._compile_all_devices = True
        return told

    torch._dynamo.reset()
    yield config
    torch._dynamo.reset()
    for model in (llama(),):
        for name in ("_compiled_call", "_last_compile_config"):
            model.__dict__.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.inference_mode()
def test_compiled_steps(live: tuple[Any, Any], compiling: Callable[..., Any], attention: str) -> None:
    """One graph without a break for every token of a padded batch; an uncompiled turn goes on over what it stored."""
    from torch._dynamo.utils import counters
    from transformers import DynamicCache

    model, _ = live
    model.set_attn_implementation(attention)
    handle = apply_framefusion(model, 0.4, 0.8)
    ids, labels, mask = batch(2)
    static, dynamic, counted = static_of(model), DynamicCache(), {"max_new_tokens": 12, "attention_mask": mask}
    counters.clear()
    with handle.labels(labels):
        expected = greedy(model, ids, **counted, past_key_values=dynamic)
        assert torch.equal(greedy(model, ids, **counted, past_key_values=static, compile_config=compiling()), expected)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
        places = buffers(static)
        mask = torch.cat([mask, torch.ones(2, 11 + 4, dtype=torch.long)], dim=1)  # the last token was never stored
        asked = partial(model, QUESTION.repeat(2, 1), attention_mask=mask)
        assert same(asked(past_key_values=static).logits, asked(past_key_values=dynamic).logits)
    assert buffers(static) == places


@pytest.mark.slow
@torch.inference_mode()
def test_what_compiled_code_cannot_do_is_refused_by_name(live: tuple[Any, Any], compiling: Callable[..., Any]) -> None:
    """A prefill, whole or in chunks, or of single layers; steps over a dynamic cache. Nothing is silently dense."""
    model, handle = live
    ids, labels = film_prompt()
    compiled: Any = partial(torch.compile, backend="eager")
    with handle.labels(labels):
        with pytest.raises(BackendError, match="disable_compile=True"):
            compiled(model)(ids)
        with pytest.raises(BackendError, match="disable_compile=True"):
            greedy(model, ids, prefill_chunk_size=64, **STATIC, compile_config=compiling(fullgraph=False))
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="disable_compile=True"):
            compiled(model, fullgraph=True)(ids)
        answer = greedy(model, ids, prefill_chunk_size=64, **STATIC, compile_config=compiling(), disable_compile=True)
        assert torch.equal(answer, greedy(model, ids, prefill_chunk_size=64))
        past = model(ids).past_key_values
        with pytest.raises(BackendError, match="static cache"):
            compiled(model)(QUESTION[:, :1], past_key_values=past)
        layer = model.model.layers[1]
        layer.compile(backend="eager")
        try:
            with pytest.raises(BackendError, match=r"without torch\.compile"):
                model(ids)
        finally:
            layer._compiled_call_impl = None


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_calls_outlive_the_change_of_a_model(live: tuple[Any, Any], compiling: Callable[..., Any]) -> None:
    """A step compiled before the change, or before its removal, serves what comes behind it."""
    model, _ = live
    remove_framefusion(model)
    (ids, labels), config = film_prompt(), compiling(backend="eager")
    dense, reduced = greedy(model, ids), None
    for _ in range(2):
        assert torch.equal(greedy(model, ids, **STATIC, compile_config=config), dense)
        handle = apply_framefusion(model, 0.4, 0.8)
        with handle.labels(labels):
            reduced = greedy(model, ids) if reduced is None else reduced
            assert torch.equal(greedy(model, ids, **STATIC, compile_config=config), reduced)
        remove_framefusion(model)
    assert not torch.equal(dense, reduced)  # type: ignore[arg-type]
