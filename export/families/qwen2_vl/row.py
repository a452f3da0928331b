"""Qwen2-VL: its row of the table and what its checkpoints say about frames."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from framefusion.export.families.family import Family, LlmKeys
from framefusion.export.families.qwen2_vl import reading
from framefusion.export.families.reading.formats import ConfigFormat, LlmClass
from framefusion.export.families.reading.language import ATTENTION
from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint


def preprocessing(checkpoint: Checkpoint) -> QwenVLPreprocessing:
    """Patch geometry, pixel limits and normalisation, as far as the checkpoint says them."""
    rule = reading.preprocessing_of(checkpoint, QwenVLPreprocessing())
    return replace(rule, total_pixels=reading.film_pixels(checkpoint, rule), **reading.image_limits(checkpoint))


LLM_CLASS = LlmClass(ATTENTION, mrope=(16, 24, 24), window="use_sliding_window")
ROW = Family(
    name="qwen2_vl",
    architectures=("Qwen2VLForConditionalGeneration",),
    model_types=("qwen2_vl",),
    checkpoints=("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-72B-Instruct"),
    llm=LlmKeys(
        prefixes=("model.language_model.", "model.", "language_model.model."),
        head_keys=("lm_head.weight", "language_model.lm_head.weight"),
    ),
    config=ConfigFormat(
        llm_type="qwen2_vl_text",
        vision_type="qwen2_vl_vision",
        llm_class=LLM_CLASS,
        pad_ids=reading.PAD_IDS,
        tied="either",
        typed_as_whole=True,
        default_tower=True,
    ),
    tower="framefusion.export.families.qwen2_vl.weights:tower",
    preprocessing=preprocessing,
    sampling=lambda checkpoint: reading.sampling_of(checkpoint, FrameSampling("qwen2_vl")),
    template=reading.template_of,
    importance_rows=4,
    similarity_lower_bound=0.5,
    verified="transformers' Qwen2VLForConditionalGeneration at tiny sizes; the reference code's recordings",
    reference="Qwen2VLForConditionalGeneration",
    reference_logits="framefusion.export.families.qwen2_vl.reference:reference_logits",
)
