"""What a row of the table of families says, and what rows share: key names of the LLMs, the ChatML layout."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from framefusion.export.families.reading.formats import COMMON, ConfigFormat
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.preprocess import Preprocessing
from framefusion.runtime.text.prompt import PromptTemplate, TurnLayout

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.families.towers import TowerPlan

QWEN2_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "embedding": "embed_tokens",
        "norm": "norm",
        "attention.norm": "input_layernorm",
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.o": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "mlp.norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
)
CHATML = PromptTemplate(
    turns={role: TurnLayout(f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("system", "user", "assistant")},
    generation_prefix="<|im_start|>assistant\n",
    default_system="You are a helpful assistant.",
)


@dataclass(frozen=True)
class LlmKeys:
    """Where the LLM is in a checkpoint.

    Attributes:
        prefixes: of the LLM's keys, newest first; the one whose embedding table exists is taken.
        head_keys: of the vocabulary projection, tried in order; none of them there means a tied head.
        names: slot of the generic decoder -> name below the prefix, or below `layers.{i}.` for a slot of a layer.
        packed_qkv: q, k and v are rows of one tensor; for each key-value head its queries, its key, its value.
    """

    prefixes: tuple[str, ...]
    head_keys: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=lambda: QWEN2_NAMES)
    packed_qkv: bool = False


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
        architectures: names in config.json's `architectures` that mean this family.
        model_types: `model_type` values that mean it where a config names no architecture.
        llm_architectures: of the configuration of the LLM within, where one format has several rows; none: any.
        checkpoints: hub names it was declared for.
        llm: where the LLM's parameters are.
        config: how its class reads config.json, where it does not do as most do.
        tower: "module:function" that plans the vision tower of a checkpoint.
        preprocessing, sampling: what a checkpoint says about frames.
        template: chat layout of a checkpoint that brings none; reading.chat_template takes the checkpoint's own.
        importance_rows: query rows the importance is averaged over in the reference code.
        similarity_lower_bound: threshold of the reference's own scripts for this family.
        verified: what the row was checked against.
        terminators: tokens that end an answer beside those that the checkpoint names.
        reference: transformers' class for this family, "" where there is none.
        reference_logits: "module:function" that runs it: TransformersCall -> logits [keep, V] of the last tokens.
        stand_in: parts of the model that no class of transformers computes, and what takes their place.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    checkpoints: tuple[str, ...]
    llm: LlmKeys
    tower: str
    preprocessing: Callable[[Checkpoint], Preprocessing]
    sampling: Callable[[Checkpoint], FrameSampling]
    template: Callable[[Checkpoint], PromptTemplate]
    importance_rows: int
    similarity_lower_bound: float
    verified: str
    terminators: tuple[str, ...] = ()
    reference: str = ""
    reference_logits: str = ""
    stand_in: str = ""
    llm_architectures: tuple[str, ...] = ()
    config: ConfigFormat = COMMON

    def plan_tower(self, checkpoint: Checkpoint) -> TowerPlan:
        """The vision tower of a checkpoint: a module on the meta device and where its parameters are."""
        plan: TowerPlan = load(self.tower)(checkpoint)
        return plan


def load(name: str) -> Callable[..., Any]:
    """The function that "module:function" names; the module is imported now and not before."""
    module, _, function = name.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded
