"""Qwen2.5-VL: its row of the table and what its checkpoints say about frames."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from framefusion.export.families.family import Family, LlmKeys
from framefusion.export.families.qwen2_vl import reading
from framefusion.export.families.qwen2_vl.row import LLM_CLASS
from framefusion.export.families.reading.configs import required, vision_config
from framefusion.export.families.reading.formats import ConfigFormat
from framefusion.runtime.families.qwen2_5_vl import Qwen25VLPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint


def preprocessing(checkpoint: Checkpoint) -> Qwen25VLPreprocessing:
    """Patch geometry, pixel limits, normalisation and the pace of temporal positions, as the checkpoint says them."""
    vision = vision_config(checkpoint)
    pace = float(required(vision, "tokens_per_second", checkpoint))
    rule = reading.preprocessing_of(checkpoint, Qwen25VLPreprocessing(tokens_per_second=pace))
    return replace(rule, total_pixels=reading.film_pixels(checkpoint, rule), **reading.image_limits(checkpoint))


ROW = Family(
    name="qwen2_5_vl",
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    model_types=("qwen2_5_vl",),
    checkpoints=tuple(f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B", "32B", "72B")),
    llm=LlmKeys(
        prefixes=("model.language_model.", "model.", "language_model.model."),
        head_keys=("lm_head.weight", "language_model.lm_head.weight"),
    ),
    config=ConfigFormat(
        llm_type="qwen2_5_vl_text",
        vision_type="qwen2_5_vl_vision",
        llm_class=LLM_CLASS,
        pad_ids=reading.PAD_IDS,
        tied="either",
        typed_as_whole=True,
        default_tower=True,
    ),
    tower="framefusion.export.families.qwen2_5_vl.weights:tower",
    preprocessing=preprocessing,
    sampling=lambda checkpoint: reading.sampling_of(checkpoint, FrameSampling("qwen2_vl")),
    template=reading.template_of,
    importance_rows=4,  # the reference has no such model: as for Qwen2-VL, whose prompts end the same way
    similarity_lower_bound=0.5,
    verified="transformers' Qwen2_5_VLForConditionalGeneration at tiny sizes",
    reference="Qwen2_5_VLForConditionalGeneration",
    reference_logits="framefusion.export.families.qwen2_5_vl.reference:reference_logits",
)
