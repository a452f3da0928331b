"""MiniCPM-V 2.6: its row of the table and what its checkpoints say about pictures.

config.json and preprocessor_config.json tell the same facts twice; where both do, they must agree, as the released code
demands too. Facts that neither tells are not guessed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.text.chat import read_template
from framefusion.export.families.family import CHATML, Family, LlmKeys
from framefusion.export.families.reading.configs import check_tokens
from framefusion.export.families.reading.formats import ConfigFormat
from framefusion.runtime.families.minicpmv import MiniCpmVPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint

VERSION = "2.6"
TERMINATORS = ("<|im_end|>", "<|endoftext|>")
PROCESSOR = "preprocessor_config.json"
# field of the preprocessing -> key of preprocessor_config.json; what is absent there has the field's own default
TAGS = {
    "image_start": "im_start",
    "image_end": "im_end",
    "slice_start": "slice_start",
    "slice_end": "slice_end",
    "id_start": "im_id_start",
    "id_end": "im_id_end",
    "pad": "unk",
}
NORMALISATION = {"image_mean": "norm_mean", "image_std": "norm_std"}


def check_version(checkpoint: Checkpoint) -> None:
    """Refuse the other releases: they share the model_type and are other models.

    Raises:
        CheckpointError: `version` is absent or another one.
    """
    version = checkpoint.config.get("version")
    if str(version) != VERSION:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json has version {version!r}: of the MiniCPM-V checkpoints only version "
            f"{VERSION} is supported"
        )


def preprocessing(checkpoint: Checkpoint) -> MiniCpmVPreprocessing:
    """Slicing, tags and normalisation.

    Raises:
        CheckpointError: a fact is absent, the two files contradict each other, or slice_mode is off.
    """
    check_version(checkpoint)
    if not _stated(checkpoint, "slice_mode", "slice_mode"):
        raise CheckpointError(f"{checkpoint.folder} has slice_mode false: pictures that are not scaled are unsupported")
    processor = checkpoint.read_optional_json(PROCESSOR)
    tags = {field: str(processor[key]) for field, key in TAGS.items() if key in processor}
    numbers = {field: tuple(map(float, processor[key])) for field, key in NORMALISATION.items() if key in processor}
    result = MiniCpmVPreprocessing(
        patch_size=int(_stated(checkpoint, "patch_size", "vision_config.patch_size", "slice_config.patch_size")),
        query_num=int(_stated(checkpoint, "image_feature_size", "query_num")),
        scale_resolution=int(_stated(checkpoint, "scale_resolution", "slice_config.scale_resolution")),
        image_slices=int(_stated(checkpoint, "max_slice_nums", "slice_config.max_slice_nums")),
        use_image_id=bool(_stated(checkpoint, "use_image_id", "use_image_id")),
    )
    result = replace(result, **tags, **numbers)  # type: ignore[arg-type]
    check_tokens(checkpoint, [*(getattr(result, field) for field in TAGS), *TERMINATORS])
    return result


def _stated(checkpoint: Checkpoint, processor_key: str, *config_keys: str) -> Any:
    """What preprocessor_config.json and config.json say of one fact; a dot leads into a nested object."""
    places = [(PROCESSOR, checkpoint.read_optional_json(PROCESSOR), processor_key)]
    places += [("config.json", checkpoint.config, key) for key in config_keys]
    values = {f"{file}: {key}": _nested(content, key) for file, content, key in places}
    found = {place: value for place, value in values.items() if value is not None}
    if not found:
        raise CheckpointError(f"{checkpoint.folder} has none of {', '.join(values)}: the checkpoint is incomplete")
    first = next(iter(found.values()))
    if isinstance(first, (list, dict)):
        raise CheckpointError(f"{checkpoint.folder}: {next(iter(found))} is {first!r:.60}, one number was expected")
    if any(value != first for value in found.values()):
        said = ", ".join(f"{place} = {value}" for place, value in found.items())
        raise CheckpointError(f"{checkpoint.folder} contradicts itself: {said}; download it again")
    return first


def _nested(content: Any, key: str) -> Any:
    for name in key.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


ROW = Family(
    name="minicpmv",
    architectures=("MiniCPMV",),
    model_types=("minicpmv",),
    checkpoints=("openbmb/MiniCPM-V-2_6",),
    llm=LlmKeys(prefixes=("llm.model.",), head_keys=("llm.lm_head.weight",)),
    config=ConfigFormat(llm_key="", llm_type="qwen2", vision_type="siglip_vision_model"),
    tower="framefusion.export.families.minicpmv.weights:tower",
    preprocessing=preprocessing,
    # every second of film is shown, or 64 of the seconds; max_frames is MAX_NUM_FRAMES of the released example
    sampling=lambda _: FrameSampling("minicpmv", fps=1.0, min_frames=1, max_frames=64, frame_factor=1),
    template=lambda checkpoint: read_template(checkpoint, replace(CHATML, part_separator="\n")),
    importance_rows=1,
    similarity_lower_bound=0.7,
    terminators=TERMINATORS,
    verified="Idefics2VisionTransformer, torch.nn.MultiheadAttention and Qwen2ForCausalLM composed at tiny sizes",
    reference="Idefics2VisionTransformer and Qwen2ForCausalLM, with torch's MultiheadAttention between them",
    reference_logits="framefusion.export.families.minicpmv.reference:reference_logits",
    stand_in="resampler (the authors' steps around torch's MultiheadAttention)",
)
