"""Seams of transformers, each broken on purpose on transformers' side: a refusal by name, never another answer.

What is broken is always the caller or the callee within transformers; our hooks and checks stay as they are.
"""

from __future__ import annotations

import ast
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from framefusion.errors import BackendError, PromptError
from framefusion.interface import apply_framefusion, remove_framefusion
from framefusion.live.labels import FAMILIES
from framefusion.live.seams import CACHE_ARGUMENTS, VERSIONS, installed
from tests.framefusion.test_interface import FILM, film_prompt, live, llama, seeing, seen_prompt
from tests.wheel import ROOT

__all__ = ["live", "seeing"]  # fixtures
QUESTION = torch.tensor([[5, 9, 2, 77]])
Patch = pytest.MonkeyPatch
Break = Callable[[Patch], Any]


def parts() -> dict[str, Any]:
    """Classes of transformers' Llama by what they are here."""
    from transformers.models.llama import modeling_llama

    return {
        "layer": modeling_llama.LlamaDecoderLayer,
        "norm": modeling_llama.LlamaRMSNorm,
        "attention": modeling_llama.LlamaAttention,
        "decoder": modeling_llama.LlamaModel,
        "module": modeling_llama,
    }


def renamed(*names: str, new: str, part: str = "layer") -> Break:
    """Whoever calls the part passes an argument under a new name, and the part knows it."""

    def apply(patch: Patch) -> None:
        kind = parts()[part]
        forward, old = kind.forward, next(iter(names))

        def call(self: Any, *args: Any, **given: Any) -> Any:
            nonlocal old
            if "hidden_states" in names:
                return torch.nn.Module.__call__(self, **{new: args[0]}, **given)
            old = next((name for name in names if name in given), old)
            return torch.nn.Module.__call__(self, *args, **{new: given.pop(old, None)}, **given)

        def knowing(self: Any, *args: Any, **given: Any) -> Any:
            return forward(self, *args, **({old: given.pop(new)} if new in given else {}), **given)

        patch.setattr(kind, "__call__", call)
        patch.setattr(kind, "forward", knowing)

    return apply


def without_hooks(part: str) -> Break:
    """Forwards are called past the hooks of a module, as inlined or fused code does."""
    return lambda patch: patch.setattr(parts()[part], "__call__", parts()[part].forward)


def left_out(patch: Patch) -> None:
    """The last layer is not run."""
    patch.setattr(llama().config, "num_hidden_layers", 5)


def cache_hidden(patch: Patch) -> None:
    """Layers find the cache elsewhere than among their arguments."""
    kept: dict[str, Any] = {}
    kind, forward = parts()["layer"], parts()["layer"].forward

    def call(self: Any, *args: Any, **given: Any) -> Any:
        for name in CACHE_ARGUMENTS:
            if name in given:
                kept[name] = given.pop(name)
        return torch.nn.Module.__call__(self, *args, **given)

    patch.setattr(kind, "__call__", call)
    patch.setattr(kind, "forward", lambda self, *args, **given: forward(self, *args, **(kept | given)))


def cache_copied(patch: Patch) -> None:
    """Attention stores into a cache of its own."""
    from transformers import DynamicCache

    kind, forward = parts()["attention"], parts()["attention"].forward

    def attend(self: Any, *args: Any, **given: Any) -> Any:
        fresh: Any = DynamicCache()
        return forward(self, *args, **{key: fresh if key in CACHE_ARGUMENTS else one for key, one in given.items()})

    patch.setattr(kind, "forward", attend)


def cache_tells_what_it_stores(patch: Patch) -> None:
    """A cache counts its keys, not what its layers tell."""
    from transformers.cache_utils import Cache

    def counted(self: Any, layer_idx: int = 0) -> int:
        return int(self.layers[-1].keys.shape[2]) if self.layers and self.layers[-1].is_initialized else 0

    patch.setattr(Cache, "get_seq_length", counted)


