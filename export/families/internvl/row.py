"""InternVL: the rows of the `internvl_chat` format (InternLM2; Qwen2.5 or Llama) and of transformers' own format.

A checkpoint of the first names its chat layout (`template`); its tokenizer's jinja template is the bare LLM's, which
is not what the model was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.text.chat import find_template, read_template
from framefusion.export.families.family import CHATML, QWEN2_NAMES, Family, LlmKeys
from framefusion.export.families.reading.configs import expect, given, required, square, tokenizer_begin, vision_config
from framefusion.export.families.reading.formats import ConfigFormat
from framefusion.export.families.reading.processors import levels, processor, require_processor
from framefusion.runtime.families.internvl import InternVLPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.text.prompt import PromptTemplate, TurnLayout

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint

INTERNLM2_NAMES: Mapping[str, str] = MappingProxyType(
    dict(QWEN2_NAMES)
    | {
        "embedding": "tok_embeddings",
        "attention.norm": "attention_norm",
        "attention.q": "attention.wqkv",
        "attention.k": "attention.wqkv",
        "attention.v": "attention.wqkv",
        "attention.o": "attention.wo",
        "mlp.norm": "ffn_norm",
        "mlp.gate": "feed_forward.w1",
        "mlp.up": "feed_forward.w3",
        "mlp.down": "feed_forward.w2",
    }
)
SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
)
SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
)
CONVERSATIONS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "internvl2_5": (SYSTEM_2_5, "<|im_end|>\n"),
        "internlm2-chat": (SYSTEM_2, "<|im_end|>"),
        "Hermes-2": (SYSTEM_2, "<|im_end|>"),
    }
)
"""`template` -> what the system says and how a turn ends."""
FRAME_LABELS: Mapping[str, str] = MappingProxyType({"internvl2_5": "Frame-{}: "})
"""`template` -> what stands before a frame; InternVL 2's other templates have `Frame{}: `, the class's default.

internvl/train/internvl_chat_finetune.py and README.md of OpenGVLab/InternVL since InternVL 2.5, December 2024."""
IMAGE_LABEL = "Image-{}: "
"""Before each of several separate images: the README's examples for InternVL 2 and 2.5."""
OLD_IMAGE = "<image>"
"""What the chat templates of the first converted checkpoints write for an image."""
MAX_FRAMES = 32
"""Of the example that the authors show for videos; no file of a checkpoint says it."""


def chat_preprocessing(checkpoint: Checkpoint) -> InternVLPreprocessing:
    """Tiles as config.json says; what it leaves out is as in the format's configuration class."""
    config = checkpoint.config
    vision = required(config, "vision_config", checkpoint)
    expect(checkpoint, config, {"pad2square": (False,)})
    tiled = bool(config.get("dynamic_image_size", False))
    pixels = levels(checkpoint, InternVLPreprocessing(), processor(checkpoint, "image"))
    return InternVLPreprocessing(
        patch_size=square(vision, "patch_size", checkpoint),
        tile_size=tile_size(checkpoint, vision),
        merge_size=merge_size(checkpoint),
        min_tiles=int(config.get("min_dynamic_patch") or 1) if tiled else 1,
        max_tiles=int(config.get("max_dynamic_patch") or 6) if tiled else 1,
        thumbnail=bool(config.get("use_thumbnail", False)),
        **pixels,
        frame_label=FRAME_LABELS.get(str(config.get("template")), InternVLPreprocessing.frame_label),
        image_label=IMAGE_LABEL,
    )


def tile_size(checkpoint: Checkpoint, vision: Mapping[str, Any]) -> int:
    """Side of a tile in pixels: the tower's, unless config.json forces another."""
    forced = checkpoint.config.get("force_image_size")
    return square(checkpoint.config if forced else vision, "force_image_size" if forced else "image_size", checkpoint)


def chat_sampling(checkpoint: Checkpoint) -> FrameSampling:
    """As in the authors' example: always the same number of frames."""
    return FrameSampling("internvl_chat", min_frames=1, max_frames=MAX_FRAMES, frame_factor=1, force=True)


def chat_template(checkpoint: Checkpoint) -> PromptTemplate:
    """The layout that config.json names.

    Raises:
        CheckpointError: config.json names none, or one that is unknown.
    """
    name = required(checkpoint.config, "template", checkpoint)
    if name not in CONVERSATIONS:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json has template {name!r}, supported are {', '.join(CONVERSATIONS)}"
        )
    system, suffix = CONVERSATIONS[name]
    turns = {role: TurnLayout(layout.prefix, suffix) for role, layout in CHATML.turns.items()}
    return replace(CHATML, turns=turns, default_system=system, after_visual="\n", begin=tokenizer_begin(checkpoint))


