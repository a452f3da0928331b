"""InternVL by transformers' own class, in both formats: what the torch graphs of a build are compared with.

transformers reads its own format. Of the authors' `internvl_chat` it has the model and not the names: they are
translated here, and rows of q, k and v that are stored as one tensor are taken apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.families.decoders import unpacking
from framefusion.export.families.reading.configs import required, text_config
from framefusion.export.families.reference.transformers_call import TransformersCall

CLASS = "InternVLForConditionalGeneration"
RENAMED: Mapping[str, str] = MappingProxyType(
    {
        r"^language_model\.model\.": "model.language_model.",
        r"^language_model\.(?:lm_head|output)\.": "lm_head.",
        r"^vision_model\.embeddings\.class_embedding": "model.vision_tower.embeddings.cls_token",
        r"^vision_model\.embeddings\.position_embedding": "model.vision_tower.embeddings.position_embeddings",
        r"^vision_model\.embeddings\.patch_embedding\.": "model.vision_tower.embeddings.patch_embeddings.projection.",
        r"^vision_model\.encoder\.layers\.": "model.vision_tower.encoder.layer.",
        r"\.norm1\.": ".layernorm_before.",
        r"\.norm2\.": ".layernorm_after.",
        r"\.attn\.proj\.": ".attention.projection_layer.",
        r"\.attn\.q_norm\.": ".attention.q_norm.",
        r"\.attn\.k_norm\.": ".attention.k_norm.",
        r"\.ls1$": ".lambda_1",
        r"\.ls2$": ".lambda_2",
        r"^mlp1\.0\.": "model.multi_modal_projector.layer_norm.",
        r"^mlp1\.1\.": "model.multi_modal_projector.linear_1.",
        r"^mlp1\.3\.": "model.multi_modal_projector.linear_2.",
    }
)
RENAMED_INTERNLM2: Mapping[str, str] = MappingProxyType(
    dict(RENAMED)
    | {
        r"tok_embeddings": "embed_tokens",
        r"\.attention_norm\.": ".input_layernorm.",
        r"\.ffn_norm\.": ".post_attention_layernorm.",
        r"\.attention\.wo\.": ".self_attn.o_proj.",
        r"\.feed_forward\.w1\.": ".mlp.gate_proj.",
        r"\.feed_forward\.w3\.": ".mlp.up_proj.",
        r"\.feed_forward\.w2\.": ".mlp.down_proj.",
    }
)
VISION_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "attention_bias": "qkv_bias",
        "use_qk_norm": "qk_normalization",
        **{
            name: name
            for name in (
                "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "norm_type",
                "layer_norm_eps", "hidden_act",
            )
        },
    }
)  # fmt: skip
"""Key of transformers' configuration of the tower -> the authors' key."""


def native_logits(call: TransformersCall) -> NDArray[np.float32]:
    """Logits [keep, V] of the last tokens of a checkpoint in transformers' format."""
    return _logits(call, call.model(CLASS))


def chat_logits(call: TransformersCall) -> NDArray[np.float32]:
    """Logits [keep, V] of the last tokens of a checkpoint in the authors' format, with an LLM that transformers has."""
    text = dict(text_config(call.checkpoint))
    model = call.model(CLASS, config=_config(call, text), renamed=RENAMED, supplied=_tower_rows(call.checkpoint))
    return _logits(call, model)


def internlm2_logits(call: TransformersCall) -> NDArray[np.float32]:
    """The same with InternLM2, which transformers computes as Llama."""
    text = dict(text_config(call.checkpoint))
    text |= {"model_type": "llama", "attention_bias": bool(text.get("bias", False))}
    tower = _tower_rows(call.checkpoint)
    llm = _internlm2_rows(call.checkpoint)

    def supplied(name: str) -> Tensor | None:
        rows = tower(name)
        return llm(name) if rows is None else rows

    return _logits(call, call.model(CLASS, config=_config(call, text), renamed=RENAMED_INTERNLM2, supplied=supplied))


def _config(call: TransformersCall, text: Mapping[str, Any]) -> Any:
    """transformers' configuration of the model; that of the LLM is read by its own class."""
    from transformers import InternVLConfig

    config = call.checkpoint.config
    vision_config = required(config, "vision_config", call.checkpoint)
    vision = {ours: vision_config[theirs] for ours, theirs in VISION_KEYS.items() if theirs in vision_config}
    size = config.get("force_image_size") or vision_config["image_size"]
    patch = vision_config["patch_size"]
    places = call.prompt.row_places
    return InternVLConfig(
        vision_config=vision | {"image_size": [size, size], "patch_size": [patch, patch]},
        text_config={key: value for key, value in text.items() if key != "architectures"},
        image_token_id=int(call.prompt.token_ids[places[0]]) if places.size else -1,
        downsample_ratio=config.get("downsample_ratio", 0.5),
        vision_feature_layer=config.get("select_layer", -1),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
    )


def _tower_rows(checkpoint: Checkpoint) -> Callable[[str], Tensor | None]:
    """Parameters of the tower's q, k and v, which are stored one above the other."""

    def supply(name: str) -> Tensor | None:
        found = re.fullmatch(r"model\.vision_tower\.encoder\.layer\.(\d+)\.attention\.([qkv])_proj\.(\w+)", name)
        if found is None:
            return None
        packed = checkpoint.tensor(f"vision_model.encoder.layers.{found[1]}.attn.qkv.{found[3]}")
        return packed.chunk(3)["qkv".index(found[2])]

    return supply


def _internlm2_rows(checkpoint: Checkpoint) -> Callable[[str], Tensor | None]:
    """Parameters of InternLM2's q, k and v, which are stored by key-value head."""
    parts = unpacking(checkpoint)

    def supply(name: str) -> Tensor | None:
        found = re.fullmatch(r"model\.language_model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", name)
        if found is None:
            return None
        rows = parts[found[2]](checkpoint.tensor(f"language_model.model.layers.{found[1]}.attention.wqkv.{found[3]}"))
        return rows.T.contiguous() if rows.ndim == 2 else rows  # [out, in]

    return supply


def _logits(call: TransformersCall, model: Any) -> NDArray[np.float32]:
    patch = model.config.vision_config.patch_size[0]
    pixels = [_pixels(tiles.values, tiles.grid.height, patch) for visual in call.visuals for tiles in visual.tiles]
    with torch.inference_mode():
        result = model(
            input_ids=torch.from_numpy(call.prompt.token_ids)[None],
            pixel_values=torch.cat(pixels) if pixels else None,
            logits_to_keep=call.keep,
        )
    logits: NDArray[np.float32] = result.logits[0].numpy()
    return logits


def _pixels(values: NDArray[np.float32], rows: int, patch: int) -> Tensor:
    """Patches [N, P, 3 * p * p] put together to pictures [N, 3, H, W]."""
    pictures = torch.from_numpy(values).reshape(len(values), rows, -1, 3, patch, patch)
    return pictures.permute(0, 3, 1, 4, 2, 5).reshape(len(values), 3, rows * patch, -1)
