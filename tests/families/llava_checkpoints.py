"""Tiny LLaVA checkpoints with random weights, in the layouts that LLaVA's files on the hub have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.llava_pictures import CLIP_SIDE as CLIP_SIDE
from tests.llava_pictures import PATCH as PATCH
from tests.llava_pictures import SIGLIP_SIDE as SIGLIP_SIDE

HIDDEN, VISION = 32, 24
CORPUS = ("What happens in this video?", "Say what you see.", "You are a helpful assistant. USER: ASSISTANT:") * 3
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
ROWS = 320  # of the embedding table: more than there are tokens, as in the released files
SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
"""The released tower's geometry, but for its widths."""
MEAN, STD = [0.5, 0.4, 0.5], [0.5, 0.5, 0.3]


def vision_config(kind: str) -> dict[str, Any]:
    """A tower of three layers, siglip or clip."""
    facts = {"hidden_size": VISION, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    if kind == "clip":
        return facts | {
            "model_type": "clip_vision_model", "image_size": CLIP_SIDE, "patch_size": PATCH, "projection_dim": VISION,
        }  # fmt: skip
    return facts | {
        "model_type": "siglip_vision_model", "image_size": SIGLIP_SIDE, "patch_size": PATCH, "vision_use_head": False,
    }  # fmt: skip


def text_config(model_type: str, ids: Mapping[str, int], tied: bool = False) -> dict[str, Any]:
    """An LLM of four layers with grouped heads."""
    return {
        "model_type": model_type, "vocab_size": ROWS, "hidden_size": HIDDEN, "intermediate_size": 48,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "max_position_embeddings": 8192,
        "eos_token_id": ids["<|im_end|>"], "bos_token_id": ids["<|endoftext|>"], "pad_token_id": 0,
        "tie_word_embeddings": tied,
    }  # fmt: skip


def tilings(side: int) -> list[list[int]]:
    """Heights and widths of one to three tiles."""
    return [[tall * side, wide * side] for tall in (1, 2, 3) for wide in (1, 2, 3)]


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Weights that keep activations near one; biases and norms too, so that none is lost unseen."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.normal_(1, 0.1)
            else:
                parameter.normal_(std=0.1)
    return model.eval()


def write_tokenizer(
    folder: Path, controls: tuple[str, ...] = CONTROLS, begin: str = "", words: str = ""
) -> dict[str, int]:
    """A tokenizer, `begin` before every text; returns the ids of its control tokens.

    `words`: "" is byte-level BPE; others mark words with a lower bar as Llama's do, and say which: "first" of a text,
    "always" the first of each piece, or "legacy", the same by another component.
    """
    from tokenizers import AddedToken, processors

    backend = marking(words) if words else byte_level()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    if begin:
        told = [(begin, backend.token_to_id(begin))]
        backend.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=told)
    backend.save(str(folder / "tokenizer.json"))
    return {token: backend.token_to_id(token) for token in controls}


def byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def marking(words: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = sorted({letter for text in CORPUS for letter in text.replace(" ", "▁")} | {"▁"})
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    if words == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=words, split=False)
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(undo)
    return backend


