"""Processors' files: the pixels of transformers' own processors with the same settings, or a refusal by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.families.qwen2_vl import row as qwen2_vl
from framefusion.export.families.reading.processors import levels, processor, require_processor
from framefusion.runtime.families.llava import LlavaPreprocessing
from framefusion.runtime.media.preprocess import cut_patches, resize
from tests.families.case import picture
from tests.versions import needs

LIMITS = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"do_normalize": False},
    {"do_rescale": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5},
    {"resample": 0},
    {"resample": 2},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 1.0], "resample": 1},
]


def checkpoint(folder: Path, image: Any = None, video: Any = None, both: Any = None) -> Checkpoint:
    files = {"config": {}, "preprocessor_config": image, "video_preprocessor_config": video, "processor_config": both}
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return Checkpoint(folder)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("layout", ["own files", "one file", "image only"])
def test_pixels_of_qwen2_vl_are_transformers(settings: dict[str, Any], layout: str, tmp_path: Path) -> None:
    """fp32 against fp32: the levels are rounded once here and after each step there, 1e-6 of the largest apart."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    config = LIMITS | settings
    files = {"own files": {"image": config, "video": config}, "image only": {"image": config}}
    files["one file"] = {"both": {"image_processor": config, "video_processor": config}}
    rule = qwen2_vl.preprocessing(checkpoint(tmp_path, **files[layout]))
    shown = picture()
    ours = rule.image(shown).tiles[0].values
    size = {"shortest_edge": LIMITS["min_pixels"], "longest_edge": LIMITS["max_pixels"]}
    theirs = Qwen2VLImageProcessorPil(**settings, size=size)(shown, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("settings", SETTINGS)
def test_pixels_of_square_pictures_are_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    """The levels of every other family, on SigLIP's own processor; tolerance as above."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    size, shown = {"height": 56, "width": 56}, picture()
    config = processor(checkpoint(tmp_path, {"size": 56} | settings), "image")
    rule = LlavaPreprocessing(image_size=56, **levels(checkpoint(tmp_path), LlavaPreprocessing(image_size=56), config))
    theirs = SiglipImageProcessorPil(size=size, **({"resample": 3} | settings))(shown, return_tensors="np")
    square = resize(shown, 56, 56, rule.resample)
    ours = cut_patches(square[None], rule).reshape(4, 4, 3, 14, 14).transpose(2, 0, 3, 1, 4).reshape(3, 56, 56)
    expected = theirs["pixel_values"][0]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_what_one_rule_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has do_resize false, supported is true only"):
        qwen2_vl.preprocessing(checkpoint(tmp_path, {"do_resize": False}))
    with pytest.raises(CheckpointError, match="the image and the video processor have different image_mean"):
        qwen2_vl.preprocessing(checkpoint(tmp_path, {"patch_size": 14}, {"image_mean": [0.1, 0.1, 0.1], "fps": 1}))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no image processor, neither preprocessor_config.json nor"):
        qwen2_vl.preprocessing(checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match=r"/preprocessor_config.json has no image_mean"):
        require_processor(checkpoint(tmp_path, {"size": 56}), "image_mean")
    with pytest.raises(CheckpointError, match=r"/processor_config.json has no image_mean"):
        require_processor(checkpoint(tmp_path, both={"image_processor": {"size": 56}}), "image_mean")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("patch_size", "14", "a whole number"),
        ("min_pixels", -1, "a whole number"),
        ("rescale_factor", 0, "a number above 0"),
        ("fps", "fast", "a number above 0"),
        ("do_normalize", "false", "true or false"),
        ("resample", 7, "0 to 5, Pillow's filters"),
        ("image_mean", [0.5, 0.5], "three numbers"),
        ("image_mean", "half", "three numbers"),
        ("image_std", [0.5, 0, 0.5], "three numbers, those of a std not 0"),
        ("size", "large", "a whole number or an object"),
        ("size", {"height": 1.5}, "a whole number or an object"),
    ],
)
def test_values_of_a_wrong_type_name_their_key(key: str, value: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"/preprocessor_config.json has {key} .*, expected {expected}"):
        qwen2_vl.preprocessing(checkpoint(tmp_path, {key: value}))


def test_a_processor_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"image_processor has its content 'x', expected an object"):
        processor(checkpoint(tmp_path, both={"image_processor": "x"}), "image")


@pytest.mark.parametrize("key", ["patch_size", "merge_size", "temporal_patch_size"])
def test_sizes_that_two_processors_tell_differently_are_refused(key: str, tmp_path: Path) -> None:
    """One tower serves both, so one of the files is of another model; transformers fails on the shapes."""
    config = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    files = checkpoint(tmp_path, image=LIMITS | config | {key: 4}, video=LIMITS | config)
    with pytest.raises(CheckpointError, match=f"image and the video processor have different {key}, 4 and"):
        qwen2_vl.preprocessing(files)


@needs("transformers", "5.23", "its class has other limits of pixels where some are left out")
@pytest.mark.parametrize("config", [{}, {"min_pixels": 784}, {"max_pixels": 7840}, {"size": {"shortest_edge": 784}}])
@pytest.mark.parametrize("null", [(), ("do_normalize",), ("do_rescale", "do_normalize")])
def test_what_an_image_processor_leaves_out_is_as_in_its_class(
    config: dict[str, Any], null: tuple[str, ...], tmp_path: Path
) -> None:
    """Limits of pixels from the class, and null for false; tolerance as above."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    flags: dict[str, Any] = dict.fromkeys(null)
    default = {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}}
    complete = (
        config if "size" not in config else {"size": default["size"] | config["size"]}
    )  # there it has to be complete
    shown = picture(140, 196)
    theirs = Qwen2VLImageProcessorPil(**complete, **flags)(shown, return_tensors="np")["pixel_values"]
    rule = qwen2_vl.preprocessing(checkpoint(tmp_path, image={"patch_size": 14} | config | flags))
    ours = rule.image(shown).tiles[0].values
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())
