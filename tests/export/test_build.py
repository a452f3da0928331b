"""Builds of a tiny random model: what is written, from which files, and that the bundle does what the model does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from framefusion.console.progress import Step
from framefusion.errors import CheckpointError
from framefusion.export.build import build, check_again
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.writing import parts
from framefusion.export.writing.parts import Builder
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.format.manifest_file import read_manifest
from framefusion.storage.records import from_json
from tests.random_checkpoint import random_checkpoint

SINGLE = "model.safetensors"
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "fixed": {"merge_shares": (0.3,), "prune_layer": 1, "cost": 0.6, "max_input_len": 384, "max_text_len": 128},
    "adaptive": {"cost": 0.5, "depth": 1, "max_input_len": 512},
}


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["gqa", "portable"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_every_dialect_reproduces_the_model(
    checkpoint: Path, tmp_path: Path, mode: Any, dialect: str
) -> None:
    options = BuildOptions(reduction=mode, dialect=dialect, **MODES[mode])
    manifest = build(Checkpoint(checkpoint), tmp_path / "bundle", options).manifest
    assert manifest.check["passed"]
    assert manifest.dialect == dialect
    assert manifest.reduction.mode == mode
    assert manifest == read_manifest(tmp_path / "bundle")
    reduced = mode != "none"
    assert (manifest.check["kept_tokens"] < manifest.check["prompt_tokens"]) == reduced
    assert any(line["what"] == "reduced decoded logits" for line in manifest.check["lines"]) == reduced


def test_a_bundle_was_compared_with_transformers_and_says_so(bundle: Path) -> None:
    check = read_manifest(bundle).check
    assert check["passed"]
    assert check["reference"] == "transformers Qwen2VLForConditionalGeneration"
    lines = {line["what"]: line["value"] for line in check["lines"]}
    assert lines["dense logits against transformers"] < 1e-4
    assert lines["reduced kept tokens"] == 0


def test_the_options_are_recorded_and_rebuild_the_plan(bundle: Path, checkpoint: Path) -> None:
    manifest = read_manifest(bundle)
    options = from_json(BuildOptions, manifest.options)
    plan = BuildPlan(Checkpoint(checkpoint), options)
    assert plan.reduction == manifest.reduction
    assert plan.segment_records == manifest.segments
    assert check_again(bundle, Checkpoint(checkpoint))["passed"]


def test_a_bundle_is_checked_only_against_its_own_checkpoint(bundle: Path, tmp_path: Path) -> None:
    other = random_checkpoint(tmp_path / "other", layers=5)
    with pytest.raises(CheckpointError, match="num_layers 5, the bundle was built from one with 4"):
        check_again(bundle, Checkpoint(other))


def test_a_check_sees_other_weights(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = random_checkpoint(tmp_path / "other", seed=1, pixels=112 * 112)
    report = check_again(bundle, Checkpoint(other))
    assert not report["passed"]
    assert report["failures"]


@pytest.mark.usefixtures("instant_traces")
def test_a_structure_is_traced_once(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []
    monkeypatch.setattr(parts, "trace_graph", lambda graph, _: traced.append(graph.folder))
    built = build(Checkpoint(checkpoint), tmp_path / "bundle", BuildOptions(depth=2), verify=False)
    assert [segment.name for segment in built.manifest.segments] == ["layer00", "layer01", "layer02", "rest"]
    assert traced == ["vision", "segments/layer00", "segments/layer01", "segments/rest"]
    assert built.manifest.check == {}


@pytest.mark.usefixtures("instant_traces")
def test_weights_of_the_manifest_are_the_weights_on_disk(checkpoint: Path, tmp_path: Path) -> None:
    built = build(Checkpoint(checkpoint), tmp_path / "bundle", BuildOptions(), verify=False)
    on_disk = sum(path.stat().st_size for path in built.folder.rglob("weights.bin"))
    recorded = sum(segment.weight_bytes for segment in built.manifest.segments) + built.manifest.vision.weight_bytes
    slack = 4096 * (len(built.manifest.segments) + 1)  # the last tensor of a file is not followed by padding
    assert on_disk <= recorded < on_disk + slack


@pytest.mark.usefixtures("instant_traces")
def test_progress_goes_forward_to_all_bytes(checkpoint: Path, tmp_path: Path) -> None:
    reported: list[Step] = []
    options = BuildOptions(depth=0)
    build(Checkpoint(checkpoint), tmp_path / "bundle", options, verify=False, progress=reported.append)
    assert list(dict.fromkeys(step.part for step in reported)) == [
        "tokenizer", "embedding", "vision", "segments/layer00", "segments/rest", "manifest", "golden",
    ]  # fmt: skip
    written = [step.written for step in reported]
    assert written == sorted(written)
    assert written[-1] == reported[-1].total
    for part in ("vision", "segments/rest"):
        steps = [step for step in reported if step.part == part]
        assert list(dict.fromkeys(step.doing for step in steps)) == ["", "weights.bin", "tracing"]
        assert 0 <= steps[-1].size - steps[-1].done < 4096  # the last tensor of a file is not followed by padding


# --- Where weights come from ------------------------------------------------------------------------------------------


def weights_of(folder: Path, target: Path) -> dict[str, bytes]:
    """All weights that a build of this checkpoint writes, graphs left out."""
    target.mkdir()
    builder = Builder(BuildPlan(Checkpoint(folder), BuildOptions(depth=1)))
    for part, produce in builder.producers().items():
        if part != "tokenizer":
            produce(target)
    return {str(path.relative_to(target)): path.read_bytes() for path in sorted(target.rglob("*.bin"))}


@pytest.fixture
def expected(checkpoint: Path, tmp_path: Path, instant_traces: None) -> dict[str, bytes]:
    return weights_of(checkpoint, tmp_path / "expected")


def rewritten(checkpoint: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(checkpoint, folder)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return folder


def test_a_sharded_checkpoint_gives_the_same_weights(
    checkpoint: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    tensors, folder = load_file(checkpoint / SINGLE), tmp_path / "sharded"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(SINGLE))
    weight_map = {key: f"model-{index % 3 + 1:05}-of-00003.safetensors" for index, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        save_file({key: tensor for key, tensor in tensors.items() if weight_map[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert weights_of(folder, tmp_path / "written") == expected


def test_names_of_older_and_newer_releases_give_the_same_weights(
    checkpoint: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    older = load_file(checkpoint / SINGLE)
    assert any(key.startswith("model.layers.") for key in older)
    renamed = {
        key.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1): tensor
        for key, tensor in older.items()
    }
    folder = rewritten(checkpoint, tmp_path / "newer", renamed)
    assert weights_of(folder, tmp_path / "written") == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("instant_traces")
def test_half_precision_checkpoints(checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(checkpoint / SINGLE).items()}
    half = rewritten(checkpoint, tmp_path / "half", tensors)
    full = rewritten(checkpoint, tmp_path / "full", {key: tensor.float() for key, tensor in tensors.items()})
    ours, theirs = weights_of(half, tmp_path / "ours"), weights_of(full, tmp_path / "theirs")
    assert 2 * len(ours.pop("embedding.bin")) == len(theirs.pop("embedding.bin"))  # rows stay as they are stored
    assert ours == theirs


@pytest.mark.usefixtures("instant_traces")
def test_a_half_precision_table_is_recorded(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {key: tensor.to(torch.bfloat16) for key, tensor in load_file(checkpoint / SINGLE).items()}
    half = rewritten(checkpoint, tmp_path / "half", tensors)
    manifest: Manifest = build(Checkpoint(half), tmp_path / "bundle", BuildOptions(), verify=False).manifest
    assert manifest.embedding.dtype == "bfloat16"


def test_a_quantized_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {key: tensor.to(torch.int8) for key, tensor in load_file(checkpoint / SINGLE).items()}
    folder = rewritten(checkpoint, tmp_path / "quantized", tensors)
    with pytest.raises(CheckpointError, match="stored as I8, known are F32, F16, BF16"):
        BuildPlan(Checkpoint(folder), BuildOptions())
