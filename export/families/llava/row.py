"""LLaVA-Video and LLaVA-OneVision in their authors' format: the row, and what a checkpoint says of frames.

config.json names the vision tower (`mm_vision_tower`) without describing it; the tower's weights are among the LLM's.
What neither tells is in `VISION_TOWERS`, or in the config.json of a folder that `mm_vision_tower` names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.class_defaults import completed
from framefusion.export.checkpoints.files import inner_name, present
from framefusion.export.families.family import CHATML, Family, LlmKeys
from framefusion.export.families.reading.configs import expect, given, required, square
from framefusion.export.families.reading.formats import ConfigFormat
from framefusion.runtime.families.llava import LlavaPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint

VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
MAX_FRAMES = 64
MAX_FRAMES_72B = 32
ONEVISION_FRAMES = 32
"""What LLaVA-Video-7B, LLaVA-Video-72B and LLaVA-OneVision were trained with; no file of a checkpoint says it.

`frames_upbound` of scripts/video/train/SO400M_Qwen2_7B_ov_to_video_am9.sh and ..._72B_..., and of
scripts/train/finetune_ov.sh of LLaVA-VL/LLaVA-NeXT."""
WIDE = 8192
"""Width of the 72B's LLM."""


class VisionTower(NamedTuple):
    """What no tensor's shape tells of a SigLIP tower."""

    num_layers: int  # of the released tower; LLaVA drops the last one
    num_heads: int
    image_size: int
    norm_eps: float = 1e-6


VISION_TOWERS: Mapping[str, VisionTower] = MappingProxyType({"siglip-so400m-patch14-384": VisionTower(27, 16, 384)})
EXPECTED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_layer": (-2,),
        "mm_vision_select_feature": ("patch",),
        "mm_patch_merge_type": ("spatial_unpad",),
        "mm_resampler_type": (None,),
        "mm_use_im_start_end": (False,),
        "add_faster_video": (False,),
    }
)
"""Values of config.json that this family's graph and prompt are made for; the released checkpoints have no others."""


def vision_tower(checkpoint: Checkpoint) -> VisionTower:
    """What the tower's name means.

    Raises:
        CheckpointError: nobody knows the name, or config.json describes another model.
    """
    config = checkpoint.config
    for key in ("mm_projector_type", "mm_patch_merge_type"):  # LLaVA's code has other defaults for these two
        required(config, key, checkpoint)
    expect(checkpoint, config, EXPECTED)
    name = str(required(config, "mm_vision_tower", checkpoint))
    if inner_name(name) and present(checkpoint.folder / name / "config.json"):
        return _described(checkpoint, name)
    known = VISION_TOWERS.get(PurePosixPath(name).name)
    if known is None:
        raise CheckpointError(
            f"mm_vision_tower {name!r} is not known, known are {', '.join(VISION_TOWERS)}: put the tower's own "
            f"config.json into a folder of {checkpoint.folder} and write that folder's name there"
        )
    return known


def _described(checkpoint: Checkpoint, name: str) -> VisionTower:
    content = checkpoint.read_config(checkpoint.folder / name)
    vision = completed(content.get("vision_config") or content)
    expect(checkpoint, vision, {"hidden_act": ("gelu_pytorch_tanh",), "num_channels": (3,)})
    return VisionTower(
        num_layers=int(required(vision, "num_hidden_layers", checkpoint)),
        num_heads=int(required(vision, "num_attention_heads", checkpoint)),
        image_size=square(vision, "image_size", checkpoint),
        norm_eps=float(given(vision, "layer_norm_eps", 1e-6)),
    )


def preprocessing(checkpoint: Checkpoint) -> LlavaPreprocessing:
    """Pictures of the tower's size, and pooling, newlines, tiles and times as config.json says."""
    config = checkpoint.config
    size = vision_tower(checkpoint).image_size
    aspect = str(config.get("image_aspect_ratio") or "square")
    tiled = re.fullmatch(r"anyres(?:_max_(\d+))?", aspect)
    force = bool(config.get("force_sample"))
    return LlavaPreprocessing(
        patch_size=checkpoint.shape(f"{VISION_PREFIX}embeddings.patch_embedding.weight")[-1],
        image_size=size,
        mm_spatial_pool_mode=_one_of(checkpoint, "mm_spatial_pool_mode", ("average", "bilinear")),
        mm_newline_position=_one_of(
            checkpoint, "mm_newline_position", ("one_token", "grid", "frame", "no_token"), "one_token"
        ),
        tilings=tilings(config.get("image_grid_pinpoints"), size) if tiled else (),
        max_tiles=int(tiled[1] or 0) if tiled else 0,
        tile_each=False,
        pad_square=aspect != "square",
        time_instruction=bool(config.get("add_time_instruction")),
        round_fps=not force,
    )


