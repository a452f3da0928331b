"""A checkpoint whose parts lie in folders of their own reads as one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.plan.build_plan import identity_of

TENSORS = {
    "llm": {"model.embed_tokens.weight": torch.arange(12.0).reshape(6, 2), "model.norm.weight": torch.ones(2)},
    "vision_tower": {"vision_model.post_layernorm.weight": torch.full((3,), 2.0)},
    "mm_projector": {"layers.1.weight": torch.full((4,), 3.0)},
}
CONFIG = {"model_type": "llava_llama", "llm_cfg": {"hidden_size": 1}, "vision_tower_cfg": {}, "mm_projector_cfg": {}}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", CONFIG)
    for part, tensors in TENSORS.items():
        (tmp_path / part).mkdir()
        write_json(tmp_path / part / "config.json", {"part": part})
        save_file(tensors, tmp_path / part / "model.safetensors")
    write_json(tmp_path / "llm/tokenizer_config.json", {"chat_template": "text"})
    write_json(tmp_path / "llm/generation_config.json", {"eos_token_id": 7})
    write_json(tmp_path / "vision_tower/preprocessor_config.json", {"resample": 3})
    return tmp_path


def shard(folder: Path) -> None:
    """One tensor of the LLM a file."""
    (folder / "llm/model.safetensors").unlink()
    files = {key: f"model-{i:05}-of-00002.safetensors" for i, key in enumerate(TENSORS["llm"], start=1)}
    for key, file in files.items():
        save_file({key: TENSORS["llm"][key]}, folder / "llm" / file)
    write_json(folder / "llm/model.safetensors.index.json", {"weight_map": files})


@pytest.mark.parametrize("sharded", [False, True])
def test_parts_read_as_one(folder: Path, sharded: bool) -> None:
    if sharded:
        shard(folder)
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.files) == {f"{part}.{key}" for part, tensors in TENSORS.items() for key in tensors}
    for part, tensors in TENSORS.items():
        for key, expected in tensors.items():
            name = f"{part}.{key}"
            assert name in checkpoint
            assert checkpoint.files[name].parent == folder / part
            assert checkpoint.shape(name) == tuple(expected.shape)
            assert checkpoint.dtype(name) == "F32"
            assert torch.equal(checkpoint.tensor(name), expected)
    rows = checkpoint.tensor("llm.model.embed_tokens.weight", slice(2, 4))
    assert torch.equal(rows, TENSORS["llm"]["model.embed_tokens.weight"][2:4])


@pytest.mark.parametrize("value", ["llm", "./llm", "/home/somebody/runs/model/llm", {"hidden_size": 1}, None])
def test_a_part_is_named_by_its_folder_or_by_its_key(folder: Path, value: Any) -> None:
    write_json(folder / "config.json", CONFIG | {"llm_cfg": value})
    checkpoint = Checkpoint(folder)
    assert checkpoint.parts["llm"] == folder / "llm"
    assert checkpoint.part_config("llm") == {"part": "llm"}  # of the folder, which is what was saved last


def test_the_configuration_of_a_part_without_a_folder(folder: Path) -> None:
    shutil.rmtree(folder / "llm")
    checkpoint = Checkpoint(folder)
    assert checkpoint.part_config("llm") == {"hidden_size": 1}
    assert checkpoint.part_config("sound_tower") == {}
    assert "llm.model.norm.weight" not in checkpoint


def test_files_are_found_in_the_folder_first(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.find("generation_config.json") == folder / "llm/generation_config.json"
    assert checkpoint.read_optional_json("generation_config.json") == {"eos_token_id": 7}
    assert checkpoint.read_optional_json("preprocessor_config.json") == {"resample": 3}
    assert checkpoint.find("tokenizer.json") is None
    assert checkpoint.read_optional_json("tokenizer.json") == {}
    write_json(folder / "generation_config.json", {"eos_token_id": 8})
    assert Checkpoint(folder).read_optional_json("generation_config.json") == {"eos_token_id": 8}


def test_one_file_for_all_parts_wins(folder: Path) -> None:
    save_file({"llm.model.norm.weight": torch.zeros(2)}, folder / "model.safetensors")
    assert set(Checkpoint(folder).files) == {"llm.model.norm.weight"}


def test_errors_name_the_file_of_the_part(folder: Path) -> None:
    config = (folder / "llm/config.json").read_text()
    (folder / "llm/config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"llm/config\.json is not readable"):
        Checkpoint(folder).part_config("llm")
    (folder / "llm/config.json").write_text(config)  # it says whether weights are quantised, and so is read before them
    (folder / "llm/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"llm holds neither model\.safetensors nor"):
        _ = Checkpoint(folder).files
    write_json(folder / "llm/model.safetensors.index.json", {})
    with pytest.raises(CheckpointError, match=r"llm/model\.safetensors\.index\.json has no weight_map"):
        _ = Checkpoint(folder).files
    write_json(folder / "llm/model.safetensors.index.json", {"weight_map": {"model.norm.weight": "gone.safetensors"}})
    with pytest.raises(CheckpointError, match=r"llm/gone\.safetensors is missing"):
        Checkpoint(folder).shape("llm.model.norm.weight")
    save_file({"other": torch.zeros(1)}, folder / "llm/gone.safetensors")
    with pytest.raises(CheckpointError, match=r"llm/gone\.safetensors has no tensor model\.norm\.weight"):
        Checkpoint(folder).shape("llm.model.norm.weight")
    with pytest.raises(CheckpointError, match=r"has no tensor mm_projector\.layers\.2\.weight; the nearest"):
        Checkpoint(folder).shape("mm_projector.layers.2.weight")


def test_a_truncated_part_is_refused(folder: Path) -> None:
    path = folder / "vision_tower/model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"vision_tower/model\.safetensors is truncated"):
        _ = Checkpoint(folder).files


@pytest.mark.parametrize(
    "changed",
    [
        "config.json",
        "llm/config.json",
        "llm/model.safetensors",
        "vision_tower/model.safetensors",
        "llm/chat_template.jinja",
    ],
)
def test_identity_covers_the_files_of_all_parts(folder: Path, changed: str) -> None:
    (folder / "llm/chat_template.jinja").write_text("text")
    before = identity_of(Checkpoint(folder))
    assert {"llm/model.safetensors", "vision_tower/model.safetensors", "mm_projector/model.safetensors"} <= set(before)
    os.utime(folder / changed, ns=(1, 1))
    after = identity_of(Checkpoint(folder))
    assert {name for name in before if before[name] != after[name]} == {changed}
