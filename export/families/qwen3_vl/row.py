"""Qwen3-VL: its row of the table and what its checkpoints say about frames."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from framefusion.export.families.family import CHATML, Family, LlmKeys
from framefusion.export.families.qwen2_vl import reading
from framefusion.export.families.reading.formats import ConfigFormat, LlmClass
from framefusion.export.families.reading.language import ATTENTION, OUT
from framefusion.export.families.reading.processors import video_processor
from framefusion.runtime.families.qwen3_vl import Qwen3VLPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.runtime.text.prompt import PromptTemplate

FRAME_TOKENS = 768  # of the processor's class, where cap_pixels_per_frame is on and the file names no number


def preprocessing(checkpoint: Checkpoint) -> Qwen3VLPreprocessing:
    """Patch geometry, pixel limits and normalisation, as far as the checkpoint's processors say them."""
    video = video_processor(checkpoint)
    capped = int(video.get("max_video_tokens") or FRAME_TOKENS) if video.get("cap_pixels_per_frame") else None
    rule = reading.preprocessing_of(checkpoint, Qwen3VLPreprocessing(max_frame_tokens=capped))
    return replace(rule, **reading.image_limits(checkpoint))


def template(checkpoint: Checkpoint) -> PromptTemplate:
    """The checkpoint's own layout; without one, ChatML with no system turn unless one is given."""
    return reading.template_of(checkpoint, replace(CHATML, default_system=""))


LLM_CLASS = LlmClass(
    switches={"attention_bias": (*ATTENTION, *OUT)}, qk_norm=True, mrope=(24, 20, 20), interleaved=True
)
ROW = Family(
    name="qwen3_vl",
    architectures=("Qwen3VLForConditionalGeneration",),
    model_types=("qwen3_vl",),
    checkpoints=tuple(f"Qwen/Qwen3-VL-{size}-Instruct" for size in ("2B", "4B", "8B", "32B")),
    llm=LlmKeys(prefixes=("model.language_model.", "language_model.model."), head_keys=("lm_head.weight",)),
    config=ConfigFormat(
        llm_type="qwen3_vl_text",
        vision_type="qwen3_vl_vision",
        llm_class=LLM_CLASS,
        pad_ids=reading.PAD_IDS,
        tied="top",
        typed_as_whole=True,
        default_tower=True,
    ),
    tower="framefusion.export.families.qwen3_vl.weights:tower",
    preprocessing=preprocessing,
    sampling=lambda checkpoint: reading.sampling_of(checkpoint, FrameSampling("qwen3_vl")),
    template=template,
    importance_rows=4,  # the reference has no such model: as for Qwen2-VL, whose prompts end the same way
    similarity_lower_bound=0.5,
    verified="transformers' Qwen3VLForConditionalGeneration at tiny sizes",
    reference="Qwen3VLForConditionalGeneration",
    reference_logits="framefusion.export.families.qwen3_vl.reference:reference_logits",
)
