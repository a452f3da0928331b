"""What a checkpoint's image and video processors do to pixels: their files, checked by type, and the levels they make.

preprocessor_config.json and video_preprocessor_config.json, or processor_config.json with both since transformers 5.
What a rule of the runtime can compute is read, what it cannot is refused by name. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from framefusion.errors import CheckpointError
from framefusion.runtime.media.preprocess import Preprocessing

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint

BOTH = "processor_config.json"
IMAGE = "preprocessor_config.json"
VIDEO = "video_preprocessor_config.json"
COUNTS = (
    "patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels", "min_frames", "max_frames",
    "num_frames", "min_patches", "max_patches", "max_video_tokens", "image_feature_size", "scale_resolution",
    "max_slice_nums",
)  # fmt: skip
NUMBERS = ("fps", "rescale_factor")
LEVELS = ("image_mean", "image_std", "norm_mean", "norm_std")
FLAGS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb", "do_pad")
SIZES = ("size", "crop_size")
RESAMPLES = range(6)
"""Pillow's numbers of its filters."""


def processor(checkpoint: Checkpoint, kind: str) -> Mapping[str, Any]:
    """What the files say of the "image" or "video" processor; a video's is the image's where it has none of its own.

    Raises:
        CheckpointError: a value has another type than the key wants.
    """
    if kind == "video":
        video = video_processor(checkpoint)
        if video:
            return video
    return _content(checkpoint, "image_processor", IMAGE)


def video_processor(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What the files say of the video processor's own; they are one file since transformers 5."""
    return _content(checkpoint, "video_processor", VIDEO)


def require_processor(checkpoint: Checkpoint, *keys: str) -> None:
    """Refuse a checkpoint without the file of an image processor, which transformers does not load either.

    Raises:
        CheckpointError: there is none, or it does not tell one of `keys`.
    """
    file = processor(checkpoint, "image")
    if not file:
        raise CheckpointError(
            f"{checkpoint.folder} has no image processor, neither {IMAGE} nor image_processor in {BOTH}: copy the "
            "file of the model that it was trained from, since sizes and levels of the pixels are nowhere else"
        )
    missing = [key for key in keys if file.get(key) is None]
    if missing:
        place = BOTH if checkpoint.read_optional_json(BOTH).get("image_processor") else IMAGE
        raise CheckpointError(f"{checkpoint.folder}/{place} has no {missing[0]}: the checkpoint is incomplete")


def normalisation(file: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """image_mean and image_std, where a processor's file tells them."""
    return {name: _triple(file[name]) for name in ("image_mean", "image_std") if file.get(name)}


def levels(
    checkpoint: Checkpoint, default: Preprocessing, *processors: Mapping[str, Any], resample: bool = True
) -> dict[str, Any]:
    """How pixels become numbers, as fields of a rule: rescale, image_mean, image_std and, if wanted, resample.

    Args:
        checkpoint: for the messages.
        default: has the values of the processors' classes, for keys that a file leaves out.
        processors: what the files say; one rule serves all of them.
        resample: the rule takes the filter of its resizing from them, too.

    Raises:
        CheckpointError: they differ, or do not resize.
    """
    found = [_levels(checkpoint, file, default) for file in processors]
    names = [name for name in found[0] if name != "resample" or resample]
    for name in names:
        values = [fields[name] for fields in found]
        if any(value != values[0] for value in values):
            raise CheckpointError(
                f"{checkpoint.folder}: the image and the video processor have different {name}, "
                f"{' and '.join(map(str, values))}: one rule serves both here"
            )
    return {name: found[0][name] for name in names}


def _levels(checkpoint: Checkpoint, file: Mapping[str, Any], default: Preprocessing) -> dict[str, Any]:
    resized = bool(file.get("do_resize", True))
    rescaled = bool(file.get("do_rescale", True))
    normalised = bool(file.get("do_normalize", True))
    if not resized:  # null is what transformers takes for false
        raise CheckpointError(f"{checkpoint.folder}: a processor has do_resize false, supported is true only")
    rescale = default.rescale if file.get("rescale_factor") is None else float(file["rescale_factor"])
    mean = file.get("image_mean") or default.image_mean
    std = file.get("image_std") or default.image_std
    resample = file.get("resample")
    return {
        "rescale": rescale if rescaled else 1.0,
        "image_mean": _triple(mean) if normalised else (0.0, 0.0, 0.0),
        "image_std": _triple(std) if normalised else (1.0, 1.0, 1.0),
        "resample": default.resample if resample is None else int(resample),
    }


def _content(checkpoint: Checkpoint, key: str, name: str) -> Mapping[str, Any]:
    """The part of the common file, else the file of its own."""
    place = f"{BOTH}: {key}"
    content = checkpoint.read_optional_json(BOTH).get(key)
    if not content:
        place = name
        content = checkpoint.read_optional_json(name)
    if not isinstance(content, Mapping):
        raise _wrong(checkpoint, place, "its content", content, "an object")
    _check(checkpoint, place, content)
    sides = {key: content.get(key) for key in SIZES}  # a bare number is how CLIP's first files say it
    plain = {
        "size": {"shortest_edge": sides["size"]},
        "crop_size": dict.fromkeys(("height", "width"), sides["crop_size"]),
    }
    return dict(content) | {key: plain[key] for key, side in sides.items() if isinstance(side, int)}


def _check(checkpoint: Checkpoint, place: str, content: Mapping[str, Any]) -> None:
    """Refuse values of a wrong type; null is as good as absent."""
    for key, value in content.items():
        if value is None:
            continue
        if key in COUNTS and not _whole(value):
            raise _wrong(checkpoint, place, key, value, "a whole number from 0 up")
        if key in NUMBERS and not (_number(value) and value > 0):
            raise _wrong(checkpoint, place, key, value, "a number above 0")
        if key in FLAGS and not isinstance(value, bool):
            raise _wrong(checkpoint, place, key, value, "true or false")
        if key == "resample" and not (_whole(value) and value in RESAMPLES):
            raise _wrong(checkpoint, place, key, value, f"0 to {RESAMPLES[-1]}, Pillow's filters")
        if key in LEVELS:
            numbers = value if isinstance(value, list) else [value]
            if len(numbers) not in (1, 3) or not all(map(_number, numbers)) or (key.endswith("std") and 0 in numbers):
                raise _wrong(checkpoint, place, key, value, "three numbers, those of a std not 0")
        if key in SIZES:
            sides = list(value.values()) if isinstance(value, Mapping) else [value]
            if not all(_whole(side) for side in sides if side is not None):
                raise _wrong(checkpoint, place, key, value, "a whole number or an object with such")


def _wrong(checkpoint: Checkpoint, place: str, key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint.folder}/{place} has {key} {value!r:.80}, expected {expected}: correct it")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _triple(value: Any) -> tuple[float, ...]:
    numbers = [value] if isinstance(value, (int, float)) else list(value)
    return tuple(map(float, numbers * 3 if len(numbers) == 1 else numbers))
