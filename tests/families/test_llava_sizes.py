"""The released sizes of the LLaVA families, planned from headers alone: files with holes where the weights would be.

Configurations as design notes and conversion scripts quote them; that of LLaVA-NeXT-Video leaves out what its classes
say by default, as transformers wrote it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from tests.families import llava_checkpoints as tiny
from tests.families.llava_hf import CHATML, VICUNA

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def llm(prefix: str, head: str, hidden: int, layers: int, kv: int, mlp: int, vocab: int, bias: bool) -> Shapes:
    yield f"{prefix}embed_tokens.weight", (vocab, hidden)
    yield f"{prefix}norm.weight", (hidden,)
    yield head, (vocab, hidden)
    for i in range(layers):
        at = f"{prefix}layers.{i}."
        for name, width in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{at}self_attn.{name}_proj.weight", (width, hidden)
            if bias:
                yield f"{at}self_attn.{name}_proj.bias", (width,)
        yield f"{at}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{at}mlp.gate_proj.weight", (mlp, hidden)
        yield f"{at}mlp.up_proj.weight", (mlp, hidden)
        yield f"{at}mlp.down_proj.weight", (hidden, mlp)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{norm}.weight", (hidden,)


def linear(name: str, out: int, into: int) -> Shapes:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def vit(prefix: str, width: int, layers: int, mlp: int, positions: int, clip: bool) -> Shapes:
    yield f"{prefix}embeddings.patch_embedding.weight", (width, 3, 14, 14)
    yield f"{prefix}embeddings.position_embedding.weight", (positions, width)
    norms = [f"{prefix}post_layernorm"]
    if clip:
        yield f"{prefix}embeddings.class_embedding", (width,)
        norms.append(f"{prefix}pre_layrnorm")
    else:
        yield f"{prefix}embeddings.patch_embedding.bias", (width,)
    for i in range(layers):
        at = f"{prefix}encoder.layers.{i}."
        norms += [f"{at}layer_norm1", f"{at}layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{at}self_attn.{name}", width, width)
        yield from linear(f"{at}mlp.fc1", mlp, width)
        yield from linear(f"{at}mlp.fc2", width, mlp)
    for norm in norms:
        yield f"{norm}.weight", (width,)
        yield f"{norm}.bias", (width,)


def projector(names: tuple[str, str], vision: int, hidden: int) -> Shapes:
    yield from linear(names[0], hidden, vision)
    yield from linear(names[1], hidden, hidden)


def write_holes(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of the right size that takes no room on the disk."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def write_video_7b(folder: Path) -> None:
    ids = tiny.write_tokenizer(folder, tiny.CONTROLS[:3])
    inner = "model.vision_tower.vision_tower.vision_model."
    shapes = dict(llm("model.", "lm_head.weight", 3584, 28, 512, 18944, 152064, bias=True))
    shapes |= dict(vit(inner, 1152, 26, 4304, 729, clip=False))
    shapes |= dict(projector(("model.mm_projector.0", "model.mm_projector.2"), 1152, 3584))
    write_holes(folder, shapes | {"model.image_newline": (3584,)})
    config = {
        "architectures": ["LlavaQwenForCausalLM"], "model_type": "llava", "hidden_size": 3584, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None, "tie_word_embeddings": False,
        "max_position_embeddings": 32768, "sliding_window": 131072, "use_sliding_window": False,
        "eos_token_id": ids["<|im_end|>"], "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad", "mm_newline_position": "grid", "mm_spatial_pool_mode": "bilinear",
        "image_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": "(1x1),...,(6x6)", "force_sample": True,
        "add_time_instruction": True, "mm_resampler_type": None, "add_faster_video": False,
    }  # fmt: skip
    tiny.write_json(folder, config=config)


def write_onevision_7b(folder: Path) -> None:
    ids = tiny.write_tokenizer(folder)
    lm = "language_model."
    shapes = dict(llm(f"{lm}model.", f"{lm}lm_head.weight", 3584, 28, 512, 18944, 152128, bias=True))
    shapes |= dict(vit("vision_tower.vision_model.", 1152, 26, 4304, 729, clip=False))
    shapes |= dict(projector(("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"), 1152, 3584))
    write_holes(folder, shapes | {"image_newline": (3584,)})
    text = {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rope_theta": 1e6, "vocab_size": 152128,
        "sliding_window": 131072,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision",
        "text_config": text, "vision_config": vision, "image_token_index": ids["<image>"],
        "video_token_index": ids["<video>"], "vision_aspect_ratio": "anyres_max_9", "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "tie_word_embeddings": False,
    }  # fmt: skip
    size = {"size": {"height": 384, "width": 384}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    tiny.write_json(
        folder, config=config, preprocessor_config=size, chat_template={"chat_template": CHATML}, tokenizer_config={}
    )


def write_next_7b(folder: Path) -> None:
    ids = tiny.write_tokenizer(folder, begin="<|endoftext|>", words="first")
    lm = "language_model."
    shapes = dict(llm(f"{lm}model.", f"{lm}lm_head.weight", 4096, 32, 4096, 11008, 32064, bias=False))
    shapes |= dict(vit("vision_tower.vision_model.", 1024, 24, 4096, 577, clip=True))
    shapes |= dict(projector(("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"), 1024, 4096))
    write_holes(folder, shapes | {"image_newline": (4096,)})
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
    }  # fmt: skip
    config = {
        "architectures": ["LlavaNextVideoForConditionalGeneration"], "model_type": "llava_next_video",
        "text_config": text | {"factor": 2.0, "type": "linear"}, "vision_config": vision,
        "image_token_index": ids["<image>"], "video_token_index": ids["<video>"],
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    }  # fmt: skip
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    told = size | {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    tiny.write_json(
        folder, config=config, preprocessor_config=told, chat_template={"chat_template": VICUNA}, tokenizer_config={}
    )


@pytest.mark.parametrize(
    ("write", "billions", "room", "video"),
    [
        (write_video_7b, 8.03, 64 * (210 + 9) + 64 + 512, 64 * (210 + 9) + 64),
        (write_onevision_7b, 8.03, 8192, 32 * 196 + 1),
        (write_next_7b, 7.05, 4096, 8 * 144),  # 7.06 with the tower's last layer, which is not run
    ],
)
def test_released_sizes_are_planned(write: Any, billions: float, room: int, video: int, tmp_path: Path) -> None:
    write(tmp_path)
    plan = BuildPlan(Checkpoint(tmp_path), BuildOptions())
    assert plan.limits.max_input_len == room
    assert plan.preprocessing.video_tokens(plan.sampling.max_frames) == video
    weights = sum(graph.weight_bytes for graph in plan.graphs)
    table = plan.config.vocab_size * plan.config.hidden_size
    assert round((weights / 4 + table) / 1e9, 2) == billions
    assert plan.tower.module.config.vit.num_heads == 16  # type: ignore[union-attr]
