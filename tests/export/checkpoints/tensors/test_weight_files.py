"""Which files of a checkpoint are read: which weights win, what is not followed, what other weights are called."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from framefusion.errors import CheckpointError, UnknownFamilyError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.files import DEEPEST_JSON, LARGEST_JSON
from framefusion.export.checkpoints.origin.hub import resolve
from framefusion.export.checkpoints.origin.source import license_files
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.report.card import write_card
from framefusion.runtime.format.manifest import Manifest
from tests.commands import assert_refused, export
from tests.export.checkpoints.test_hub import fill_cache
from tools.attack.checkpoints import attack

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.language_model.norm.weight"
Edit = Callable[[Path], object]


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, to be spoiled."""
    return shutil.copytree(checkpoint, tmp_path / "tiny")


def shard(folder: Path, factor: float = 1.0) -> dict[str, str]:
    """Its tensors in two shards, times a factor; returns the weight_map."""
    tensors = {key: tensor * factor for key, tensor in load_file(folder / SINGLE).items()}
    names, weight_map = sorted(tensors), dict[str, str]()
    for part, keys in enumerate((names[::2], names[1::2]), start=1):
        name = f"model-{part:05}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def transformers_norm(folder: Path) -> torch.Tensor:
    from transformers import Qwen2VLForConditionalGeneration

    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    norm: torch.Tensor = model.model.language_model.norm.weight.detach()
    return norm


def norm_of(checkpoint: Checkpoint) -> torch.Tensor:
    return checkpoint.tensor(next(key for key in checkpoint.files if key.endswith(("model.norm.weight", NORM))))


def plan(folder: Path) -> BuildPlan:
    return BuildPlan(Checkpoint(folder), BuildOptions())


# --- Which weights ----------------------------------------------------------------------------------------------------


def test_the_single_file_is_read_before_an_index(folder: Path) -> None:
    """New weights beside the shards of the old ones; transformers reads the single file first."""
    shard(folder, factor=3.0)
    read = norm_of(Checkpoint(folder))
    assert torch.equal(read, transformers_norm(folder))
    plan(folder)
    write_index(folder, {"lm_head.weight": "of-another-repository.safetensors"})
    assert torch.equal(norm_of(Checkpoint(folder)), read)


def test_tensors_that_the_index_forgot_are_read(folder: Path) -> None:
    weight_map = shard(folder, factor=2.0)
    (folder / SINGLE).unlink()
    key = next(key for key in weight_map if key.endswith("model.norm.weight") or key == NORM)
    write_index(folder, {other: file for other, file in weight_map.items() if other != key})
    assert torch.equal(norm_of(Checkpoint(folder)), transformers_norm(folder))


def test_a_tensor_in_two_shards(folder: Path) -> None:
    weight_map = shard(folder)
    (folder / SINGLE).unlink()
    key = sorted(weight_map)[0]
    other = folder / next(file for file in weight_map.values() if file != weight_map[key])
    tensors, value = load_file(other), load_file(folder / weight_map[key])[key]
    save_file(tensors | {key: value}, other, {"format": "pt"})
    assert torch.equal(Checkpoint(folder).tensor(key), value)
    save_file(tensors | {key: value + 1}, other, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"both hold {key}, with other values"):
        plan(folder)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "a/../../b", 7, None, [], {}, True, "", ".", "..", "a\0b", "a" * 5000],
)
def test_an_index_names_files_of_its_folder(folder: Path, name: Any) -> None:
    weight_map = shard(folder)
    (folder / SINGLE).rename(folder.parent / "outside.safetensors")
    write_index(folder, weight_map | {sorted(weight_map)[0]: name})
    with pytest.raises(CheckpointError, match="no file of the folder"):
        plan(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "null", "", "{"])
def test_an_index_that_is_none(folder: Path, content: str) -> None:
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"no weight_map|expected an object|not readable JSON"):
        plan(folder)


# --- Files of a stranger ----------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def outside(path: Path) -> None:
    target = path.parent.parent / f"outside-{path.name}"
    path.rename(target)
    path.symlink_to(target)


def nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone")


def circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")


def read(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    checkpoint.read_optional_json("generation_config.json")
    BuildPlan(checkpoint, BuildOptions())


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", SINGLE])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pipe, "no regular file"),
        (outside, "outside the checkpoint"),
        (nowhere, "cannot be opened|outside"),
        (circle, "cannot be opened"),
        (as_folder, "no regular file"),
        (pointer, "git lfs pull"),
    ],
)
def test_files_that_are_none(folder: Path, name: str, spoil: Edit, message: str) -> None:
    spoil(folder / name)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read(folder)
    assert name in str(refusal.value)


