"""NVILA as VILA's authors release it: the row, and what such a checkpoint says about frames.

The repositories have a folder for each part (llm/, vision_tower/, mm_projector/), ports have all tensors in one file,
under the same names. What no file of a checkpoint says is VILA's own default, and named so here. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.class_defaults import completed
from framefusion.export.checkpoints.text.chat import read_template
from framefusion.export.checkpoints.text.tokenizer_file import listed_tokens
from framefusion.export.families.family import CHATML, Family, LlmKeys
from framefusion.export.families.reading.configs import required, square, text_config
from framefusion.export.families.reading.formats import ConfigFormat
from framefusion.export.families.reading.processors import levels, processor
from framefusion.runtime.families.nvila import ASPECTS, NvilaPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.preprocess import BICUBIC
from framefusion.runtime.text.prompt import PromptTemplate

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint

PROJECTORS: Mapping[str, int] = MappingProxyType(
    {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}
)
"""mm_projector_type -> side of the blocks of patches that it joins."""
EXPECTED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "mm_vision_select_feature": ("cls_patch",),  # all tokens: SigLIP has no class token to leave out
        "s2": (False, None),
        "mm_use_im_start_end": (False, None),
    }
)
"""Values of config.json that the graph and the prompt are made for; the released checkpoints have no others."""
QWEN2_LAYOUT = replace(CHATML, default_system="You are a helpful assistant", strip=True)
"""The chat layout that VILA calls qwen2, whose system ends without a full stop. VILA strips what is said in a turn."""
LLM = "qwen2"
MOST_POOLED = 64  # frames, lines or columns that become one
MIN_TILES = 1
MAX_TILES = 12
"""VILA's defaults."""


class Encoder(NamedTuple):
    """What VILA does to the projector's rows of a picture."""

    pool_sizes: tuple[int, ...]  # frames, lines and columns that are averaged to one
    end: str  # token behind each picture, "" for none


