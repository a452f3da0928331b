"""The seams: every name of transformers that the live model leans on, in all its spellings.

transformers moves these names between minor versions, and says so only to who calls it in the old way. Whatever the
modules of this folder read of a model, hand to a layer or take from a registry is named here; what a forward must show
before its answer is believed stands in proof.py. A name that moved is looked up under each of its spellings by what is
passed, not by the version that is installed.

    models      get_decoder(), base_model, config.model_type, config.get_text_config()
    decoder     layers, each with LAYER_PARTS; arguments input_ids or inputs_embeds, attention_mask, CACHE_ARGUMENTS,
                DEEPSTACK_ARGUMENTS; output last_hidden_state, hidden_states and the cache
    layer       arguments hidden_states, LAYER_ARGUMENTS, CACHE_ARGUMENTS; output [B, S, D]
    attention   config._attn_implementation, looked up in the registry; eager_attention_forward of its own module
    cache       Cache.layers, get_seq_length(); DynamicLayer, StaticLayer and their sliding kinds

VERSIONS are those that docs/live.md has a table of answers for (`python -m tools.live_versions`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import metadata
from typing import Any, Protocol

from torch import nn

from framefusion.errors import BackendError, CheckpointError

VERSIONS = ("5.10", "5.17", "5.23", "5.24")
"""Of transformers, oldest first: with each of them the same answers were given."""

LAYER_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
FOREIGN_PART = "pre_feedforward_layernorm"
"""A layer that has it normalizes behind its attention, too: its residual is not what the next norm takes."""

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""The KV cache among the arguments of a model, a decoder, a layer: since transformers 5.24, and before."""
DEEPSTACK_ARGUMENTS = ("visual_pos_masks", "deepstack_visual_embeds")
LAYER_ARGUMENTS = ("attention_mask", "position_ids", "position_embeddings")
"""What a layer is given for each token, besides the hidden states."""

WRAPPED = ("_orig_mod", "module", "base_model", "model")
"""Where modules that wrap a model keep it: torch.compile's, DataParallel's, others'."""


class Cache(Protocol):
    """What the live model uses of transformers' Cache."""

    layers: list[Any]  # of the classes that `cache_layers` has, one a decoder layer that ran

    def get_seq_length(self) -> int:
        """Tokens of the prompt so far."""


def installed() -> str:
    """The version of transformers."""
    return metadata.version("transformers")


def broken(what: str) -> BackendError:
    """The error for a seam that did not hold.

    Args:
        what: happened, or did not happen.
    """
    version = installed()
    newest = VERSIONS[-1]
    newer = _minor(version) > _minor(newest)
    remedy = (
        f"install transformers=={newest}.*"
        if newer
        else "apply FrameFusion last, to a model whose modules nothing else replaces"
    )
    return BackendError(
        f"{what}: the answer would be wrong. transformers {version} is installed, {newest} is the newest version known "
        f"to work: {remedy}"
    )


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


# --- Arguments ------------------------------------------------------------------------------------------------------


def arguments_of(module: nn.Module, first: str, args: tuple[Any, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a module's forward by name.

    Args:
        module: whose hook was given the others.
        first: name of its first argument.
        args: by place.
        given: by name.

    Raises:
        BackendError: arguments by place whose names are not known.
    """
    if len(args) < 2:
        return {**dict(zip((first,), args, strict=False)), **given}
    names = (first, *_positional(type(module).forward)[1:])
    if len(args) > len(names):
        raise broken(
            f"{type(module).__name__} is given {len(args)} arguments by place, of which {len(names)} have names"
        )
    return {**dict(zip(names, args, strict=False)), **given}


@cache
def _positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments that may be given by place, without self."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)


def cache_of(given: Mapping[str, Any]) -> Cache | None:
    """The KV cache among the arguments of a module, None without one.

    Raises:
        BackendError: it comes under a name that nobody here knows.
    """
    for name in CACHE_ARGUMENTS:
        if given.get(name) is not None:
            cache: Cache = given[name]
            return cache
    strange = [name for name, value in given.items() if isinstance(value, cache_class())]
    if strange:
        raise broken(f"the KV cache is passed as {strange[0]}, not as {' or '.join(CACHE_ARGUMENTS)}")
    return None


def cache_in(output: Iterable[Any]) -> Cache | None:
    """The KV cache among what a decoder gives back, None without one."""
    return next((value for value in output if isinstance(value, cache_class())), None)


# --- Classes and registries -----------------------------------------------------------------------------------------


@cache
def cache_class() -> Any:
    """transformers' Cache."""
    from transformers.cache_utils import Cache

    return Cache


@cache
def cache_layers() -> Any:
    """The module of the classes DynamicLayer, StaticLayer, DynamicSlidingWindowLayer, StaticSlidingWindowLayer."""
    from transformers import cache_utils

    return cache_utils


@cache
def crop_gives_length() -> bool:
    """Whether the argument of a cache layer's crop() is a length, as up to 5.10, or a number of tokens, negative."""
    return "max_length" in inspect.signature(cache_layers().DynamicLayer.crop).parameters


def register_attention(name: str, attend: Callable[..., Any]) -> None:
    """Add a function to transformers' registry of attention."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(name, attend)


def attention_of(module: nn.Module, implementation: str | None) -> Any:
    """The attention function that a module looks up under a name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    registry: Any = ALL_ATTENTION_FUNCTIONS
    return registry.get_interface(implementation, eager)


# --- Models ---------------------------------------------------------------------------------------------------------


def unwrapped(model: Any) -> Any:
    """The model of transformers within whatever wraps it: PEFT's, torch.compile's, DataParallel's, accelerate's.

    Raises:
        BackendError: it is split over several devices by batch, where threads would not have the labels.
        CheckpointError: there is no model of transformers within.
    """
    from transformers import PreTrainedModel

    outermost = type(model).__name__
    while not isinstance(model, PreTrainedModel):
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise BackendError(
                f"DataParallel over {len(model.device_ids)} devices runs copies of the model in threads of its own: "
                "load the model with device_map, or give DataParallel one device"
            )
        inner = model.get_base_model() if hasattr(model, "get_base_model") else None
        within = (getattr(model, name, None) for name in WRAPPED)
        if inner is None:
            inner = next((module for module in within if isinstance(module, nn.Module)), None)
        if inner is None or inner is model:
            if hasattr(model, "get_decoder"):
                return model
            raise CheckpointError(
                f"{outermost} is no model of transformers and none is within it: give the model that has get_decoder()"
            )
        model = inner
    return model
