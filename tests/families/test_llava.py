"""Bundles of LLaVA-Video: the released tower's geometry, every way to build, ids that no token has."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from framefusion.export.families.llava import row as llava
from framefusion.runtime.media.frame_sampling import sample_indices
from framefusion.runtime.media.tiles.pooling import pool_matrix
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.text.prompt import Turn, Visual
from tests.families import llava_checkpoints as tiny
from tests.families.case import relative_error
from tests.films import write_film


def build(folder: Path, **options: Any) -> Any:
    from framefusion.export.build import build as build_bundle
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.options import BuildOptions

    return build_bundle(Checkpoint(folder), folder.parent / "bundle", BuildOptions(cost=0.5, **options))


@pytest.mark.slow
def test_the_released_towers_geometry(tmp_path: Path) -> None:
    """26 of 27 layers, 16 heads, 27 x 27 patches of 384 pixels, by the tower's name alone."""
    import torch
    from safetensors.torch import load_file
    from torch.nn.functional import gelu, interpolate, linear

    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.checkpoints.tensors.weights import load_parameters
    from framefusion.export.families.llava.weights import original_tower

    tiny.write_original(tmp_path, vision=tiny.SO400M, mm_vision_tower="google/siglip-so400m-patch14-384")
    checkpoint, tensors = Checkpoint(tmp_path), load_file(tmp_path / "model.safetensors")
    transformers: Any = importlib.import_module("transformers")
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig.from_dict(tiny.SO400M)).eval()
    inner = "vision_model." * any(name.startswith("vision_model.") for name in tower.state_dict())
    prefix = llava.VISION_PREFIX
    found = {inner + name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    missing = tower.load_state_dict(found, strict=False).missing_keys
    assert {name.split("layers.")[1][:2] for name in missing} == {"26"}

    pixels: Any = llava.preprocessing(checkpoint)
    frames = np.random.default_rng(0).integers(0, 255, (1, 90, 160, 3), np.uint8)
    tiles = pixels.video(Video(frames, np.zeros(1, np.int64), 1, 1, 1, 0)).tiles[0]
    pictures = torch.zeros(1, 3, 384, 384)
    blocks = torch.from_numpy(tiles.values).reshape(1, 27, 27, 3, 14, 14).permute(0, 3, 1, 4, 2, 5)
    pictures[:, :, :378, :378] = blocks.reshape(1, 3, 378, 378)
    plan = original_tower(checkpoint)
    module = load_parameters(plan.module, checkpoint, plan.sources, torch.float32)
    with torch.inference_mode():
        hidden = tower(pictures, output_hidden_states=True).hidden_states[-2]
        weights = [tensors[f"model.mm_projector.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
        rows = linear(gelu(linear(hidden, *weights[:2])), *weights[2:])
        grid = interpolate(rows.reshape(1, 27, 27, -1).permute(0, 3, 1, 2), size=(14, 14), mode="bilinear")
        ours = module(torch.from_numpy(tiles.values), torch.from_numpy(pool_matrix(27, 27, tiles.pool)))
    assert relative_error(ours.numpy(), grid.flatten(2)[0].T.numpy()) < 1e-4  # 26 layers, about 1e-6 each


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "fixed", "merge_shares": (0.3, 0.2), "prune_layer": 2, "max_frames": 12, "max_input_len": 1024},
        {"dialect": "portable", "max_frames": 8, "max_input_len": 640},
        {"dtype": "float16", "mm_spatial_pool_mode": "average"},
    ],
    ids=["fixed", "portable", "float16_average"],
)
def test_builds(options: dict[str, Any], tmp_path: Path) -> None:
    """Every way to build a bundle, checked against the eager model by the build itself."""
    from framefusion.runtime.bundle import Bundle
    from framefusion.runtime.pipeline import Pipeline, Request

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tiny.write_original(folder)
    built = build(folder, **options)
    assert built.manifest.check["passed"]
    film = write_film(tmp_path / "film.mp4")
    answer = Pipeline(Bundle(built.folder), threads=1).generate(
        [Turn("user", (Visual.VIDEO, "What?"))], [film], Request(max_new_tokens=3)
    )
    assert answer.visual_tokens == built.manifest.sampling.max_frames * (6 if "mm_spatial_pool_mode" in options else 12)


@pytest.mark.slow
def test_ids_beyond_the_tokenizer_are_never_said(tmp_path: Path) -> None:
    """LLaVA-Video's head has 152064 rows for 151646 tokens; here the rows without a token shout."""
    from safetensors.torch import load_file

    from framefusion.runtime.bundle import Bundle
    from framefusion.runtime.pipeline import Pipeline, Request

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tiny.write_original(folder)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["lm_head.weight"]
    head[303:] = 100 * head[:17]
    tiny.write_tensors(folder, tensors)
    pipeline = Pipeline(Bundle(build(folder, max_frames=4).folder), threads=1)
    assert (pipeline.manifest.model.vocab_size, pipeline.tokenizer.vocab_size) == (320, 303)
    clip: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 255, (4, 60, 60, 3), np.uint8)
    for text in ("What?", "Where is it?", "Why"):
        answer = pipeline.generate([Turn("user", (Visual.VIDEO, text))], [clip], Request(max_new_tokens=8))
        assert max(answer.token_ids) < 303


@pytest.mark.parametrize(
    ("told", "frames", "force"),
    [
        ({"hidden_size": 3584, "force_sample": True, "mm_newline_position": "grid"}, 64, True),
        ({"hidden_size": 3584, "force_sample": False, "mm_newline_position": "grid"}, 64, False),
        ({"hidden_size": 8192, "force_sample": True, "mm_newline_position": "grid"}, 32, True),
        ({"hidden_size": 3584, "mm_newline_position": "one_token"}, 32, True),
        ({"hidden_size": 896}, 32, True),
    ],
)
def test_frames_are_as_many_as_in_training(tmp_path: Path, told: dict[str, Any], frames: int, force: bool) -> None:
    from framefusion.export.checkpoints.checkpoint import Checkpoint

    tiny.write_json(tmp_path, config={"architectures": ["LlavaQwenForCausalLM"], **told})
    sampling = llava.sampling(Checkpoint(tmp_path))
    assert (sampling.max_frames, sampling.force) == (frames, force)
    if "force_sample" not in told:  # OneVision spreads them over a film of any length
        assert sample_indices(3000, 25.0, sampling).tolist() == np.linspace(0, 2999, 32, dtype=int).tolist()


def test_rope_scaling_is_what_the_authors_class_makes_it(tmp_path: Path) -> None:
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.families.reading import language

    tiny.write_original(tmp_path, rope_scaling={"type": "linear", "factor": 4.0})
    checkpoint = Checkpoint(tmp_path)
    theta, sections, _ = language.rope(checkpoint, head_dim=16)
    assert (theta, sections) == (checkpoint.config["rope_theta"], None)