def registry_bypassed(patch: Patch) -> None:
    """Attention functions are bound once and no longer looked up."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    class Bound:
        def get_interface(self, *_: Any) -> Any:
            return ALL_ATTENTION_FUNCTIONS["sdpa"]

    patch.setattr(parts()["module"], "ALL_ATTENTION_FUNCTIONS", Bound())


def configuration_read_elsewhere(patch: Patch) -> None:
    """Attention modules are handed the decoder's configuration anew."""
    for layer in llama().model.layers:
        patch.setattr(layer.self_attn, "config", llama().config)


def residual_copied(patch: Patch) -> None:
    """The norm behind the attention takes another tensor than the one that is added behind the MLP."""
    norms = {id(layer.post_attention_layernorm) for layer in llama().model.layers}

    def call(self: Any, hidden: torch.Tensor) -> Any:
        return torch.nn.Module.__call__(self, hidden.clone() if id(self) in norms else hidden)

    patch.setattr(parts()["norm"], "__call__", call)


BROKEN: dict[str, tuple[Break, str]] = {
    "cache renamed": (renamed(*CACHE_ARGUMENTS, new="kv_store"), "passed as kv_store"),
    "mask renamed": (renamed("attention_mask", new="bias"), "no attention_mask"),
    "tables renamed": (renamed("position_embeddings", new="rotary"), "no position_embeddings of 105"),
    "positions renamed": (renamed("position_ids", new="places"), "unknown name"),
    "hidden states renamed": (renamed("hidden_states", new="states"), "no hidden_states"),
    "hooks of layers dropped": (without_hooks("layer"), "layer 0"),
    "hooks of norms dropped": (without_hooks("norm"), "between attention and MLP of decoder layer 0"),
    "hooks of the decoder dropped": (without_hooks("decoder"), "LlamaForCausalLM ran without"),
    "layer left out": (left_out, "layer 5"),
    "cache hidden": (cache_hidden, "no decoder layer was given the KV cache"),
    "cache copied": (cache_copied, "layer 0 stored nothing"),
    "cache tells what it stores": (cache_tells_what_it_stores, "for a prompt of 105"),
    "registry bypassed": (registry_bypassed, "attention of decoder layer 0"),
    "configuration read elsewhere": (configuration_read_elsewhere, "attention of decoder layer 0"),
    "residual copied": (residual_copied, "residual"),
}


def refused(error: pytest.ExceptionInfo[BackendError], words: str) -> bool:
    """Whether a message says what broke, what is installed and what is known to work."""
    message = str(error.value)
    return words in message and f"transformers {installed()} is installed" in message and VERSIONS[-1] in message


@pytest.mark.parametrize("name", BROKEN)
@torch.inference_mode()
def test_a_seam_that_broke_is_refused_by_name(live: tuple[Any, Any], name: str, monkeypatch: Patch) -> None:
    model, handle = live
    (ids, labels), (breaking, words) = film_prompt(), BROKEN[name]
    ids[0, 4:100] = torch.arange(96)  # no token repeats: what is left must be pruned by importance
    with handle.labels(labels):
        expected = model(ids).logits
        with monkeypatch.context() as patch:
            breaking(patch)
            with pytest.raises(BackendError) as error:
                model(ids)
        assert refused(error, words), error.value
        assert torch.equal(model(ids).logits, expected), "a refusal leaves nothing behind"


STEPS = [
    name for name in BROKEN if name not in ("residual copied", "registry bypassed", "configuration read elsewhere")
]


@pytest.mark.parametrize("name", [name for name in STEPS if "renamed" not in name or "cache" in name])
@torch.inference_mode()
def test_a_seam_that_breaks_behind_the_prompt_is_refused_by_name(
    live: tuple[Any, Any], name: str, monkeypatch: Patch
) -> None:
    """Steps of a generation go on over reduced tokens: a seam may break there alone."""
    model, handle = live
    ids, labels = film_prompt()
    with handle.labels(labels):
        past = model(ids).past_key_values
        BROKEN[name][0](monkeypatch)
        with pytest.raises(BackendError):
            model(ids[:, :1], past_key_values=past)


