"""Qwen2.5-VL against Qwen2_5_VLForConditionalGeneration and its own image processor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.families.qwen2_vl import Qwen2VLCase
from tests.random_checkpoint import write_tokenizer

HIDDEN = 64
TEXT: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": HIDDEN,
}  # fmt: skip


class Qwen25VLCase(Qwen2VLCase):
    """`save_pretrained` writes the names of the hub's files, with a nested configuration."""

    family = "qwen2_5_vl"
    variants = ("untied", "tied", "flat-bfloat16-sharded", "new-names-float16", "one-processor-file")
    model = "Qwen2_5_VLForConditionalGeneration"
    pixel_limit = 84 * 140  # 4 x 5 merge blocks: windows of 2 x 2 do not divide it

    def write(self, folder: Path, variant: str) -> None:
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        ids, tied = write_tokenizer(folder), variant == "tied"
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        config = Qwen2_5_VLConfig(
            text_config=TEXT | {"rope_parameters": rope, "tie_word_embeddings": tied} | end_tokens(ids),
            vision_config=VISION
            | {"depth": 4, "window_size": 56, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2},
            tie_word_embeddings=tied,
            **visual_ids(ids),
        )
        torch.manual_seed(0)
        save_random(Qwen2_5_VLForConditionalGeneration(config), folder, variant)
        size = {"min_pixels": self.pixel_limit, "max_pixels": self.pixel_limit}
        write_processors(folder, size | {"fps": 2, "min_frames": 4, "max_frames": 32}, size, variant)
        if "flat" in variant:
            flatten_config(folder, rope)


def visual_ids(ids: Mapping[str, int]) -> dict[str, Any]:
    """The special tokens as config.json names them."""
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def end_tokens(ids: Mapping[str, int]) -> dict[str, int]:
    return {"eos_token_id": ids["<|im_end|>"], "bos_token_id": ids["<|endoftext|>"]}


def save_random(model: Any, folder: Path, variant: str) -> None:
    """Give a model random weights, norms and biases too, and save it as a variant says."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=scale)
    dtype = next((name for name in ("bfloat16", "float16") if name in variant), "float32")
    sharded = {"max_shard_size": "200KB"} if "sharded" in variant else {}
    names = {"save_original_format": False} if "new-names" in variant else {}
    model.to(getattr(torch, dtype)).save_pretrained(folder, **sharded, **names)


def write_processors(folder: Path, video: Mapping[str, Any], image: Mapping[str, Any], variant: str) -> None:
    """The processors' files, and generation_config.json."""
    files: dict[str, Mapping[str, Any]] = {"video_preprocessor_config.json": video, "preprocessor_config.json": image}
    if variant == "one-processor-file":
        files = {"processor_config.json": {"video_processor": video, "image_processor": image}}
    ids = json.loads((folder / "config.json").read_text())["text_config"]
    files["generation_config.json"] = {"eos_token_id": ids["eos_token_id"], "do_sample": False}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def flatten_config(folder: Path, rope: Mapping[str, Any]) -> None:
    """config.json as published: the LLM's part at the top, its rope in rope_theta and rope_scaling."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    for name in ("model_type", "rope_parameters"):
        text.pop(name, None)
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    path.write_text(json.dumps(text | config | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}))
