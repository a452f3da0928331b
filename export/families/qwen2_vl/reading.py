"""What the checkpoints of all Qwen-VL releases say about frames, images and prompts. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.text.chat import read_template
from framefusion.export.families.family import CHATML
from framefusion.export.families.reading.configs import with_pads
from framefusion.export.families.reading.processors import levels, processor, require_processor, video_processor
from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.text.prompt import PromptTemplate

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint

PAD_IDS = {"image_token_id": 151655, "video_token_id": 151656}
PADS = {"<|video_pad|>": "video_token_id", "<|image_pad|>": "image_token_id"}
PLACEHOLDERS = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("video", "image")}
GEOMETRY = ("patch_size", "merge_size", "temporal_patch_size")
"""Sizes that Qwen-VL's processors have and that its tower has too."""
QwenVL = TypeVar("QwenVL", bound=QwenVLPreprocessing)


def preprocessing_of(checkpoint: Checkpoint, default: QwenVL) -> QwenVL:
    """Patch geometry, pixel limits and normalisation, as far as the checkpoint's processors say them.

    The pixel limits are the video processor's own: those of the image processor are for single images (`image_limits`).

    Raises:
        CheckpointError: there is no processor's file, or the two processors differ where one tower serves both.
    """
    # 1. The geometry, in which both processors must agree.
    require_processor(checkpoint)
    still = processor(checkpoint, "image")
    video = video_processor(checkpoint)
    for key in GEOMETRY:
        sizes = [file[key] for file in (still, video) if file.get(key)]
        if len(set(sizes)) > 1:
            raise CheckpointError(
                f"{checkpoint.folder}: the image and the video processor have different {key}, "
                f"{' and '.join(map(str, sizes))}: one tower serves both"
            )
    both = {**still, **video}
    fields: dict[str, Any] = {name: int(both[name]) for name in GEOMETRY if both.get(name)}
    # 2. The limits of a frame.
    low, high = pixel_limits(video)
    fields["min_pixels"] = low or default.min_pixels
    fields["max_pixels"] = high or default.max_pixels
    # 3. How pixels become numbers.
    return replace(default, **fields, **levels(checkpoint, default, still, video or still))


CONTEXT_TOKENS = 128_000
SHARE_OF_FILM = 0.9
"""qwen-vl-utils' MODEL_SEQ_LEN, and the share of it that the frames of a film may fill."""


def film_pixels(checkpoint: Checkpoint, preprocessing: QwenVLPreprocessing) -> float | None:
    """The pixels that all frames of a film share, as qwen-vl-utils and `cap_pixels_per_frame` of transformers have it.

    None where the checkpoint's video processor switches that off by name.
    """
    video = video_processor(checkpoint)
    if video.get("cap_pixels_per_frame") is False:
        return None
    return int(video.get("max_video_tokens") or CONTEXT_TOKENS) * preprocessing.factor**2 * SHARE_OF_FILM


def pixel_limits(file: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The smallest and largest number of pixels that a processor's file says; it has two ways to say them."""
    size = file.get("size") or {}
    low = file.get("min_pixels") or size.get("shortest_edge")
    high = file.get("max_pixels") or size.get("longest_edge")
    return int(low) if low else None, int(high) if high else None


IMAGE_PIXELS = 56 * 56, 1280 * 28 * 28
"""Of transformers' Qwen2VLImageProcessor, which Qwen2.5-VL and Qwen3-VL have too."""


def image_limits(checkpoint: Checkpoint) -> dict[str, Any]:
    """Pixel limits of single images, as fields of the rule; what a file leaves out is as in the processor's class."""
    low, high = pixel_limits(processor(checkpoint, "image"))
    return {"image_min_pixels": low or IMAGE_PIXELS[0], "image_max_pixels": high or IMAGE_PIXELS[1]}


def sampling_of(checkpoint: Checkpoint, default: FrameSampling) -> FrameSampling:
    """Frame sampling, as far as the video processor says it."""
    video = video_processor(checkpoint)
    return replace(
        default,
        fps=float(video.get("fps") or default.fps),
        min_frames=int(video.get("min_frames") or default.min_frames),
        max_frames=int(video.get("max_frames") or default.max_frames),
    )


def template_of(checkpoint: Checkpoint, fallback: PromptTemplate = CHATML) -> PromptTemplate:
    """The chat layout of a Qwen-VL checkpoint, with the ids that config.json says the pad tokens have."""
    return with_pads(checkpoint, read_template(checkpoint, fallback, PLACEHOLDERS), PADS)