HOOKS = [
    (module, kind)
    for module in (
        "model",
        "model.layers.0",
        "model.layers.3",
        "model.layers.5",
        "model.layers.3.post_attention_layernorm",
    )
    for kind in ("_forward_pre_hooks", "_forward_hooks")
    if "norm" not in module or "pre" in kind
]


@pytest.mark.parametrize(("name", "kind"), HOOKS)
@torch.inference_mode()
def test_a_hook_that_somebody_drops_is_refused_by_name(
    live: tuple[Any, Any], name: str, kind: str, monkeypatch: Patch
) -> None:
    """Of the decoder, of its first, some and last layer: in the prompt and in a step behind it."""
    model, handle = live
    ids, labels = film_prompt()
    with handle.labels(labels):
        past = model(ids).past_key_values
        monkeypatch.setattr(model.get_submodule(name), kind, OrderedDict())
        with pytest.raises(BackendError) as error:
            model(ids)
        assert refused(error, "ran" if name == "model" else "decoder layer"), error.value
        with pytest.raises(BackendError):
            model(ids[:, :1], past_key_values=past)


@torch.inference_mode()
def test_visual_tokens_without_labels_are_refused(seeing: Any, monkeypatch: Patch) -> None:
    """Of a family that nobody knows, or in a decoder that is called past its model."""
    told = seen_prompt(seeing, [FILM], 0)
    monkeypatch.setattr(seeing.config, "model_type", "qwen9_vl")
    handle = apply_framefusion(seeing, 0.4)
    with pytest.raises(PromptError, match=r"96 visual tokens .* qwen9_vl"):
        seeing(**told)
    with handle.labels(torch.full_like(told["input_ids"], -1)):
        assert seeing(**told).logits.isfinite().all()
    monkeypatch.undo()
    apply_framefusion(seeing, 0.4)
    with pytest.raises(PromptError, match="whole model"):
        seeing.get_decoder()(inputs_embeds=torch.randn(1, 20, 32))
    remove_framefusion(seeing)


def test_an_older_or_newer_version_is_told_apart(monkeypatch: Patch) -> None:
    """The remedy of a newer version is the newest known one; of a known version it is not to install it again."""
    from framefusion.live import seams as live_seams

    for version, words in (("5.99.0", f"install transformers=={VERSIONS[-1]}.*"), ("5.10.4", "apply FrameFusion last")):
        monkeypatch.setattr(live_seams, "installed", lambda version=version: version)
        assert words in str(live_seams.broken("x"))


def test_names_of_transformers_stand_in_one_module() -> None:
    """No other module of the live model imports transformers, or says how a cache argument is spelled."""
    paths = [*(ROOT / "framefusion" / "live").rglob("*.py"), ROOT / "framefusion" / "interface.py"]
    assert len(paths) > 10
    for path in paths:
        if path.name == "seams.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = [getattr(node, "module", None) or node.names[0].name for node in imports]
        assert not [name for name in modules if name.split(".")[0] == "transformers"], path
        spelled = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert not {"past_key_values", "cache"} & {word for word in spelled if isinstance(word, str)}, path


def test_the_versions_known_to_work_are_those_of_the_committed_answers() -> None:
    """Every cell is equal, or what the version does without us; the document shows all of them."""
    from tools.live_versions import BEGIN, DOCUMENT, END, RESULTS, WAYS, table, verdict

    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert tuple(".".join(one["transformers"].split(".")[:2]) for one in results) == VERSIONS
    families = list(results[-1]["families"])
    assert sorted(families) == sorted(FAMILIES)
    verdicts = {
        (i, family, way): verdict(results, i, family, way) for i in range(4) for family in families for way in WAYS
    }
    assert set(verdicts.values()) <= {"equal", "not by transformers", "differs as transformers does"}
    newest = [key for key, value in verdicts.items() if key[0] == 3 and value != "equal"]
    assert newest == [(3, f"llava_{name}", "assisted") for name in ("onevision", "next_video")]
    shown = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()
    assert shown == table(results)
