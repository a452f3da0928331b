"""What families read from a checkpoint's files in the same way: configs, processors, sampling, generation. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from framefusion.errors import CheckpointError
from framefusion.export.families.chat import read_template
from framefusion.export.families.family import CHATML
from framefusion.export.sentencepiece_tokenizer import begin_token, needed
from framefusion.runtime.families.qwen_vl import QwenVLPreprocessing
from framefusion.runtime.frame_sampling import FrameSampling
from framefusion.runtime.prompt import PromptTemplate
from framefusion.runtime.sampling import GenerationConfig

if TYPE_CHECKING:
    from framefusion.export.checkpoint import Checkpoint

TEXT_CONFIGS = ("text_config", "llm_config", "llm_cfg")
QWEN_PADS = {"<|video_pad|>": "video_token_id", "<|image_pad|>": "image_token_id"}
QWEN_PLACEHOLDERS = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("video", "image")}

_LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_LLAMA |= {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_CLIP: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_CLIP |= {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _LLAMA | {"intermediate_size": 22016, "num_key_value_heads": 32},
    "clip_vision_model": _CLIP,
    "internvl_vision": {"num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 448, "patch_size": 14},
    "siglip_vision_model": _CLIP | _SIGLIP,
}
"""By model_type: `save_pretrained` leaves out of a nested configuration what equals the default of its class."""


def text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The LLM's configuration: of its own folder, nested in config.json under one of several names, or flat."""
    part = checkpoint.part_config("llm")
    if part:
        return completed(part)
    for name in TEXT_CONFIGS:
        nested = checkpoint.config.get(name)
        if isinstance(nested, dict):
            return completed(nested)
    return checkpoint.config