def _one_of(checkpoint: Checkpoint, key: str, known: tuple[str, ...], default: str | None = None) -> Any:
    value = checkpoint.config.get(key) or default
    if value not in known:
        raise CheckpointError(f"{checkpoint.folder}/config.json has {key} {value!r}, supported are {', '.join(known)}")
    return value


def tilings(pinpoints: Any, size: int) -> tuple[tuple[int, ...], ...]:
    """Sizes [height, width] in pixels of `image_grid_pinpoints`, which counts width first, in pixels or in tiles.

    Args:
        pinpoints: a list of pairs of pixels, such a list as text, or "(1x1),...,(6x6)" in tiles.
        size: of a tile.

    Raises:
        CheckpointError: it is none of these.
    """
    try:
        if isinstance(pinpoints, str) and "x" in pinpoints:
            pairs = [(int(wide) * size, int(tall) * size) for wide, tall in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
            if "..." in pinpoints:
                (wide, tall) = pairs[0]
                (widest, tallest) = pairs[-1]
                pairs = [(w, t) for w in range(wide, widest + 1, size) for t in range(tall, tallest + 1, size)]
        else:
            listed = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
            pairs = [(int(wide), int(tall)) for wide, tall in listed]
        if not pairs or any(side < size or side % size for pair in pairs for side in pair):
            raise ValueError("no tiling in whole tiles")
    except (TypeError, ValueError, SyntaxError, IndexError) as error:
        raise CheckpointError(
            f"image_grid_pinpoints {pinpoints!r:.80} is no list of sizes in tiles of {size} pixels ({error})"
        ) from None
    return tuple((tall, wide) for wide, tall in pairs)


def sampling(checkpoint: Checkpoint) -> FrameSampling:
    """LLaVA-Video: one frame a second, or evenly spread ones where config.json forces their number. OneVision: spread.

    One format and one architecture serve both. OneVision's config.json knows none of the keys that came with
    LLaVA-Video (`force_sample`, `add_time_instruction`), and puts one learned row behind a whole video.
    """
    config = checkpoint.config
    keys = ("force_sample", "add_time_instruction")
    onevision = not any(key in config for key in keys) and config.get("mm_newline_position") in (None, "one_token")
    frames = MAX_FRAMES_72B if int(config.get("hidden_size") or 0) >= WIDE else MAX_FRAMES
    return FrameSampling(
        "llava",
        fps=1.0,
        min_frames=1,
        max_frames=ONEVISION_FRAMES if onevision else frames,
        frame_factor=1,
        force=onevision or bool(config.get("force_sample")),
    )


ROW = Family(
    name="llava_video",
    architectures=("LlavaQwenForCausalLM",),
    model_types=("llava_qwen",),
    checkpoints=(
        "lmms-lab/LLaVA-Video-7B-Qwen2",
        "lmms-lab/LLaVA-Video-72B-Qwen2",
        "lmms-lab/llava-onevision-qwen2-0.5b-ov",
        "lmms-lab/llava-onevision-qwen2-7b-ov",
        "lmms-lab/llava-onevision-qwen2-72b-ov-sft",
    ),
    llm=LlmKeys(prefixes=("model.",), head_keys=("lm_head.weight",)),
    config=ConfigFormat(
        llm_key="",
        llm_type="qwen2",
        vision_type="siglip_vision_model",
        overridden={"rope_scaling": None},  # llava/model/language_model/llava_qwen.py of LLaVA-VL/LLaVA-NeXT
    ),
    tower="framefusion.export.families.llava.weights:original_tower",
    preprocessing=preprocessing,
    sampling=sampling,
    template=lambda checkpoint: replace(CHATML, after_visual="\n"),
    importance_rows=1,
    similarity_lower_bound=0.6,
    verified="transformers' SiglipVisionModel and Qwen2ForCausalLM with LLaVA's steps between, at tiny sizes",
    reference="SiglipVisionModel and Qwen2ForCausalLM",
    reference_logits="framefusion.export.families.llava.reference:original_logits",
    stand_in="projector and pooling (the authors' steps, written here)",
)
