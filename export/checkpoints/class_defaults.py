"""What the configuration classes of transformers fill in where a config.json says nothing, by `model_type`.

`save_pretrained` leaves out of a nested configuration what equals the default of its class, so a key that is absent is
no key that is unknown. The numbers are those of transformers 5 (tests compare them with the classes); InternLM2 has no
class there, its numbers are those of the configuration file that its checkpoints bring. Knows no checkpoint. No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

_SILU = {"hidden_act": "silu"}
_LLAMA: dict[str, Any] = _SILU | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "eos_token_id": 2,
}
_MISTRAL: dict[str, Any] = {key: value for key, value in _LLAMA.items() if not key.endswith("_bias")} | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN2: dict[str, Any] = _SILU | {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
_QWEN2_VL_TEXT: dict[str, Any] = _SILU | {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "max_window_layers": 80,
    "eos_token_id": 151645,
}
_QWEN3_VL_TEXT: dict[str, Any] = _SILU | {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "attention_bias": False,
}
_INTERNLM2: dict[str, Any] = {key: value for key, value in _LLAMA.items() if not key.endswith("_bias")} | {
    "vocab_size": 103168
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 32,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN2_VL_VISION = _QWEN_VISION | {"embed_dim": 1280, "hidden_size": 3584, "hidden_act": "quick_gelu", "mlp_ratio": 4}
_QWEN2_5_VL_VISION: dict[str, Any] = _QWEN_VISION | {
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "out_hidden_size": 3584,
    "tokens_per_second": 4,
    "window_size": 112,
    "fullatt_block_indexes": (7, 15, 23, 31),
}
_QWEN3_VL_VISION: dict[str, Any] = _QWEN_VISION | {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "patch_size": 16,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": (8, 16, 24),
}
_CLIP: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIGLIP = _CLIP | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_INTERNVL_VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "attention_bias": False,
    "use_qk_norm": False,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "image_size": 448,
    "patch_size": 14,
}

CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _MISTRAL,
        "qwen2": _QWEN2,
        "qwen3": _QWEN2 | {"head_dim": 128, "attention_bias": False},
        "internlm2": _INTERNLM2,
        "qwen2_vl_text": _QWEN2_VL_TEXT,
        "qwen2_5_vl_text": _QWEN2_VL_TEXT,
        "qwen3_vl_text": _QWEN3_VL_TEXT,
        "qwen2_vl_vision": _QWEN2_VL_VISION,
        "qwen2_5_vl_vision": _QWEN2_5_VL_VISION,
        "qwen3_vl_vision": _QWEN3_VL_VISION,
        "clip_vision_model": _CLIP,
        "siglip_vision_model": _SIGLIP,
        "internvl_vision": _INTERNVL_VISION,
    }
)
"""model_type -> key -> the value of an absent key."""

_OF_ARCHITECTURE: Mapping[str, str] = MappingProxyType(
    {
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
        "LlamaForCausalLM": "llama",
        "MistralForCausalLM": "mistral",
        "InternLM2ForCausalLM": "internlm2",
    }
)
"""Architecture of an LLM -> its model_type: InternVL's authors look at the first one only."""


def completed(nested: Mapping[str, Any], kind: str = "", replaced: Collection[str] = frozenset()) -> Mapping[str, Any]:
    """A configuration with what its class fills in, and with its `model_type`.

    Args:
        nested: what the file says.
        kind: the model_type where the file names none, or one that is replaced.
        replaced: model_types of whole models, which old releases wrote into their parts.
    """
    stated = nested.get("model_type")
    if stated is None and not kind:
        architectures = nested.get("architectures")
        names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
        kind = next((_OF_ARCHITECTURE[name] for name in names if name in _OF_ARCHITECTURE), "")
    model_type = kind if kind and (stated is None or stated in replaced) else stated
    filled = {**CLASS_DEFAULTS.get(str(model_type), {}), **nested}
    return filled if model_type is None else filled | {"model_type": model_type}
