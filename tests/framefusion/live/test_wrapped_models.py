"""`apply_framefusion` on a model within another module, under autocast, and with all its hidden states.

The model within is what test_interface.py vouches for: whatever stands around it must not change an answer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from framefusion.errors import BackendError, CheckpointError
from framefusion.interface import apply_framefusion, remove_framefusion
from tests.framefusion.test_interface import SHOWN, film_prompt, live, llama, padded, relative, seeing, seen_prompt

__all__ = ["live", "seeing"]  # fixtures


class Kept(nn.Module):
    """Keeps a model under some name and calls it."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, model)

    def forward(self, *args: Any, **given: Any) -> Any:
        return getattr(self, self.name)(*args, **given)


class Adapted(Kept):
    """As PEFT's models are: names are looked up within, base_model is no model of transformers."""

    def __init__(self, model: Any) -> None:
        super().__init__(Kept(model, "model"), "base_model")

    def get_base_model(self) -> Any:
        return self.base_model.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "get_base_model": Adapted,
    "module": lambda model: Kept(model, "module"),
    "base_model": lambda model: Kept(model, "base_model"),
    "two of them": lambda model: Kept(Adapted(model), "module"),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("kind", WRAPPERS)
@torch.inference_mode()
def test_a_model_within_a_wrapper_is_reduced(kind: str) -> None:
    model, (ids, labels) = llama(), film_prompt()
    handle = apply_framefusion(model, 0.4, 0.8)
    with handle.labels(labels):
        expected, record = model(ids).logits, handle.last[0].tokens_per_layer
    remove_framefusion(model)
    wrapper = WRAPPERS[kind](model)
    handle = apply_framefusion(wrapper, 0.4, 0.8)
    assert wrapper.framefusion is model.framefusion is handle
    with handle.labels(labels):
        assert torch.equal(wrapper(ids).logits, expected)
    assert handle.last[0].tokens_per_layer == record
    remove_framefusion(wrapper)
    assert not hasattr(wrapper, "framefusion")
    assert not hasattr(model, "framefusion")


@pytest.mark.slow
def test_a_model_of_peft_is_reduced() -> None:
    """Adapters of zeros: the answer is the model's."""
    peft = pytest.importorskip("peft")
    model, (ids, labels) = copy.deepcopy(llama()), film_prompt()
    handle = apply_framefusion(model, 0.4, 0.8)
    told = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with handle.labels(labels):
        expected = model.generate(**told)
    remove_framefusion(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    handle = apply_framefusion(adapted, 0.4, 0.8)
    with handle.labels(labels):
        assert torch.equal(adapted.generate(**told), expected)
    assert handle.last[0].visual_after < handle.last[0].visual_before


@torch.inference_mode()
def test_wrappers_that_cannot_be_served_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="Linear is no model of transformers"):
        apply_framefusion(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="Linear is no model of transformers"):
        remove_framefusion(nn.Linear(2, 2))
    split: Any = nn.DataParallel(llama())
    split.device_ids = [0, 1]
    with pytest.raises(BackendError, match="DataParallel over 2 devices"):
        apply_framefusion(split)
    assert not hasattr(llama(), "framefusion")


@pytest.mark.slow
@torch.inference_mode()
def test_a_model_that_was_compiled_before_refuses_to_reduce() -> None:
    """What was compiled without hooks does not go on without them."""
    model, (ids, labels) = llama(), film_prompt()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager")
    compiled(ids)
    handle = apply_framefusion(compiled, 0.4, 0.8)
    with handle.labels(labels), pytest.raises(BackendError, match="disable_compile=True"):
        compiled(ids)
    remove_framefusion(compiled)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_autocast_leaves_the_scores_alone(live: tuple[Any, Any], dtype: torch.dtype) -> None:
    """Sharp attention and tokens that are equal or not: halves within the layers move no token across a threshold."""
    model, handle = live
    ids, labels = film_prompt()
    with handle.labels(labels):
        expected = model(ids).logits[0, -1]
        kept = [places.tolist() for places in handle.last[0].kept]
        with torch.autocast("cpu", dtype=dtype):
            logits = model(ids).logits[0, -1].float()
    assert [places.tolist() for places in handle.last[0].kept] == kept
    assert relative(logits, expected.numpy()) < 0.05  # six layers of bf16


@pytest.mark.parametrize("way", ["asked for", "in the configuration", "as a tuple"])
@torch.inference_mode()
def test_hidden_states_come_back_at_their_places(live: tuple[Any, Any], way: str, monkeypatch: Any) -> None:
    """Padding on the left and rows that shrink apart: each state is that of its row alone, zeros where tokens went."""
    model, handle = live
    told: dict[str, Any] = {} if way == "in the configuration" else {"output_hidden_states": True}
    if way == "in the configuration":
        monkeypatch.setattr(model.config, "output_hidden_states", True)
    prompts = [film_prompt(0), film_prompt(1, frames=5, after=9)]
    ids, labels = (padded([prompt[i] for prompt in prompts], "left", fill) for i, fill in enumerate((0, -1)))
    mask = padded([torch.ones_like(own) for own, _ in prompts], "left", 0)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with handle.labels(labels):
        output = model(
            ids, attention_mask=mask, position_ids=places, return_dict=way != "as a tuple", use_cache=False, **told
        )
        states = next(one for one in output if isinstance(one, tuple)) if way == "as a tuple" else output.hidden_states
        records = handle.last
    assert [state.shape for state in states] == [(2, ids.shape[1], 48)] * 7
    dense = [model(own, output_hidden_states=True).hidden_states for own, _ in prompts]
    for row, ((own, own_labels), record) in enumerate(zip(prompts, records, strict=True)):
        with handle.labels(own_labels):
            alone = model(own, output_hidden_states=True).hidden_states
        start = ids.shape[1] - own.shape[1]
        for i, (state, expected) in enumerate(zip(states, alone, strict=True)):
            assert relative(state[row, start:], expected[0].numpy()) < 1e-4
            assert not state[row, :start].any()
            there = torch.nonzero(expected[0].any(-1))[:, 0].tolist()
            assert there == (record.kept[min(i, 5)] - start).tolist()
        text = torch.nonzero(own_labels[0] < 0)[:, 0]
        assert torch.equal(alone[0][0, text], dense[row][0][0, text]), "embeddings of text are untouched"


@torch.inference_mode()
def test_hidden_states_of_a_model_that_sees(seeing: Any) -> None:
    """generate() gives those of the prompt and of every step."""
    handle = apply_framefusion(seeing, 0.4)
    prompt = seen_prompt(seeing, SHOWN[0], 0)
    length = prompt["input_ids"].shape[1]
    told = seeing.generate(
        **prompt, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None, output_hidden_states=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    remove_framefusion(seeing)
    assert [[state.shape[1] for state in step] for step in told.hidden_states] == [[length] * 7, [1] * 7, [1] * 7]
    assert int(told.hidden_states[0][-1][0].any(-1).sum()) == handle.last[0].tokens_per_layer[-1] < length
