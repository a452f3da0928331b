"""Tiny InternVL checkpoints with random weights: the authors' format with two kinds of LLM, and transformers' own."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framefusion.export.checkpoints.text.sentencepiece_tokenizer import PROBES
from tests.families.llava_checkpoints import randomize, write_json, write_tensors, write_tokenizer

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 32, 4, 4, 2, 48
TILE, PATCH, WIDTH = 56, 14, 24
MAX_TILES, NATIVE_FRAMES = 5, 6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENDS = ("<|im_start|>", "<|im_end|>")
CONTROLS = ("<|endoftext|>", *ENDS, "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<IMG_CONTEXT>\n{% elif part.type == 'video' %}<video>\n"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLM_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"  # the bare LLM's, to be left unread
LARGE_VIT = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}  # as InternViT-6B has it
SMALL_VIT = {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True}


def write_chat(folder: Path, variant: str, llm: str) -> None:
    """A checkpoint of the `internvl_chat` format; `llm` is "internlm2" or "qwen2"."""
    internlm2 = llm == "internlm2"
    ids = write_sentencepiece(folder) if internlm2 else write_tokenizer(folder, CONTROLS)
    if "vocabulary" in variant:
        write_vocabulary_files(folder)
    elif not internlm2:
        write_json(folder, tokenizer_config={"chat_template": LLM_TEMPLATE, "tokenizer_class": "Qwen2Tokenizer"})
    rows = max(ids.values()) + 1 + (7 if "wide" in variant else 0)
    config = text_config(rows, llm) | {"rms_norm_eps": 1e-5, "eos_token_id": 2}
    config["architectures"] = ["InternLM2ForCausalLM" if internlm2 else "Qwen2ForCausalLM"]
    del config["rope_parameters"]
    config |= {"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    vit = LARGE_VIT if "large" in variant else SMALL_VIT
    vision = vit | {
        "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": TILE, "patch_size": PATCH, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
    }  # fmt: skip
    model = {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "llm_config": config,
        "vision_config": vision, "force_image_size": TILE, "downsample_ratio": 0.5, "ps_version": "v2",
        "select_layer": -2 if "select" in variant else -1, "template": "internvl2_5", "dynamic_image_size": True,
        "min_dynamic_patch": 1, "max_dynamic_patch": MAX_TILES, "use_thumbnail": True, "pad2square": False,
        "tie_word_embeddings": False,
    }  # fmt: skip
    write_json(folder, config=model, generation_config={"eos_token_id": 2})
    shapes = vision_shapes(vit) | llm_shapes(internlm2, rows)
    write_tensors(folder, draw(shapes), dtype_of(variant), shards=3 if "sharded" in variant else 1)


def text_config(rows: int, model_type: str) -> dict[str, Any]:
    """The LLM's configuration."""
    return {
        "model_type": model_type, "vocab_size": rows, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "max_position_embeddings": 32768,
        "pad_token_id": 0, "tie_word_embeddings": False,
    } | ({"head_dim": HIDDEN // HEADS} if model_type == "qwen3" else {})  # fmt: skip


def dtype_of(variant: str) -> str:
    """The type that a variant's name says."""
    return next((name for name in ("bfloat16", "float16") if name in variant), "float32")


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random tensors of these shapes, as `randomize` draws them."""
    holder = torch.nn.ParameterDict(
        {name.replace(".", "/"): torch.nn.Parameter(torch.empty(shapes[name])) for name in shapes}
    )
    randomize(holder, seed=0)
    return {name.replace("/", "."): parameter.detach() for name, parameter in holder.items()}


def vision_shapes(vit: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' tower and projector."""
    prefix, places, joined = "vision_model.embeddings.", (TILE // PATCH) ** 2 + 1, 4 * WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}class_embedding": (1, 1, WIDTH), f"{prefix}position_embedding": (1, places, WIDTH),
        f"{prefix}patch_embedding.weight": (WIDTH, 3, PATCH, PATCH), f"{prefix}patch_embedding.bias": (WIDTH,),
        "mlp1.0.weight": (joined,), "mlp1.0.bias": (joined,), "mlp1.1.weight": (HIDDEN, joined),
        "mlp1.1.bias": (HIDDEN,), "mlp1.3.weight": (HIDDEN, HIDDEN), "mlp1.3.bias": (HIDDEN,),
    }  # fmt: skip
    for layer in range(3):
        block = {
            "attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.proj.weight": (WIDTH, WIDTH), "attn.proj.bias": (WIDTH,),
            "mlp.fc1.weight": (40, WIDTH), "mlp.fc1.bias": (40,), "mlp.fc2.weight": (WIDTH, 40),
            "mlp.fc2.bias": (WIDTH,), "norm1.weight": (WIDTH,), "norm2.weight": (WIDTH,), "ls1": (WIDTH,),
            "ls2": (WIDTH,),
        }  # fmt: skip
        if vit["norm_type"] == "layer_norm":
            block |= {"norm1.bias": (WIDTH,), "norm2.bias": (WIDTH,)}
        if vit["qkv_bias"]:
            block["attn.qkv.bias"] = (3 * WIDTH,)
        if vit["qk_normalization"]:
            block |= {"attn.q_norm.weight": (WIDTH,), "attn.k_norm.weight": (WIDTH,)}
        shapes |= {f"vision_model.encoder.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def llm_shapes(internlm2: bool, rows: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the LLM, InternLM2's with its packed attention."""
    kv, wide = HIDDEN // HEADS * KV_HEADS, (INTERMEDIATE, HIDDEN)
    names = ("tok_embeddings", "output") if internlm2 else ("embed_tokens", "lm_head")
    shapes: dict[str, tuple[int, ...]] = {
        f"language_model.model.{names[0]}.weight": (rows, HIDDEN), "language_model.model.norm.weight": (HIDDEN,),
        f"language_model.{names[1]}.weight": (rows, HIDDEN),
    }  # fmt: skip
    block: dict[str, tuple[int, ...]] = {
        "attention.wqkv.weight": (HIDDEN + 2 * kv, HIDDEN), "attention.wo.weight": (HIDDEN, HIDDEN),
        "feed_forward.w1.weight": wide, "feed_forward.w3.weight": wide, "feed_forward.w2.weight": wide[::-1],
        "attention_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,),
    }  # fmt: skip
    if not internlm2:
        block = {
            "self_attn.q_proj.weight": (HIDDEN, HIDDEN), "self_attn.q_proj.bias": (HIDDEN,),
            "self_attn.k_proj.weight": (kv, HIDDEN), "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, HIDDEN), "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (HIDDEN, HIDDEN), "mlp.gate_proj.weight": wide, "mlp.up_proj.weight": wide,
            "mlp.down_proj.weight": wide[::-1], "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,),
        }  # fmt: skip
    for layer in range(LAYERS):
        shapes |= {f"language_model.model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def native_config(text: dict[str, Any], vit: dict[str, Any], pad: int, **other: Any) -> Any:
    """transformers' configuration of the model."""
    from transformers import InternVLConfig

    return InternVLConfig(
        vision_config={
            "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": [TILE, TILE], "patch_size": [PATCH, PATCH], "norm_type": vit["norm_type"],
            "attention_bias": vit["qkv_bias"], "use_qk_norm": vit["qk_normalization"],
        },
        text_config=text, image_token_id=pad, **other,
    )  # fmt: skip


def write_native(folder: Path, variant: str) -> None:
    """A checkpoint as `save_pretrained` leaves it, with processor files of transformers 4 or 5."""
    from transformers import InternVLForConditionalGeneration

    ids = write_tokenizer(folder, CONTROLS)
    rows = max(ids.values()) + 1 + (7 if "wide" in variant else 0)
    text = text_config(rows, next((name for name in ("llama", "qwen3") if name in variant), "qwen2"))
    vit = LARGE_VIT if "large" in variant else SMALL_VIT
    layer = -2 if "select" in variant else -1
    config = native_config(
        text, vit, ids["<IMG_CONTEXT>"], tie_word_embeddings="tied" in variant, vision_feature_layer=layer
    )
    model: Any = randomize(InternVLForConditionalGeneration(config), seed=0).to(getattr(torch, dtype_of(variant)))
    model.save_pretrained(folder, **({"max_shard_size": "30KB"} if "sharded" in variant else {}))
    if "new-names" in variant:  # those of the model in memory
        (folder / "model.safetensors").unlink()
        write_tensors(folder, model.state_dict(), dtype_of(variant))
    still = {
        "size": {"height": TILE, "width": TILE}, "image_mean": MEAN, "image_std": STD, "crop_to_patches": False,
        "min_patches": 1, "max_patches": MAX_TILES, "resample": 3, "do_resize": True,
    }  # fmt: skip
    moving = {
        "size": {"height": TILE, "width": TILE},
        "image_mean": MEAN,
        "image_std": STD,
        "num_frames": NATIVE_FRAMES,
    }
    if "processor" in variant:
        write_json(folder, processor_config={"image_processor": still, "video_processor": moving})
    else:
        write_json(folder, preprocessor_config=still, video_preprocessor_config=moving)
    write_json(folder, generation_config={"eos_token_id": ids["<|endoftext|>"]})
    tokens = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    write_json(folder, tokenizer_config=tokens | {"video_token": "<video>"})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def train_sentencepiece(**options: Any) -> bytes:
    """A SentencePiece model trained with the options of InternLM2's kind, which `options` replaces."""
    from sentencepiece import SentencePieceTrainer

    defaults: dict[str, Any] = {
        "model_type": "bpe", "vocab_size": 900, "byte_fallback": True, "split_digits": True, "character_coverage": 0.98,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True, "hard_vocab_limit": False, "minloglevel": 2,
        "user_defined_symbols": [f"[UNUSED_TOKEN_{i}]" for i in range(4)],
    }  # fmt: skip
    texts = [
        *(text.replace("\0", "") for text in PROBES),
        SYSTEM,
        CHAT_TEMPLATE,
        "Frame1: Frame2: system user assistant",
    ]
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(texts * 4), model_writer=model, **(defaults | options))
    return model.getvalue()


def write_sentencepiece(folder: Path, **options: Any) -> dict[str, int]:
    """tokenizer.model with InternLM2's files around it: two unused pieces renamed, others added behind the last."""
    from sentencepiece import SentencePieceProcessor

    data = train_sentencepiece(**options)
    (folder / "tokenizer.model").write_bytes(data)
    pieces = SentencePieceProcessor(model_proto=data)
    ids = {token: pieces.piece_to_id(f"[UNUSED_TOKEN_{i}]") for i, token in enumerate(ENDS)}
    ids |= {
        token: pieces.get_piece_size() + i for i, token in enumerate(("<img>", "</img>", "<IMG_CONTEXT>", "<quad>"))
    }
    decoder = {str(index): {"content": token, "special": True, "normalized": False} for token, index in ids.items()}
    write_json(
        folder,
        added_tokens=ids,
        tokenizer_config={
            "tokenizer_class": "InternLM2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
            "pad_token": "</s>", "added_tokens_decoder": decoder, "chat_template": "{{ bos_token }}" + LLM_TEMPLATE,
        },
    )  # fmt: skip
    return ids | {"<s>": 1, "</s>": 2, "<|endoftext|>": 2}


def write_vocabulary_files(folder: Path) -> None:
    """tokenizer.json taken apart into the files that Qwen2's older repositories have."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"])
    (folder / "merges.txt").write_text("\n".join(pairs))
    decoder = {str(token.pop("id")): token for token in tokenizer["added_tokens"]}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder, "pad_token": "<|endoftext|>"}
    write_json(folder, vocab=tokenizer["model"]["vocab"], tokenizer_config=config)
