"""LLaVA-OneVision and LLaVA-NeXT-Video in Hugging Face's format: their rows, and what a checkpoint says of frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.text import chat
from framefusion.export.families.family import CHATML, Family, LlmKeys
from framefusion.export.families.reading import configs as reading
from framefusion.export.families.reading.configs import prefix_of, required
from framefusion.export.families.reading.formats import ConfigFormat
from framefusion.export.families.reading.processors import levels, normalisation, processor, require_processor
from framefusion.runtime.families.llava import LlavaPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.text.prompt import PromptTemplate

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint

TOWER_PREFIXES = tuple(
    f"{outer}vision_tower.{inner}" for inner in ("vision_model.", "") for outer in ("model.", "")
)  # old hub files have the inner name, files of transformers 5 have not
LLM = LlmKeys(
    prefixes=("model.language_model.", "language_model.model."),
    head_keys=("lm_head.weight", "language_model.lm_head.weight"),
)
PLACEHOLDERS = {"video": "<video>", "image": "<image>"}
ONEVISION_TILINGS = tuple((384 * tall, 384 * wide) for tall in range(1, 7) for wide in range(1, 7))
NEXT_TILINGS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""`image_grid_pinpoints` of a config.json that leaves its class's default out."""


class Vision(NamedTuple):
    """The vision tower as config.json describes it."""

    prefix: str
    config: Mapping[str, Any]
    depth: int  # blocks that are run


def vision(checkpoint: Checkpoint) -> Vision:
    """The tower's keys and configuration, and how many of its blocks the chosen layer needs.

    Raises:
        CheckpointError: no tower under any known name, or features of another kind.
    """
    prefix = prefix_of(checkpoint, "embeddings.patch_embedding.weight", TOWER_PREFIXES)
    config = reading.vision_config(checkpoint)
    layer = checkpoint.config.get("vision_feature_layer")
    depth = int(required(config, "num_hidden_layers", checkpoint))
    if layer is None:
        layer = -2 if checkpoint.config.get("model_type") == "llava_next_video" else -1
    if type(layer) is not int or not -depth <= layer < depth + 1:
        raise CheckpointError(f"vision_feature_layer {layer} is not one layer of the {depth} that the tower has")
    return Vision(prefix, config, layer if layer >= 0 else depth + 1 + layer)


def onevision_preprocessing(checkpoint: Checkpoint) -> LlavaPreprocessing:
    """One newline ends a video; an image that is alone is cut into tiles, up to as many as config.json says.

    Raises:
        CheckpointError: vision_aspect_ratio is of another form, or a processor's file does what the rule cannot.
    """
    aspect = str(checkpoint.config.get("vision_aspect_ratio") or "anyres_max_9")
    number = aspect.removeprefix("anyres_max_")
    if not number.isdigit():
        raise CheckpointError(f"config.json has vision_aspect_ratio {aspect!r}, supported is anyres_max_ and a number")
    return _preprocessing(
        checkpoint,
        ONEVISION_TILINGS,
        mm_spatial_pool_mode="bilinear",
        mm_newline_position="one_token",
        max_tiles=int(number),
        tile_each=False,
    )


def next_preprocessing(checkpoint: Checkpoint) -> LlavaPreprocessing:
    """No newline in a video; every image is cut into tiles.

    Raises:
        CheckpointError: frames are pooled in another way, or a processor's file does what the rule cannot.
    """
    config = checkpoint.config
    mode = config.get("spatial_pool_mode", "average")
    stride = config.get("spatial_pool_stride", 2)
    if (mode, stride) != ("average", 2):
        raise CheckpointError(
            f"config.json pools by {mode!r} with stride {stride}, supported is 'average' with stride 2"
        )
    return _preprocessing(checkpoint, NEXT_TILINGS, mm_spatial_pool_mode="average", mm_newline_position="no_token")


def _preprocessing(checkpoint: Checkpoint, default: tuple[tuple[int, ...], ...], **rule: Any) -> LlavaPreprocessing:
    """The rule with the numbers of the processors' files."""
    config = vision(checkpoint).config
    size = reading.square(config, "image_size", checkpoint)
    require_processor(checkpoint)
    still = processor(checkpoint, "image")
    moving = processor(checkpoint, "video")
    for kind, file in (("image", still), ("video", moving)):
        sides = set((file.get("size") or {}).values()) | set((file.get("crop_size") or {}).values())
        if sides != {size}:
            raise CheckpointError(
                f"the {kind} processor makes pictures of {sorted(sides)}, the tower takes {size} pixels"
            )
    if normalisation(still) != normalisation(moving) or not normalisation(still):
        raise CheckpointError("image_mean and image_std must be in the processor's files, the same for image and video")
    crop = "shortest_edge" in (moving.get("size") or {})
    if crop and moving.get("do_center_crop") is False:
        raise CheckpointError(
            f"{checkpoint.folder}: the video processor has do_center_crop false and a size by its shortest_edge, "
            "whose frames are no squares: supported is true only"
        )
    pixels = levels(checkpoint, LlavaPreprocessing(image_size=size), still, moving)
    if not any(pixels["image_mean"]) and not rule.get("tile_each", True) and still.get("do_normalize") is False:
        raise CheckpointError(
            f"{checkpoint.folder}: the image processor has do_normalize false and pads images with the mean, supported "
            "is true only"
        )
    pinpoints = checkpoint.config.get("image_grid_pinpoints") or still.get("image_grid_pinpoints") or default
    if isinstance(pinpoints, str):
        raise CheckpointError(f"image_grid_pinpoints {pinpoints!r:.60} is text, a list of [height, width] was expected")
    tilings = tuple((int(tall), int(wide)) for tall, wide in pinpoints)
    if any(side % size or not side for side in sum(tilings, ())):
        raise CheckpointError(f"image_grid_pinpoints {tilings} are not all in whole tiles of {size} pixels")
    rule |= pixels
    return LlavaPreprocessing(
        patch_size=reading.square(config, "patch_size", checkpoint),
        image_size=size,
        crop=crop,
        tilings=tilings,
        unpad_digits=7,
        video_pad=PLACEHOLDERS["video"],
        image_pad=PLACEHOLDERS["image"],
        **rule,
    )