def rope_scaling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an LLM's configuration says of its RoPE: `rope_parameters` since transformers 5, `rope_scaling` before."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def rope_type(config: Mapping[str, Any]) -> str:
    """The kind of RoPE of an LLM's configuration."""
    scaling = rope_scaling(config)
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def completed(nested: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration within config.json with the values that its class left out."""
    return {**CLASS_DEFAULTS.get(str(nested.get("model_type")), {}), **nested}


def attention_window(config: Mapping[str, Any]) -> int | None:
    """Tokens that one token sees at most: Mistral has such a window unless it says null, others have a switch."""
    used = config.get("use_sliding_window", config.get("model_type") == "mistral")
    return int(config["sliding_window"]) if used and config.get("sliding_window") else None


def required(config: Mapping[str, Any], key: str, checkpoint: Checkpoint) -> Any:
    """A value of the configuration that has no default."""
    if config.get(key) is None:
        raise CheckpointError(f"{checkpoint.folder}/config.json has no {key}: the checkpoint is incomplete")
    return config[key]


def expect(checkpoint: Checkpoint, config: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse values that the graph and the rules are not made for; a key that is absent has the first one."""
    for key, values in known.items():
        if config.get(key, values[0]) not in values:
            raise CheckpointError(
                f"{checkpoint.folder}: {key} is {config[key]!r}, supported is {' or '.join(map(repr, values))} only"
            )


QwenVL = TypeVar("QwenVL", bound=QwenVLPreprocessing)


def told_by_processor(checkpoint: Checkpoint, told: QwenVL) -> QwenVL:
    """Patch geometry, pixel limits and normalisation, as far as the checkpoint's processors tell them.

    The pixel limits are the video processor's own: those of the image processor are for single images (`image_limits`).
    """
    video = video_processor(checkpoint)
    found = {**processor(checkpoint, "image"), **video}
    known: dict[str, Any] = {
        name: int(found[name]) for name in ("patch_size", "merge_size", "temporal_patch_size") if found.get(name)
    }
    low, high = pixel_limits(video)
    known |= {"min_pixels": low or told.min_pixels, "max_pixels": high or told.max_pixels}
    known |= normalisation(found)
    return replace(told, **known)


def pixel_limits(found: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The smallest and largest number of pixels that a Qwen-VL processor's file tells; it has two ways to say them."""
    size = found.get("size") or {}
    low = found.get("min_pixels") or size.get("shortest_edge")
    high = found.get("max_pixels") or size.get("longest_edge")
    return int(low) if low else None, int(high) if high else None


def image_limits(checkpoint: Checkpoint) -> dict[str, Any]:
    """Pixel limits of single images, as fields of the rule; none where the checkpoint tells none."""
    found = zip(("image_min_pixels", "image_max_pixels"), pixel_limits(processor(checkpoint, "image")), strict=True)
    return {name: limit for name, limit in found if limit is not None}


def processor(checkpoint: Checkpoint, kind: str) -> Mapping[str, Any]:
    """What the files say of the "image" or "video" processor; a video's is the image's where it has none of its own."""
    of_all = checkpoint.read_optional_json("processor_config.json")
    still = of_all.get("image_processor") or checkpoint.read_optional_json("preprocessor_config.json")
    if kind == "image":
        return still
    return video_processor(checkpoint) or still


def video_processor(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What the files say of the video processor's own; they are one file since transformers 5."""
    own = checkpoint.read_optional_json("processor_config.json").get("video_processor")
    return own or checkpoint.read_optional_json("video_preprocessor_config.json")


def normalisation(processor: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """image_mean and image_std, where a processor's file tells them."""
    return {name: tuple(map(float, processor[name])) for name in ("image_mean", "image_std") if processor.get(name)}


def told_by_video_processor(checkpoint: Checkpoint, told: FrameSampling) -> FrameSampling:
    """Frame sampling, as far as the video processor tells it."""
    video = video_processor(checkpoint)
    return replace(
        told,
        fps=float(video.get("fps") or told.fps),
        min_frames=int(video.get("min_frames") or told.min_frames),
        max_frames=int(video.get("max_frames") or told.max_frames),
    )


def qwen_template(checkpoint: Checkpoint, fallback: PromptTemplate = CHATML) -> PromptTemplate:
    """The chat layout of a Qwen-VL checkpoint, with the ids that config.json says the pad tokens have."""
    return with_pads(checkpoint, read_template(checkpoint, fallback, QWEN_PLACEHOLDERS), QWEN_PADS)


def with_pads(checkpoint: Checkpoint, template: PromptTemplate, keys: Mapping[str, str]) -> PromptTemplate:
    """The template with the ids that config.json says the pad tokens have; `keys` is token -> key."""
    return replace(
        template, pads={token: int(required(checkpoint.config, key, checkpoint)) for token, key in keys.items()}
    )


def tokenizer_begin(checkpoint: Checkpoint) -> str:
    """What the checkpoint's tokenizer puts before every text."""
    path = checkpoint.find("tokenizer.json")
    if path is None:
        return begin_token(checkpoint) if needed(checkpoint) else ""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(path))
    with_begin, bare = (backend.encode("a", add_special_tokens=special) for special in (True, False))
    return "".join(with_begin.tokens[: with_begin.ids.index(bare.ids[0])])


def with_begin(checkpoint: Checkpoint, layout: PromptTemplate) -> PromptTemplate:
    """The layout behind what the tokenizer puts before every text, unless the layout says that itself.

    A tokenizer may read the first word of a text as if a space stood before it; then one does.
    """
    begin = tokenizer_begin(checkpoint)
    if begin and layout.begin.startswith(begin):
        return layout
    told = checkpoint.read_optional_json("tokenizer.json")
    splitter, controls = told.get("pre_tokenizer") or {}, [token["content"] for token in told.get("added_tokens", ())]
    schemes = [part.get("prepend_scheme") for part in (splitter, *splitter.get("pretokenizers", ()))]
    opening = layout.begin or layout.turns["system" if layout.default_system else "user"].prefix
    mark = " " if "first" in schemes and not opening.startswith(tuple(controls)) else ""
    return replace(layout, begin=begin + mark + layout.begin)


def generation(checkpoint: Checkpoint, terminators: Sequence[int] = ()) -> GenerationConfig:
    """generation_config.json; the end tokens of config.json where it names none, and the ids of a family's own."""
    told = checkpoint.read_optional_json("generation_config.json")
    if told.get("eos_token_id") is None:
        told = told | {"eos_token_id": text_config(checkpoint).get("eos_token_id")}
    config = GenerationConfig.from_dict(told)
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*terminators, *config.eos_token_ids))))


def check_tokens(checkpoint: Checkpoint, tokens: Sequence[str]) -> None:
    """Refuse a tokenizer.json without one of these control tokens.

    Raises:
        CheckpointError: naming what is missing.
    """
    added = checkpoint.read_json("tokenizer.json").get("added_tokens") or []
    known = {token.get("content") for token in added}
    missing = [token for token in tokens if token not in known]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}/tokenizer.json has no token {', '.join(missing)} among its added_tokens: "
            "the checkpoint is incomplete"
        )
