"""The table of model families: one frozen row each, checked when imported; what is heavy is named and loaded on demand.

A family says which checkpoint keys feed which slot of the generic decoder, which tower sees the frames, how frames
become tokens and how a prompt is laid out. Facts that a checkpoint tells (sizes, biases, tied heads, pixel limits) are
read from it, not repeated here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from framefusion.errors import CheckpointError, UnknownFamilyError
from framefusion.runtime.preprocess import Preprocessing
from framefusion.runtime.prompt import PromptTemplate
from framefusion.runtime.video import FrameSampling

if TYPE_CHECKING:
    from torch import nn

    from framefusion.export.checkpoint import Checkpoint
    from framefusion.export.weights import Source

QWEN2_NAMES: Mapping[str, str] = MappingProxyType(
    {
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
CHATML = {
    "default_system": "You are a helpful assistant.",
    "turn_prefix": "<|im_start|>{role}\n",
    "turn_suffix": "<|im_end|>\n",
    "generation_prefix": "<|im_start|>assistant\n",
}


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
        model_types: `model_type` values of config.json that mean this family.
        checkpoints: hub names it was declared for.
        llm_prefixes: prefixes of the LLM's keys, newest first; the one whose embedding table exists is taken.
        head_keys: keys of the vocabulary projection, tried in order; none of them there means a tied head.
        names: slot of the generic decoder -> name below `layers.{i}.` in the checkpoint.
        tower: "module:function" that makes the vision tower of a checkpoint and says where its weights are.
        reference: class of transformers to check against.
        importance_rows: query rows the importance is averaged over in the reference code.
        similarity_lower_bound: threshold of the reference's own scripts for this family.
        prompt: strings of the chat layout; ids of pad tokens come from config.json by `pad_keys`.
        verified: what the row was checked against.
    """

    name: str
    model_types: tuple[str, ...]
    checkpoints: tuple[str, ...]
    llm_prefixes: tuple[str, ...]
    head_keys: tuple[str, ...]
    names: Mapping[str, str]
    tower: str
    reference: str
    importance_rows: int
    similarity_lower_bound: float
    prompt: Mapping[str, str]
    pad_keys: Mapping[str, str]
    preprocessing: Preprocessing
    sampling: FrameSampling
    verified: str

    def build_tower(self, checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, Source]]:
        """The vision tower on the meta device and the sources of its parameters."""
        module, _, function = self.tower.partition(":")
        built: tuple[Any, dict[str, Source]] = getattr(importlib.import_module(module), function)(checkpoint)
        return built

    def prompt_template(self, checkpoint: Checkpoint) -> PromptTemplate:
        """The chat layout with this checkpoint's token ids."""
        fields: dict[str, Any] = dict(self.prompt)
        for name, key in self.pad_keys.items():
            if key not in checkpoint.config:
                raise CheckpointError(f"{checkpoint.folder}/config.json has no {key}: the checkpoint is incomplete")
            fields[name] = checkpoint.config[key]
        return PromptTemplate(**fields)


FAMILIES: tuple[Family, ...] = (
    Family(
        name="qwen2_vl",
        model_types=("qwen2_vl",),
        checkpoints=("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-72B-Instruct"),
        llm_prefixes=("model.language_model.", "model.", "language_model.model."),
        head_keys=("lm_head.weight", "language_model.lm_head.weight"),
        names=QWEN2_NAMES,
        tower="framefusion.export.families.qwen2_vl:tower",
        reference="Qwen2VLForConditionalGeneration",
        importance_rows=4,
        similarity_lower_bound=0.5,
        prompt=CHATML
        | {
            "video_start": "<|vision_start|>",
            "video_pad": "<|video_pad|>",
            "video_end": "<|vision_end|>",
            "image_start": "<|vision_start|>",
            "image_pad": "<|image_pad|>",
            "image_end": "<|vision_end|>",
        },
        pad_keys={"video_pad_id": "video_token_id", "image_pad_id": "image_token_id"},
        preprocessing=Preprocessing(),
        sampling=FrameSampling("qwen2_vl"),
        verified="transformers' Qwen2VLForConditionalGeneration at tiny sizes; the reference code's recordings",
    ),
)


def family_of(model_type: str) -> Family:
    """The family that declares a model_type.

    Raises:
        UnknownFamilyError: none does; the message lists the known ones.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = sorted(known for family in FAMILIES for known in family.model_types)
    raise UnknownFamilyError(f"model_type {model_type!r} is unknown; known are {', '.join(known)}")


def _validate(families: tuple[Family, ...]) -> None:
    """Refuse a table that cannot be right: a double name or model_type, a slot without a name, a tower not named."""
    claimed: dict[str, str] = {}
    for family in families:
        for model_type in family.model_types:
            if model_type in claimed:
                raise ValueError(f"model_type {model_type} is claimed by {claimed[model_type]} and {family.name}")
            claimed[model_type] = family.name
        missing = set(QWEN2_NAMES) - set(family.names)
        if missing:
            raise ValueError(f"family {family.name} names no key for {sorted(missing)}")
        if family.tower.count(":") != 1:
            raise ValueError(f"family {family.name}: tower {family.tower!r} is not module:function")
    if len({family.name for family in families}) != len(families):
        raise ValueError("two families have one name")


_validate(FAMILIES)
