"""Write a checkpoint folder as a Qwen2-VL repository has it, replacing files one by one and each atomically."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from tools.tiny.clips import SIDE
from tools.tiny.model import MEAN, MERGE, PATCH, STD, TEMPORAL

PREPROCESSOR: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "image_mean": list(MEAN),
    "image_std": list(STD),
    "min_pixels": SIDE * SIDE,
    "max_pixels": SIDE * SIDE,
    "size": {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
    "patch_size": PATCH,
    "temporal_patch_size": TEMPORAL,
    "merge_size": MERGE,
}
IMAGE_PREPROCESSOR = {**PREPROCESSOR, "image_processor_type": "Qwen2VLImageProcessor"}
VIDEO_PREPROCESSOR = {
    **PREPROCESSOR,
    "video_processor_type": "Qwen2VLVideoProcessor",
    "do_sample_frames": True,
    "fps": 2,
    "min_frames": 4,
    "max_frames": 32,
}


def save_checkpoint(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save weights (bfloat16), configuration, tokenizer and pre-processing."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        aside = Path(scratch)
        _rounded_copy(model).save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        end = tokenizer.eos_token_id
        pad = tokenizer.pad_token_id
        generation = {
            "bos_token_id": pad,
            "pad_token_id": pad,
            "eos_token_id": [end, pad],
            "do_sample": False,
            "repetition_penalty": 1.0,
        }
        _write(aside / "generation_config.json", generation)
        _write(aside / "preprocessor_config.json", IMAGE_PREPROCESSOR)
        _write(aside / "video_preprocessor_config.json", VIDEO_PREPROCESSOR)
        for file in aside.iterdir():
            file.chmod(0o644)
            os.replace(file, folder / file.name)


def _rounded_copy(model: Any) -> Any:
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(torch.bfloat16)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