def native_preprocessing(checkpoint: Checkpoint) -> InternVLPreprocessing:
    """Tiles as the image processor's file says; transformers' processor always cuts images.

    Raises:
        CheckpointError: a processor's file is missing, or does what the rule cannot.
    """
    require_processor(checkpoint, "image_mean", "image_std")
    image = processor(checkpoint, "image")
    video = processor(checkpoint, "video")
    vision = vision_config(checkpoint)
    result = InternVLPreprocessing(
        patch_size=square(vision, "patch_size", checkpoint),
        tile_size=square(vision, "image_size", checkpoint),
        merge_size=merge_size(checkpoint),
        min_tiles=int(given(image, "min_patches", 1)),
        max_tiles=int(given(image, "max_patches", 12)),
        start=special_token(checkpoint, "start_image_token", "<img>"),
        pad=special_token(checkpoint, "context_image_token", "<IMG_CONTEXT>"),
        end=special_token(checkpoint, "end_image_token", "</img>"),
        **levels(checkpoint, InternVLPreprocessing(), image),
    )
    for file in (image, video):  # one graph and one table of levels serve both
        expect(checkpoint, file, {"do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,)})
        found = file.get("size")
        size = {"height": result.tile_size, "width": result.tile_size}
        if found and dict(found) != size:
            raise CheckpointError(f"{checkpoint.folder}: a processor has size {found}, supported is {size} here")
    told_by_image = InternVLPreprocessing(image_mean=result.image_mean, image_std=result.image_std)
    levels(checkpoint, told_by_image, image, video)  # refuses a video processor of other levels or another filter
    return result


def native_sampling(checkpoint: Checkpoint) -> FrameSampling:
    """`num_frames` or `fps` of the video processor's file."""
    video = processor(checkpoint, "video")
    expect(checkpoint, video, {"initial_shift": (True,)})
    return FrameSampling(
        "internvl",
        fps=float(video.get("fps") or 1.0),
        min_frames=1,
        max_frames=int(video.get("num_frames") or MAX_FRAMES),
        frame_factor=1,
        force=bool(video.get("num_frames") or not video.get("fps")),
    )


def native_template(checkpoint: Checkpoint) -> PromptTemplate:
    """The checkpoint's own, else ChatML without a system turn's text."""
    pad = special_token(checkpoint, "context_image_token", "<IMG_CONTEXT>")
    fallback = replace(CHATML, default_system="", after_visual="\n")
    image = OLD_IMAGE if OLD_IMAGE in (find_template(checkpoint) or "") else pad
    shown = {"image": image, "video": special_token(checkpoint, "video_token", "<video>")}
    template = read_template(checkpoint, fallback, shown)
    config = checkpoint.config
    return replace(
        template,
        begin=tokenizer_begin(checkpoint) + template.begin,
        pads={pad: int(config["image_token_id"])} if config.get("image_token_id") else {},
    )


def merge_size(checkpoint: Checkpoint) -> int:
    """Side of the blocks of patches that become one row.

    Raises:
        CheckpointError: downsample_ratio is not one over a whole number.
    """
    ratio = float(checkpoint.config.get("downsample_ratio") or 0.5)
    if ratio <= 0 or (1 / ratio) % 1:
        raise CheckpointError(
            f"config.json has downsample_ratio {ratio}, it must be one over a whole number, such as 0.5"
        )
    return round(1 / ratio)


def special_token(checkpoint: Checkpoint, name: str, default: str) -> str:
    """The text of a token that tokenizer_config.json names, at the top or among the extra ones."""
    config = checkpoint.read_optional_json("tokenizer_config.json")
    extra = config.get("extra_special_tokens")
    token = config.get(name) or (extra.get(name) if isinstance(extra, Mapping) else None) or default
    return str(token["content"] if isinstance(token, Mapping) else token)


TRANSLATED = "names of tensors and packed q, k and v (translated by this project)"
CHECKPOINTS_QWEN = ("OpenGVLab/InternVL2_5-1B", "OpenGVLab/InternVL2_5-4B", "OpenGVLab/InternVL2_5-38B")
CHECKPOINTS_INTERNLM2 = ("OpenGVLab/InternVL2_5-2B", "OpenGVLab/InternVL2_5-8B", "OpenGVLab/InternVL2_5-26B")
CHAT = Family(
    name="internvl_chat",
    architectures=("InternVLChatModel",),
    model_types=("internvl_chat",),
    checkpoints=(*CHECKPOINTS_QWEN, "OpenGVLab/InternVL2_5-78B"),
    llm=LlmKeys(prefixes=("language_model.model.",), head_keys=("language_model.lm_head.weight",)),
    llm_architectures=("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"),
    config=ConfigFormat(llm_key="llm_config"),
    tower="framefusion.export.families.internvl.weights:chat_tower",
    preprocessing=chat_preprocessing,
    sampling=chat_sampling,
    template=chat_template,
    importance_rows=1,
    similarity_lower_bound=0.6,
    verified="transformers' InternVLForConditionalGeneration with the same weights, at tiny sizes",
    terminators=("<|im_end|>",),
    reference="InternVLForConditionalGeneration",
    reference_logits="framefusion.export.families.internvl.reference:chat_logits",
    stand_in=TRANSLATED,
)
CHAT_INTERNLM2 = replace(
    CHAT,
    name="internvl_chat_internlm2",
    llm_architectures=("InternLM2ForCausalLM",),
    checkpoints=CHECKPOINTS_INTERNLM2,
    llm=LlmKeys(
        prefixes=("language_model.model.",),
        head_keys=("language_model.output.weight",),
        names=INTERNLM2_NAMES,
        packed_qkv=True,
    ),
    reference_logits="framefusion.export.families.internvl.reference:internlm2_logits",
)
NATIVE = replace(
    CHAT,
    name="internvl",
    llm_architectures=(),
    architectures=("InternVLForConditionalGeneration",),
    model_types=("internvl",),
    checkpoints=("OpenGVLab/InternVL3-1B-hf", "OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL2_5-8B-MPO-hf"),
    llm=LlmKeys(
        prefixes=("model.language_model.", "language_model.model."),
        head_keys=("lm_head.weight", "language_model.lm_head.weight"),
    ),
    config=ConfigFormat(llm_type="qwen2", vision_type="internvl_vision", tied="top unless false"),
    tower="framefusion.export.families.internvl.weights:native_tower",
    preprocessing=native_preprocessing,
    sampling=native_sampling,
    template=native_template,
    verified="transformers' InternVLForConditionalGeneration at tiny sizes",
    reference_logits="framefusion.export.families.internvl.reference:native_logits",
    stand_in="",
)