def write_json(folder: Path, **files: Any) -> None:
    """name=content -> name.json."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], dtype: str = "float32", shards: int = 1) -> None:
    """One safetensors file, or several with their index."""
    from safetensors.torch import save_file

    stored = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in tensors.items()}
    names = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(stored))}
    if shards == 1:
        names = dict.fromkeys(stored, "model.safetensors")
    else:
        write_json(folder, **{"model.safetensors.index": {"metadata": {}, "weight_map": names}})
    for file in sorted(set(names.values())):
        held = {name: tensor for name, tensor in stored.items() if names[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})


def write_original(
    folder: Path,
    *,
    dtype: str = "float32",
    shards: int = 1,
    tied: bool = False,
    spare: bool = False,
    vision: Mapping[str, Any] | None = None,
    **config: Any,
) -> None:
    """A LlavaQwenForCausalLM; `spare` keeps the tower's last layer, which is not run; `config` replaces values."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    ids, vision = write_tokenizer(folder, CONTROLS[:3]), vision or vision_config("siglip")
    text = text_config("qwen2", ids, tied)
    llm = randomize(Qwen2ForCausalLM(Qwen2Config.from_dict(text)), 1).state_dict()
    tower = randomize(SiglipVisionModel(SiglipVisionConfig.from_dict(dict(vision))), 2).state_dict()
    projector = nn.Sequential(nn.Linear(vision["hidden_size"], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))
    tensors = {name: tensor for name, tensor in llm.items() if not (tied and name == "lm_head.weight")}
    for name, tensor in tower.items():
        if spare or f"layers.{vision['num_hidden_layers'] - 1}." not in name:
            tensors["model.vision_tower.vision_tower.vision_model." + name.removeprefix("vision_model.")] = tensor
    for name, tensor in randomize(projector, 3).state_dict().items():
        tensors[f"model.mm_projector.{name}"] = tensor
    tensors["model.image_newline"] = torch.randn(HIDDEN) * 0.5
    write_tensors(folder, tensors, dtype, shards)

    theta = text.pop("rope_parameters")["rope_theta"]
    told = text | {
        "architectures": ["LlavaQwenForCausalLM"], "model_type": "llava", "rope_theta": theta, "rope_scaling": None,
        "mm_vision_tower": "google/tower", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_patch_merge_type": "spatial_unpad", "mm_resampler_type": None,
        "mm_newline_position": "grid", "mm_spatial_pool_mode": "bilinear", "image_aspect_ratio": "anyres_max_2",
        "image_grid_pinpoints": "(1x1),...,(3x3)", "add_time_instruction": True, "force_sample": True,
    } | config  # fmt: skip
    write_json(folder, config=told, generation_config={"eos_token_id": ids["<|im_end|>"], "do_sample": False})
    described = folder / "google/tower"
    described.mkdir(parents=True)
    write_json(described, config={"model_type": "siglip", "vision_config": vision})


def write_hf(
    folder: Path,
    kind: str,
    template: str,
    *,
    text: str = "qwen2",
    names: str = "",
    dtype: str = "float32",
    shards: int = 1,
    tied: bool = False,
    begin: str = "",
    words: str = "",
    **config: Any,
) -> None:
    """A LlavaOnevision or LlavaNextVideo (`kind`) ForConditionalGeneration.

    `names`: "" as transformers 5 saves them, "infix" as the hub has them, "model" as the module has them. `begin` and
    `words` as in `write_tokenizer`.
    """
    import transformers

    ids, vision = (
        write_tokenizer(folder, begin=begin, words=words),
        vision_config("siglip" if kind == "LlavaOnevision" else "clip"),
    )
    side = vision["image_size"]
    told = getattr(transformers, f"{kind}Config")(
        text_config=text_config(text, ids, tied), vision_config=vision, image_token_index=ids["<image>"],
        video_token_index=ids["<video>"], image_grid_pinpoints=tilings(side), tie_word_embeddings=tied, **config,
    )  # fmt: skip
    told.save_pretrained(folder)
    model = randomize(getattr(transformers, f"{kind}ForConditionalGeneration")(told), 1)
    config_json = json.loads((folder / "config.json").read_text())
    config_json["architectures"] = [f"{kind}ForConditionalGeneration"]
    write_json(folder, config=config_json)
    state = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    write_tensors(folder, {renamed(name, names): tensor for name, tensor in state.items()}, dtype, shards)

    size = {"height": side, "width": side} if kind == "LlavaOnevision" else {"shortest_edge": side}
    processor = {"size": size, "image_mean": MEAN, "image_std": STD, "resample": 3, "rescale_factor": 1 / 255}
    if kind != "LlavaOnevision":
        processor["crop_size"] = {"height": side, "width": side}
    write_json(
        folder,
        preprocessor_config=processor | {"image_grid_pinpoints": tilings(side)},
        generation_config={"eos_token_id": ids["<|im_end|>"], "do_sample": False},
        chat_template={"chat_template": template},
        tokenizer_config={"bos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"},
    )


def renamed(name: str, names: str) -> str:
    """A module's name of a tensor as files have it."""
    if names == "model":
        return name
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
    return name.replace("vision_tower.", "vision_tower.vision_model.") if names == "infix" else name
