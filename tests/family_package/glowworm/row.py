"""What a build must know: whose checkpoints these are, and what they say. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from framefusion.export.checkpoints.text.chat import read_template
from framefusion.export.families.family import CHATML, Family, LlmKeys
from framefusion.export.families.reading.configs import square, vision_config
from framefusion.runtime.media.frame_sampling import FrameSampling

from .preprocessing import GlowwormPreprocessing

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint


def preprocessing(checkpoint: Checkpoint) -> GlowwormPreprocessing:
    """Pictures of the tower's size."""
    vision = vision_config(checkpoint)
    image_size, patch_size = (square(vision, key, checkpoint) for key in ("image_size", "patch_size"))
    return GlowwormPreprocessing(tile_size=image_size, patch_size=patch_size)


ROW = Family(
    name="glowworm",
    architectures=("GlowwormForConditionalGeneration",),
    model_types=("glowworm",),
    checkpoints=(),
    llm=LlmKeys(prefixes=("language_model.model.",), head_keys=("language_model.lm_head.weight",)),
    tower="glowworm.tower:tower",
    preprocessing=preprocessing,
    sampling=lambda checkpoint: FrameSampling("glowworm", fps=2.0, min_frames=1, max_frames=4, frame_factor=1),
    template=lambda checkpoint: read_template(checkpoint, CHATML),
    importance_rows=1,
    similarity_lower_bound=0.6,
    verified="SiglipVisionModel and Qwen2ForCausalLM at tiny sizes",
    reference="SiglipVisionModel and Qwen2ForCausalLM",
    reference_logits="glowworm.tower:reference_logits",
)
