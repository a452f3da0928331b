"""Qwen2-VL: its row of the table and what its checkpoints say about frames."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from framefusion.export.families.family import Family, LlmKeys
from framefusion.export.families.reading import configs as reading
from framefusion.runtime.families.qwen_vl import QwenVLPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint


def preprocessing(checkpoint: Checkpoint) -> QwenVLPreprocessing:
    """Patch geometry, pixel limits and normalisation, as far as the checkpoint tells them."""
    told = reading.told_by_processor(checkpoint, QwenVLPreprocessing())
    return replace(told, total_pixels=reading.film_pixels(checkpoint, told), **reading.image_limits(checkpoint))


ROW = Family(
    name="qwen2_vl",
    architectures=("Qwen2VLForConditionalGeneration",),
    model_types=("qwen2_vl",),
    checkpoints=("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-72B-Instruct"),
    llm=LlmKeys(
        prefixes=("model.language_model.", "model.", "language_model.model."),
        head_keys=("lm_head.weight", "language_model.lm_head.weight"),
    ),
    tower="framefusion.export.families.qwen2_vl.weights:tower",
    preprocessing=preprocessing,
    sampling=lambda checkpoint: reading.told_by_video_processor(checkpoint, FrameSampling("qwen2_vl")),
    template=reading.qwen_template,
    importance_rows=4,
    similarity_lower_bound=0.5,
    verified="transformers' Qwen2VLForConditionalGeneration at tiny sizes; the reference code's recordings",
    reference="Qwen2VLForConditionalGeneration",
    reference_logits="framefusion.export.families.qwen2_vl.weights:reference_logits",
)