def sampling(checkpoint: Checkpoint, max_frames: int) -> FrameSampling:
    """As many frames as the video processor says, else `max_frames`, evenly spread."""
    file = processor(checkpoint, "video")
    by_rate = file.get("num_frames") is None and file.get("fps") is not None
    return FrameSampling(
        "uniform",
        fps=float(file.get("fps") or 1.0),
        min_frames=1,
        max_frames=int(file.get("num_frames") or max_frames),
        frame_factor=1,
        force=not by_rate,
    )


def template(checkpoint: Checkpoint) -> PromptTemplate:
    """The checkpoint's own chat template; ChatML with visuals first where it brings none.

    Raises:
        CheckpointError: it brings none, and its LLM does not speak ChatML.
    """
    source = chat.find_template(checkpoint)
    placeholders = PLACEHOLDERS
    if source is None and reading.text_config(checkpoint).get("model_type") != "qwen2":
        raise CheckpointError(f"{checkpoint.folder} has no chat template: add chat_template.jinja from the hub")
    if source is not None and "video" not in source:  # of the time before videos: they stand where images do
        source = source.replace("'equalto', 'image'", "'in', ['image', 'video']")
        placeholders = dict.fromkeys(PLACEHOLDERS, PLACEHOLDERS["image"])
    layout = PromptTemplate(CHATML.turns, CHATML.generation_prefix, after_visual="\n", visuals_first=True)
    layout = reading.with_begin(checkpoint, chat.read_template(checkpoint, layout, placeholders, source))
    keys = {token: _index_key(checkpoint, kind) for kind, token in PLACEHOLDERS.items()}
    return reading.with_pads(checkpoint, layout, keys)


def _index_key(checkpoint: Checkpoint, kind: str) -> str:
    """transformers 5 may write image_token_id for what used to be image_token_index."""
    return f"{kind}_token_id" if f"{kind}_token_id" in checkpoint.config else f"{kind}_token_index"


ONEVISION = Family(
    name="llava_onevision",
    architectures=("LlavaOnevisionForConditionalGeneration",),
    model_types=("llava_onevision",),
    checkpoints=(
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava-hf/llava-onevision-qwen2-72b-ov-hf",
    ),
    llm=LLM,
    config=ConfigFormat(
        llm_type="qwen2",
        vision_type="siglip_vision_model",
        pad_ids={"image_token_index": 151646, "video_token_index": 151647},
        tied="either",
    ),
    tower="framefusion.export.families.llava.weights:onevision_tower",
    preprocessing=onevision_preprocessing,
    sampling=lambda checkpoint: sampling(checkpoint, 32),
    template=template,
    importance_rows=1,
    similarity_lower_bound=0.6,
    verified="transformers' LlavaOnevisionForConditionalGeneration at tiny sizes",
    reference="LlavaOnevisionForConditionalGeneration",
    reference_logits="framefusion.export.families.llava.reference:hf_logits",
)
NEXT_VIDEO = Family(
    name="llava_next_video",
    architectures=("LlavaNextVideoForConditionalGeneration",),
    model_types=("llava_next_video",),
    checkpoints=(
        "llava-hf/LLaVA-NeXT-Video-7B-hf",
        "llava-hf/LLaVA-NeXT-Video-7B-DPO-hf",
        "llava-hf/LLaVA-NeXT-Video-7B-32K-hf",
        "llava-hf/LLaVA-NeXT-Video-34B-hf",
    ),
    llm=LLM,
    config=ConfigFormat(
        llm_type="llama",
        vision_type="clip_vision_model",
        pad_ids={"image_token_index": 32001, "video_token_index": 32000},
        tied="either",
    ),
    tower="framefusion.export.families.llava.weights:next_tower",
    preprocessing=next_preprocessing,
    sampling=lambda checkpoint: sampling(checkpoint, 8),
    template=template,
    importance_rows=1,
    similarity_lower_bound=0.6,
    verified="transformers' LlavaNextVideoForConditionalGeneration at tiny sizes",
    reference="LlavaNextVideoForConditionalGeneration",
    reference_logits="framefusion.export.families.llava.reference:hf_logits",
)