def vision_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The vision tower's configuration, and the refusal of a model that this family is not.

    Raises:
        CheckpointError: config.json has no vision tower, or values that no released checkpoint has.
    """
    for key, values in EXPECTED.items():
        if checkpoint.config.get(key) not in values:
            raise _unexpected(checkpoint, key, " or ".join(map(repr, values)))
    vision = checkpoint.part_config("vision_tower") or required(checkpoint.config, "vision_config", checkpoint)
    if not isinstance(vision, dict):
        raise _unexpected(checkpoint, "vision_config", "an object")
    vision = completed(vision)
    resolution = checkpoint.config.get("vision_resolution") or -1
    if resolution not in (-1, vision.get("image_size")):
        raise _unexpected(checkpoint, "vision_resolution", f"-1 or the tower's image_size {vision.get('image_size')}")
    return vision


def merge_size(checkpoint: Checkpoint) -> int:
    """Side of the blocks of patches that the projector joins.

    Raises:
        CheckpointError: mm_projector_type is absent or unknown.
    """
    key = "mm_projector_type"
    projector = checkpoint.part_config("mm_projector").get(key) or required(checkpoint.config, key, checkpoint)
    if projector not in PROJECTORS:
        raise CheckpointError(f"{checkpoint.folder} has {key} {projector!r}, supported are {', '.join(PROJECTORS)}")
    return PROJECTORS[projector]


def scales(checkpoint: Checkpoint, image_size: int) -> tuple[int, ...]:
    """Tiles along one side at each of the scales whose features the projector takes side by side, coarsest first.

    VILA's dynamic_s2 repeats the features of a picture that has one scale only. Without it there is one.

    Raises:
        CheckpointError: s2_scales are no multiples of the picture's side.
    """
    if not checkpoint.config.get("dynamic_s2"):
        return (1,)
    listed = required(checkpoint.config, "s2_scales", checkpoint)
    sizes = sorted(int(size) for size in (listed.split(",") if isinstance(listed, str) else listed))
    if sizes[0] != image_size or any(size % image_size for size in sizes):
        raise _unexpected(checkpoint, "s2_scales", f"whole multiples of {image_size}, and that number itself")
    return tuple(size // image_size for size in sizes)


def encoder(checkpoint: Checkpoint, kind: str) -> Encoder:
    """The encoder of videos or images: an object, the same as JSON text, or the name of a class.

    Raises:
        CheckpointError: it is none that is known, or pools in more than one way.
    """
    key = f"{kind}_encoder"
    basic = f"Basic{kind.capitalize()}Encoder"  # the basic one is VILA's default
    description = _object(checkpoint, key, checkpoint.config.get(key) or basic)
    name = str(description.get("_target_")).rpartition(".")[2]
    known = (basic, "TSPVideoEncoder") if kind == "video" else (basic,)
    if name not in known:
        raise _unexpected(checkpoint, key, " or ".join(known))
    for other in ("start_tokens", "sep_tokens"):
        if description.get(other) is not None:
            raise CheckpointError(f"{checkpoint.folder}/config.json has {key} with {other}, which is not supported")
    sizes = (
        description.get("pool_sizes", [[1, 1, 1]]) if name == basic else required(description, "pool_sizes", checkpoint)
    )
    whole = isinstance(sizes, list) and len(sizes) == 1 and isinstance(sizes[0], (list, tuple)) and len(sizes[0]) == 3
    if not whole or any(type(size) is not int or not 1 <= size <= MOST_POOLED for size in sizes[0]):
        raise CheckpointError(
            f"{checkpoint.folder}/config.json has {key} with pool_sizes {sizes!r:.60}, supported is one entry of 3 "
            f"numbers of 1 to {MOST_POOLED}"
        )
    end = description.get("end_tokens", "\n") or ""
    if not isinstance(end, str):
        raise CheckpointError(
            f"{checkpoint.folder}/config.json has {key} with end_tokens {end!r:.60}, which is no text"
        )
    return Encoder(tuple(sizes[0]), end)


def _object(checkpoint: Checkpoint, key: str, value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("{") else {"_target_": value}
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.folder}/config.json has {key} {value!r}, no JSON ({error})") from None
    if not isinstance(value, dict):
        raise _unexpected(checkpoint, key, "an object, JSON text or the name of a class")
    return value


def preprocessing(checkpoint: Checkpoint) -> NvilaPreprocessing:
    """Square pictures of the tower's size, blocks, pooling and tiles as the configuration says.

    Raises:
        CheckpointError: a value is absent, or one that the graph and the rule are not made for.
    """
    vision = vision_config(checkpoint)
    video = encoder(checkpoint, "video")
    image = encoder(checkpoint, "image")
    size = square(vision, "image_size", checkpoint)
    patch = square(vision, "patch_size", checkpoint)
    file = processor(checkpoint, "image")
    for side in (file.get("size") or {}).values():
        if side != size:
            raise CheckpointError(
                f"{checkpoint.folder}: preprocessor_config.json makes pictures of {side} pixels, the tower takes {size}"
            )
    aspect = required(checkpoint.config, "image_aspect_ratio", checkpoint)
    if aspect not in ASPECTS:
        raise _unexpected(checkpoint, "image_aspect_ratio", ", ".join(ASPECTS))
    if aspect == "dynamic_s2":
        _check_scales(checkpoint, video)
    default = NvilaPreprocessing(patch_size=patch, image_size=size, merge_size=merge_size(checkpoint))
    return NvilaPreprocessing(
        patch_size=patch,
        image_size=size,
        merge_size=merge_size(checkpoint),
        pool_sizes=video.pool_sizes,
        image_aspect_ratio=aspect,
        min_tiles=int(checkpoint.config.get("min_tiles") or MIN_TILES),
        max_tiles=int(checkpoint.config.get("max_tiles") or MAX_TILES),
        scales=scales(checkpoint, size),
        video_end=video.end,
        image_end=image.end,
        # "resize" leaves the resizing to Pillow's default, the others to the image processor
        **(levels(checkpoint, default, file) | ({"resample": BICUBIC} if aspect == "resize" else {})),
    )


def _check_scales(checkpoint: Checkpoint, video: Encoder) -> None:
    """Refuse what the tower for images of several scales does not do."""
    if not checkpoint.config.get("dynamic_s2"):
        raise _unexpected(checkpoint, "dynamic_s2", "true, as image_aspect_ratio is dynamic_s2")
    count = len(required(checkpoint.config, "s2_scales", checkpoint).split(","))
    if checkpoint.config.get("s2_resize_output_to_scale_idx") not in (-1, count - 1):
        raise _unexpected(checkpoint, "s2_resize_output_to_scale_idx", "-1: the finest scale")
    if video.pool_sizes != (1, 1, 1):
        raise _unexpected(
            checkpoint,
            "image_aspect_ratio",
            "resize where video_encoder pools: change it for single images in one tile",
        )


def sampling(checkpoint: Checkpoint) -> FrameSampling:
    """`num_video_frames` evenly spread frames, or `fps` a second where config.json has a rate, at most as many.

    Raises:
        CheckpointError: num_video_frames is absent, or does not fill groups of frames.
    """
    frames = int(required(checkpoint.config, "num_video_frames", checkpoint))
    fps = checkpoint.config.get("fps") or 0
    factor = encoder(checkpoint, "video").pool_sizes[0]
    if frames % factor:
        raise _unexpected(checkpoint, "num_video_frames", f"a multiple of {factor}, as the video_encoder pools")
    sampled = FrameSampling("nvila", min_frames=factor, max_frames=frames, frame_factor=factor, force=True)
    return sampled if fps <= 0 else replace(sampled, fps=float(fps), force=False)


def template(checkpoint: Checkpoint) -> PromptTemplate:
    """The tokenizer's chat layout, or the one that config.json names: a file of the checkpoint, or VILA's qwen2.

    Raises:
        CheckpointError: the layout is known by neither name nor file, or the LLM is another one.
    """
    check_time_tokens(checkpoint)
    llm = text_config(checkpoint).get("model_type", LLM)
    if llm != LLM:  # VILA knows the layouts of its earlier releases by name, no file tells them
        raise CheckpointError(
            f"{checkpoint.folder}: its LLM has model_type {llm!r}, NVILA's is {LLM!r}: an earlier VILA?"
        )
    name = checkpoint.config.get("chat_template")
    if name is None:
        return read_template(checkpoint, QWEN2_LAYOUT)
    path = checkpoint.find(f"{name}.jinja")
    if path is not None:  # VILA takes the indentation of these files out
        source = path.read_text(encoding="utf-8").replace("    ", "").replace("\n", "")
        return read_template(checkpoint, QWEN2_LAYOUT, source=source)
    if name != "qwen2":
        raise _unexpected(checkpoint, "chat_template", f"qwen2, or put {name}.jinja into the folder")
    return QWEN2_LAYOUT


def check_time_tokens(checkpoint: Checkpoint) -> None:
    """Refuse a tokenizer without the tokens for points in time that the model was trained to say.

    Raises:
        CheckpointError: config.json counts them and tokenizer.json has them not.
    """
    count = int(checkpoint.config.get("num_time_tokens") or 0)
    if not count:
        return
    form = required(checkpoint.config, "time_token_format", checkpoint)
    tokens = listed_tokens(checkpoint)
    for token in (form.replace("{t}", "0"), form.replace("{t}", str(count - 1))):
        if token not in tokens:
            raise CheckpointError(
                f"{checkpoint.folder}: config.json has num_time_tokens {count}, {token} is not in tokenizer.json: "
                "the tokenizer is of another model"
            )


def _unexpected(checkpoint: Checkpoint, key: str, supported: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.folder}/config.json has {key} {checkpoint.config.get(key)!r}, supported is {supported}"
    )


ROW = Family(
    name="nvila",
    architectures=("LlavaLlamaModel", "VILAForCausalLM"),
    model_types=("llava_llama", "vila"),
    checkpoints=(
        "Efficient-Large-Model/NVILA-Lite-2B",
        "Efficient-Large-Model/NVILA-8B-Video",
        "Efficient-Large-Model/NVILA-Lite-15B-Video",
        "Efficient-Large-Model/NVILA-8B",
    ),
    llm=LlmKeys(prefixes=("llm.model.",), head_keys=("llm.lm_head.weight",)),
    config=ConfigFormat(llm_key="llm_cfg", llm_type="qwen2", vision_type="siglip_vision_model"),
    tower="framefusion.export.families.nvila.weights:tower",
    preprocessing=preprocessing,
    sampling=sampling,
    template=template,
    importance_rows=1,
    similarity_lower_bound=0.7,
    verified="transformers' SiglipVisionModel and Qwen2ForCausalLM, torch's layers between them, at tiny sizes",
    terminators=("<|im_end|>",),
    reference="SiglipVisionModel and Qwen2ForCausalLM",
    reference_logits="framefusion.export.families.nvila.reference:reference_logits",
    stand_in="projector and pooling (the authors' steps, written here)",
)
