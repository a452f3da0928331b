"""Weights that are not plain safetensors, named as what they are, with what turns them into a checkpoint.

Reads names of files and config.json, no tensor. Knows no family.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.files import present, read_json_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTED = re.compile(
    r"\.(lora_|base_layer\.|modules_to_save\.|original_module\.|ia3_|vera_|oft_|adapter)|^base_model\."
)
"""Tensors that peft writes for a model whose adapter was not merged."""
SHOWN = 4  # names in a message
_SAVE = "load it with transformers and save_pretrained() it, which writes safetensors"


class _Format(NamedTuple):
    """A kind of weights: how its files are called, what it is, what helps."""

    patterns: tuple[str, ...]
    name: str
    remedy: str


FORMATS: tuple[_Format, ...] = (
    _Format(("manifest.json",), "a bundle", "give the checkpoint that it was built from"),
    _Format(("*.gguf",), "GGUF weights", "give the checkpoint that they were converted from"),
    _Format(
        ("zero_to_fp32.py", "global_step*", "zero_pp_rank_*"),
        "a checkpoint of DeepSpeed ZeRO",
        "python zero_to_fp32.py . OUTPUT --safe_serialization puts it together; config.json and tokenizer belong to it",
    ),
    _Format(
        ("*.distcp", "pytorch_model_fsdp*"),
        "a sharded checkpoint of FSDP",
        "accelerate merge-weights FOLDER OUTPUT puts it together; config.json and tokenizer belong to it",
    ),
    _Format(
        ("model.*.safetensors", "model.safetensors.index.*.json", "model.*.safetensors.index.json"),
        "a variant of the weights only",
        f"{_SAVE} (from_pretrained(..., variant=...))",
    ),
    _Format(("model-*-of-*.safetensors",), f"shards without their {INDEX}", f"download {INDEX} too"),
    _Format(
        ("*.safetensors",),
        "safetensors under another name",
        f"{_SAVE}, or call the file {SINGLE} if it is the whole model",
    ),
    _Format(("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt"), "PyTorch pickles", _SAVE),
    _Format(("tf_model.h5", "*.msgpack"), "TensorFlow or Flax weights", _SAVE),
    _Format(("*.onnx",), "ONNX graphs", "give the checkpoint that they were exported from"),
)


def no_weights(folder: Path, root: Path, missing: str = "") -> CheckpointError:
    """The error for a folder without the files that are read.

    Args:
        folder: of the checkpoint or of a part of it.
        root: the checkpoint.
        missing: the file that was looked for and is not there; "" for the weights.
    """
    if present(folder / ADAPTER):
        base = read_json_file(folder / ADAPTER, root).get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and base.isprintable() else ""
        return CheckpointError(
            f"{folder} is a LoRA adapter{of} and no whole model: merge it with peft's merge_and_unload(), "
            "save_pretrained() the result with its tokenizer, and give that folder"
        )
    found = _known_format(folder)
    if missing and (found is None or found[0].name.startswith(("safetensors", "shards"))):
        return CheckpointError(f"{folder / missing} is missing: the checkpoint is incomplete, download it again")
    problem = f"{folder} holds neither {SINGLE} nor {INDEX}: only safetensors are read"
    if found is None:
        return CheckpointError(f"{problem}, and there are no weights of another kind: download the checkpoint again")
    kind, name = found
    return CheckpointError(f"{problem}. It holds {kind.name} ({name}): {kind.remedy}")


def _known_format(folder: Path) -> tuple[_Format, str] | None:
    """The first of FORMATS that a file of the folder has, and that file's name."""
    for kind in FORMATS:
        for pattern in kind.patterns:
            names = sorted(path.name for path in folder.glob(pattern))
            if names:
                return kind, names[0]
    return None


def check_no_adapter(folder: Path, keys: Collection[str]) -> None:
    """Refuse a checkpoint that holds an adapter that was not merged.

    Args:
        folder: of the checkpoint.
        keys: names of its tensors.

    Raises:
        CheckpointError: naming the adapter's files or tensors.
    """
    adapter = next((name for name in ADAPTER_WEIGHTS if present(folder / name)), None)
    if adapter is not None and present(folder / ADAPTER):
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER}, {adapter}) beside the weights, and transformers applies it: "
            "merge it with peft's merge_and_unload() and save_pretrained() the result, or take these two files out if "
            "it is merged already"
        )
    left = sorted(key for key in keys if _ADAPTED.search(key))
    if left:
        rest = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        raise CheckpointError(
            f"{folder} holds tensors of an adapter beside the model's ({', '.join(left[:SHOWN])}{rest}): merge it with "
            "peft's merge_and_unload(), save_pretrained() the result, and give that folder"
        )