def test_links_within_the_folder_and_a_linked_folder_are_read(folder: Path, tmp_path: Path) -> None:
    (folder / "store").mkdir()
    (folder / SINGLE).rename(folder / "store" / "weights")
    (folder / SINGLE).symlink_to("store/weights")
    (tmp_path / "Gewichte für #1 %20 权重").symlink_to(folder)
    plan(tmp_path / "Gewichte für #1 %20 权重")


def test_a_snapshot_of_the_hub_is_made_of_links(folder: Path, tmp_path: Path) -> None:
    (folder / "LICENSE").write_text("Permission is hereby granted, free of charge")
    snapshot = fill_cache(tmp_path / "cache", folder)
    assert (snapshot / "config.json").is_symlink()
    plan(snapshot)
    assert [path.name for path in license_files(snapshot)] == ["LICENSE"]


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt"])
def test_a_licence_that_leads_out_is_not_published(folder: Path, tmp_path: Path, name: str, manifest: Manifest) -> None:
    (tmp_path / "secret").write_text("of this machine")
    (folder / name).symlink_to(tmp_path / "secret")
    (tmp_path / "card").mkdir()
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*secret, which is outside"):
        write_card(tmp_path / "card", manifest, folder)
    assert not list((tmp_path / "card").iterdir())


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    from framefusion.runtime.bundle import Bundle

    return Bundle(bundle, verify=False).manifest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a":' * 100_000 + "1" + "}" * 100_000, f"deeper than {DEEPEST_JSON}"),
        ('{"a": ' + "[" * 80 + "]" * 80 + "}", f"deeper than {DEEPEST_JSON}"),
        ('{"a": "' + "x" * LARGEST_JSON + '"}', f"more than {LARGEST_JSON} bytes"),
        ('{"a": ' + "9" * 5000 + "}", "not readable JSON"),
        ("\ufeff{}", "not readable JSON"),
        ("[]", "holds a list"),
    ],
    ids=["deep", "nested", "large", "digits", "mark", "list"],
)
def test_json_within_limits(folder: Path, content: str, message: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


# --- Weights of other kinds -------------------------------------------------------------------------------------------


def only(*names: str) -> Edit:
    def leave(folder: Path) -> None:
        (folder / SINGLE).unlink()
        for name in names:
            (folder / name).write_bytes(b"x")

    return leave


def adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen2-VL-7B-Instruct"}))
    (folder / "adapter_model.safetensors").write_bytes(b"x")


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen2-VL-7B-Instruct"}))
    plan(folder)  # the file alone is a leftover
    (folder / "adapter_model.safetensors").write_bytes(b"x")


def rename(prefix: str) -> Edit:
    def change(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        save_file({prefix + key: tensor for key, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})

    return change


def lora(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    key = next(key for key in tensors if key.endswith("layers.0.self_attn.q_proj.weight"))
    stem = key.removesuffix(".weight")
    wrapped = {f"{stem}.base_layer.weight": tensors.pop(key), f"{stem}.lora_A.default.weight": torch.ones(4, 32)}
    save_file(tensors | wrapped, folder / SINGLE, {"format": "pt"})


def method(key: str, value: Any) -> Edit:
    def tell(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))

    return tell


def tensors_as(*names: str) -> Edit:
    """One linear map replaced by tensors that some format stores for it."""

    def replace(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        key = next(key for key in tensors if key.endswith("mlp.down_proj.weight"))
        del tensors[key]
        stem = key.removesuffix("weight")
        packed = {stem + name: torch.ones(4, dtype=torch.uint8) for name in names}
        save_file(tensors | packed, folder / SINGLE, {"format": "pt"})

    return replace


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (adapter, "is a LoRA adapter of Qwen/Qwen2-VL-7B-Instruct.*merge_and_unload"),
        (only("pytorch_model.bin"), "PyTorch pickles .pytorch_model.bin.*save_pretrained"),
        (only("model.pt"), "PyTorch pickles"),
        (only("manifest.json"), "It holds a bundle .manifest.json.: give the checkpoint that it was built from"),
        (only("model-q4.gguf"), "GGUF weights"),
        (only("zero_to_fp32.py", "pytorch_model.bin"), "DeepSpeed ZeRO.*zero_to_fp32.py . OUTPUT"),
        (only("model.fp16.safetensors"), "a variant of the weights"),
        (only("model-00001-of-00002.safetensors"), "shards without their model.safetensors.index.json"),
        (only("consolidated.safetensors"), "under another name .consolidated.safetensors"),
        (only(), "no weights of another kind"),
        (adapter_beside, r"holds an adapter .adapter_config.json, adapter_model.safetensors. beside.*merge_and_unload"),
        (rename("base_model.model."), "merge_and_unload"),
        (lora, "an adapter"),
        (method("quantization_config", {"quant_method": "awq", "bits": 4}), "quantized .awq, 4 bits"),
        (method("quantization_config", {"quant_method": "gptq", "bits": 4}), "quantized .gptq, 4 bits"),
        (method("quantization_config", {"quant_method": "fp8"}), "quantized .fp8"),
        (method("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}), "bitsandbytes"),
        (method("quantization_config", {"quant_method": "compressed-tensors"}), "compressed-tensors"),
        (method("quantization_config", {"quant_algo": "NVFP4"}), "quantized .NVFP4"),
        (method("quantization", {"group_size": 64, "bits": 4}), "an unnamed method, 4 bits"),
        (method("text_config", {"quantization_config": {"quant_method": "awq"}}), "quantized .awq"),
        (lambda folder: (folder / "hf_quant_config.json").write_text("{}"), "by ModelOpt"),
        (tensors_as("qweight", "qzeros", "scales"), "quantized .its tensor .*(qweight|qzeros|scales)"),
        (tensors_as("weight_packed", "weight_scale"), "quantized .its tensor"),
        (tensors_as("weight", "weight.absmax", "weight.quant_map"), "quantized .its tensor"),
        (tensors_as("weight", "SCB"), "quantized .its tensor"),
        (tensors_as("weight", "weight_scale_inv"), "quantized .its tensor"),
    ],
)
def test_weights_of_another_kind_are_called_what_they_are(folder: Path, spoil: Edit, message: str) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        plan(folder)


def test_a_file_is_no_folder(folder: Path) -> None:
    for name in (SINGLE, "config.json"):
        with pytest.raises(CheckpointError, match="is a file: give the folder"):
            Checkpoint(folder / name)
        with pytest.raises(CheckpointError, match="is a file: give the folder"):
            resolve(folder / name)


@pytest.mark.parametrize("name", ["Qwen2VLForSequenceClassification", "Qwen2VLForRewardModel", "Qwen2VLModel"])
def test_models_that_do_not_chat_are_refused(folder: Path, name: str) -> None:
    method("architectures", [name])(folder)
    with pytest.raises(UnknownFamilyError, match=name):
        plan(folder)


def test_what_is_refused_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    method("vocab_size", 330)(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 330
    (folder / "config.json").write_text(json.dumps(config))
    result = export("build", folder, "-o", tmp_path / "out")
    assert_refused(result, CheckpointError, "320 rows, config.json says vocab_size 330")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize(("key", "value"), [("video_token_id", 320), ("image_token_id", -1)])
def test_placeholders_have_rows_in_the_table(folder: Path, key: str, value: int) -> None:
    method(key, value)(folder)
    with pytest.raises(CheckpointError, match=rf"is token {value}, .* has 320 rows"):
        plan(folder)


def test_control_tokens_of_prompts_have_rows_in_the_table(folder: Path, tmp_path: Path) -> None:
    """A table that ends before <|im_start|>; the placeholders are not even reached."""
    tensors = load_file(folder / SINGLE)
    key = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    plain = json.loads((folder / "tokenizer.json").read_text())
    start = next(token["id"] for token in plain["added_tokens"] if token["content"] == "<|im_start|>")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = start
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors | {key: tensors[key][:start].clone()}, folder / SINGLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"has {start} rows"):
        plan(folder)


def test_checkpoints_changed_at_random_are_planned_or_refused(checkpoint: Path) -> None:
    """The long run of it, over all families: python -m tools.attack.checkpoints."""
    facts = attack(trials=150, seed=1, folders=[checkpoint])
    assert facts["failed"] == []
    assert facts["planned"] > 10
    assert facts["slowest_s"] < 20


@pytest.mark.slow
def test_checkpoints_of_every_family_changed_at_random() -> None:
    facts = attack(trials=400, seed=2)
    assert facts["failed"] == []
    assert facts["planned"] > 40
