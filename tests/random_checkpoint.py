"""Checkpoints with random weights, as `save_pretrained` leaves them, made in a moment at any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from framefusion.export.families.family import CHATML

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
PADS = ("<|image_pad|>", "<|video_pad|>")
QUESTIONS = ("What happens in this video?", "Say what you see, in one word.")
CORPUS = (*QUESTIONS, CHATML.default_system, "system\nuser\nassistant\n") * 3


def write_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-level BPE with Qwen's special tokens; returns their ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIALS, *PADS)])
    backend.save(str(folder / "tokenizer.json"))
    vocabulary = backend.get_vocab()
    return {token: vocabulary[token] for token in (*SPECIALS, *PADS)}


def random_checkpoint(
    folder: Path,
    *,
    layers: int = 4,
    hidden: int = 32,
    intermediate: int = 64,
    heads: int = 2,
    vision: tuple[int, int, int] = (1, 32, 2),  # depth, width, heads
    pixels: int = 56 * 56,
    dtype: str = "float32",
    tied: bool = True,
    seed: int = 0,
    **saving: Any,
) -> Path:
    """A Qwen2-VL of this size. `saving` goes to save_pretrained."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder)
    head_dim = hidden // heads
    section = [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6]
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 320, "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": max(heads // 2, 1),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section},
            "max_position_embeddings": 8192, "tie_word_embeddings": tied,
            "eos_token_id": ids["<|im_end|>"], "bos_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": vision[0], "embed_dim": vision[1], "num_heads": vision[2], "mlp_ratio": 2, "hidden_size": hidden
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **saving)
    processor = {"min_pixels": pixels, "max_pixels": pixels, "fps": 2, "min_frames": 4, "max_frames": 32}
    for name, content in (
        ("video_preprocessor_config.json", processor),
        ("preprocessor_config.json", processor),
        ("generation_config.json", {"eos_token_id": ids["<|im_end|>"], "do_sample": False}),
    ):
        (folder / name).write_text(json.dumps(content))
    return folder
