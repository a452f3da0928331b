"""Whatever a user gets wrong: a message that names it, an exit code of its own, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from framefusion import errors
from tests.commands import assert_refused, export, run
from tests.films import write_film
from tests.random_checkpoint import random_checkpoint

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Edit = Callable[[Path], object]


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


# --- Films ------------------------------------------------------------------------------------------------------------


def missing(path: Path) -> None:
    path.unlink(missing_ok=True)


def text_file(path: Path) -> None:
    path.write_text("These are words and no film.\n" * 40)


def no_frames(path: Path) -> None:
    write_film(path, frames=0)


def truncated(path: Path) -> None:
    write_film(path, frames=24)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_frame(path: Path) -> None:
    write_film(path, frames=1)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (missing, "cannot be opened"),
        (text_file, "no video"),
        (no_frames, "no"),
        (truncated, "truncated"),
        (one_frame, "1 frame(s)"),
    ],
)
def test_films_that_cannot_be_seen(bundle: Path, tmp_path: Path, spoil: Edit, word: str) -> None:
    film = tmp_path / "film.mp4"
    spoil(film)
    result = run("generate", bundle, "--video", film, "--prompt", "What?")
    assert_refused(result, errors.VideoError, word)
    assert result.stdout == ""


def test_a_text_file_is_no_picture(bundle: Path, tmp_path: Path) -> None:
    text_file(tmp_path / "picture.png")
    result = run("generate", bundle, "--image", tmp_path / "picture.png", "--prompt", "What?")
    assert_refused(result, errors.VideoError, "cannot be read as an image")


def test_a_picture_without_its_end_is_shown_with_a_warning(bundle: Path, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 99, (400, 300, 3), np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:-5000])
    arguments = ("generate", bundle, "--image", tmp_path / "a.png", "--prompt", "What?", "--max-new-tokens", 1)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert f"warning: {tmp_path / 'a.png'} lacks its last bytes: " in result.stderr
    assert "of its pixels are blank" in json.loads(run(*arguments, "--json").stdout)["warnings"][0]
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    assert_refused(run(*arguments), errors.VideoError, "is truncated", "of its pixels are missing")
    (tmp_path / "a.png").write_bytes(whole)
    refused = run(*arguments, "--max-image-pixels", 100_000)
    assert_refused(refused, errors.VideoError, "is 300x400, 120000 pixels, the limit is 100000", "--max-image-pixels")


def test_errors_are_one_json_object_as_well(bundle: Path) -> None:
    result = run("generate", bundle, "--video", "/no/film.mp4", "--prompt", "What?", "--json")
    assert result.exit_code == errors.VideoError.exit_code
    error = json.loads(result.stdout)["error"]
    assert error["kind"] == "VideoError"
    assert "/no/film.mp4" in error["message"]


# --- Prompts and costs ------------------------------------------------------------------------------------------------


def test_a_prompt_beyond_the_limit(bundle: Path) -> None:
    result = run("generate", bundle, "--prompt", "word " * 600)
    assert_refused(result, errors.PromptError, "the bundle takes 512", "--max-input-len")


@pytest.mark.parametrize(("cost", "word"), [(0, "(0, 1]"), (30, "0.3"), (-1, "(0, 1]"), (0.1, "smallest cost is 0.25")])
def test_costs_that_cannot_be(
    bundle: Path, checkpoint: Path, film: Path, tmp_path: Path, cost: float, word: str
) -> None:
    result = run("generate", bundle, "--video", film, "--prompt", "What?", "--cost", cost)
    assert_refused(result, errors.BudgetError, word, "keeps", "drops")
    result = export("build", checkpoint, "-o", tmp_path / "bundle", "--cost", cost)
    assert_refused(result, errors.BudgetError, word, "keeps", "drops")
    assert not any(tmp_path.iterdir())


def test_a_cost_out_of_reach_of_a_late_prune(checkpoint: Path, tmp_path: Path) -> None:
    schedule = ("--reduction", "fixed", "--merge-shares", "0.1", "--prune-layer", 2, "--cost", 0.3)
    result = export("build", checkpoint, "-o", tmp_path / "bundle", *schedule)
    assert_refused(result, errors.BudgetError, "cannot be reached")
    assert not any(tmp_path.iterdir())


def test_heads_that_the_dialect_has_no_kernels_for(tmp_path: Path) -> None:
    narrow = random_checkpoint(tmp_path / "narrow", hidden=24)
    result = export("build", narrow, "-o", tmp_path / "bundle")
    assert_refused(result, errors.BudgetError, "head_dim 12 is no multiple of 8", "--dialect portable")


@pytest.mark.parametrize("flags", [("--merge-shares", "0.3"), ("--prune-layer", 1), ("--calibrate", "film.mp4")])
def test_a_schedule_belongs_to_the_fixed_mode(checkpoint: Path, tmp_path: Path, flags: tuple[str, object]) -> None:
    result = export("build", checkpoint, "-o", tmp_path / "bundle", *flags)
    assert_refused(result, errors.BudgetError, "--reduction fixed", "adaptive")


def test_a_prompt_of_stray_bytes(bundle: Path) -> None:
    assert_refused(run("generate", bundle, "--prompt", "a\udcff"), errors.PromptError, "not Unicode", "UTF-8")


def test_sampling_numbers_that_cannot_be(bundle: Path) -> None:
    result = run("generate", bundle, "--prompt", "What?", "--top-p", 3)
    assert_refused(result, errors.PromptError, "top_p is 3.0")


# --- Bundles ----------------------------------------------------------------------------------------------------------

EMBEDDING = "embedding.bin"


def remove_embedding(bundle: Path) -> None:
    (bundle / EMBEDDING).unlink()


def cut_embedding(bundle: Path) -> None:
    os.truncate(bundle / EMBEDDING, 100)


def change_one_byte(bundle: Path) -> None:
    """As disks and copies do it: size and times stay."""
    path = bundle / "segments" / "rest" / "weights.bin"
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def make_newer(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))


def spoil_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").write_text('{"schema_version": 2, "model"')


def remove_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def remove_bundle(bundle: Path) -> None:
    shutil.rmtree(bundle)


DAMAGES = (
    (remove_embedding, "embedding.bin is missing"),
    (cut_embedding, "embedding.bin is truncated"),
    (change_one_byte, "weights.bin is altered"),
    (make_newer, "schema version 99"),
    (spoil_manifest, "not readable"),
    (remove_manifest, "is no bundle"),
    (remove_bundle, "no bundle at"),
)


@pytest.mark.parametrize(("damage", "word"), DAMAGES)
def test_damaged_bundles(bundle: Path, tmp_path: Path, damage: Edit, word: str) -> None:
    spoiled = copied(bundle, tmp_path / "spoiled")
    damage(spoiled)
    assert_refused(export("check", spoiled), errors.BundleError, word)
    assert_refused(run("generate", spoiled, "--prompt", "What?"), errors.BundleError, word)


@pytest.mark.parametrize("damage", [remove_embedding, cut_embedding])
def test_damaged_bundles_that_nobody_verified(bundle: Path, tmp_path: Path, damage: Edit) -> None:
    spoiled = copied(bundle, tmp_path / "spoiled")
    damage(spoiled)
    result = run("generate", spoiled, "--prompt", "What?", "--no-verify")
    assert_refused(result, errors.BundleError, "missing or truncated")


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def edit_tensors(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def layer_key(tensors: dict[str, Any]) -> str:
    return next(key for key in tensors if key.endswith("layers.1.self_attn.q_proj.weight"))


def remove_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(layer_key(tensors)))


def reshape_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({layer_key(t): t[layer_key(t)][:5].clone()}))


def truncate_weights(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def remove_shard(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}))
    (folder / WEIGHTS).unlink()


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def other_hidden_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] = 48
    (folder / "config.json").write_text(json.dumps(config))


def other_model_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    other = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (folder / "config.json").write_text(json.dumps(config | other))


@pytest.mark.parametrize(
    ("damage", "kind", "word"),
    [
        (remove_tensor, errors.CheckpointError, "self_attn.q_proj.weight"),
        (reshape_tensor, errors.CheckpointError, "self_attn.q_proj.weight"),
        (truncate_weights, errors.CheckpointError, "truncated"),
        (remove_shard, errors.CheckpointError, "model-00001-of-00002.safetensors is missing"),
        (remove_config, errors.CheckpointError, "config.json is missing"),
        (other_hidden_size, errors.CheckpointError, "hidden_size is 48"),
        (other_model_type, errors.UnknownFamilyError, "is unknown; known are"),
        (shutil.rmtree, errors.CheckpointError, "no checkpoint folder"),
    ],
)
def test_damaged_checkpoints(
    checkpoint: Path, tmp_path: Path, damage: Edit, kind: type[errors.FrameFusionError], word: str
) -> None:
    spoiled = copied(checkpoint, tmp_path / "spoiled")
    damage(spoiled)
    result = export("build", spoiled, "-o", tmp_path / "out" / "bundle", "--no-check")
    assert_refused(result, kind, word)
    assert not (tmp_path / "out").exists()  # headers are enough to refuse it
