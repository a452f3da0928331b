"""What families read from a checkpoint's files in the same way: configs, processors, sampling, generation. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.class_defaults import completed, kinds_of, llm_config, token_id
from framefusion.export.checkpoints.text.chat import read_template
from framefusion.export.checkpoints.text.generation_file import read_generation
from framefusion.export.checkpoints.text.sentencepiece_tokenizer import begin_token, needed
from framefusion.export.checkpoints.text.tokenizer_file import added_tokens, tokenizer_of
from framefusion.export.families.family import CHATML
from framefusion.export.families.reading.processors import levels, processor, require_processor, video_processor
from framefusion.runtime.families.qwen_vl import QwenVLPreprocessing
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.text.prompt import PromptTemplate
from framefusion.runtime.text.sampling import GenerationConfig

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint

QWEN_PADS = {"<|video_pad|>": "video_token_id", "<|image_pad|>": "image_token_id"}
QWEN_PLACEHOLDERS = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("video", "image")}


OVERRULED: Mapping[str, Mapping[str, Any]] = {"LlavaQwenForCausalLM": {"rope_scaling": None}}
"""By architecture: values that its authors' class sets whatever config.json says, so that no weight was ever trained
with another (llava/model/language_model/llava_qwen.py of LLaVA-VL/LLaVA-NeXT)."""


def text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The LLM's configuration: of its own folder, nested in config.json under the key of its class, or flat.

    What it leaves out is as its class in transformers has it, `model_type` too.
    """
    kind, _ = kinds_of(checkpoint.config)
    part = checkpoint.part_config("llm")
    if part:
        return completed(part, kind)
    nested = llm_config(checkpoint.config)
    if nested is not None:
        return completed(nested, kind)
    flat = dict(checkpoint.config)
    for architecture in checkpoint.config.get("architectures") or ():
        flat |= OVERRULED.get(architecture, {})
    return completed(flat | {"model_type": kind} if kind else flat)


def vision_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The vision tower's configuration within config.json, with what its class in transformers fills in.

    The classes of Qwen-VL make a tower of their defaults where there is none at all; the others want to know which.
    """
    kind = kinds_of(checkpoint.config)[1]
    whole = kind.startswith("qwen") and checkpoint.config.get("vision_config") is None
    told = {} if whole else required(checkpoint.config, "vision_config", checkpoint)
    if not isinstance(told, dict):
        raise CheckpointError(f"{checkpoint.folder}/config.json has vision_config {told!r:.80}, expected an object")
    return completed(told, kind)


def required(config: Mapping[str, Any], key: str, checkpoint: Checkpoint) -> Any:
    """A value of the configuration that has no default."""
    if config.get(key) is None:
        raise CheckpointError(f"{checkpoint.folder}/config.json has no {key}: the checkpoint is incomplete")
    return config[key]


def given(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value of the configuration; null is no value."""
    value = config.get(key)
    return default if value is None else value


def square(config: Mapping[str, Any], key: str, checkpoint: Checkpoint) -> int:
    """A side in pixels, which newer files write for both directions."""
    value = required(config, key, checkpoint)
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise CheckpointError(f"{checkpoint.folder}/config.json has {key} {value}: only squares are supported")
    return int(sides.pop())


def expect(checkpoint: Checkpoint, config: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse values that the graph and the rules are not made for; a key that is absent has the first one."""
    for key, values in known.items():
        if config.get(key, values[0]) not in values:
            raise CheckpointError(
                f"{checkpoint.folder}: {key} is {config[key]!r}, supported is {' or '.join(map(repr, values))} only"
            )


GEOMETRY = ("patch_size", "merge_size", "temporal_patch_size")
"""Sizes that Qwen-VL's processors have and that its tower has too."""
QwenVL = TypeVar("QwenVL", bound=QwenVLPreprocessing)


def told_by_processor(checkpoint: Checkpoint, told: QwenVL) -> QwenVL:
    """Patch geometry, pixel limits and normalisation, as far as the checkpoint's processors tell them.

    The pixel limits are the video processor's own: those of the image processor are for single images (`image_limits`).
    """
    require_processor(checkpoint)
    still = processor(checkpoint, "image")
    video = video_processor(checkpoint)
    for key in GEOMETRY:
        sizes = [one[key] for one in (still, video) if one.get(key)]
        if len(set(sizes)) > 1:
            raise CheckpointError(
                f"{checkpoint.folder}: the image and the video processor have different {key}, "
                f"{' and '.join(map(str, sizes))}: one tower serves both"
            )
    found = {**still, **video}
    known: dict[str, Any] = {name: int(found[name]) for name in GEOMETRY if found.get(name)}
    low, high = pixel_limits(video)
    known |= {"min_pixels": low or told.min_pixels, "max_pixels": high or told.max_pixels}
    known |= levels(checkpoint, told, still, video or still)
    return replace(told, **known)


CONTEXT_TOKENS = 128_000
SHARE_OF_FILM = 0.9
"""qwen-vl-utils' MODEL_SEQ_LEN, and the share of it that the frames of a film may fill."""


def film_pixels(checkpoint: Checkpoint, told: QwenVLPreprocessing) -> float | None:
    """The pixels that all frames of a film share, as qwen-vl-utils and `cap_pixels_per_frame` of transformers have it.

    None where the checkpoint's video processor switches that off by name.
    """
    video = video_processor(checkpoint)
    if video.get("cap_pixels_per_frame") is False:
        return None
    return int(video.get("max_video_tokens") or CONTEXT_TOKENS) * told.factor**2 * SHARE_OF_FILM


def pixel_limits(found: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The smallest and largest number of pixels that a Qwen-VL processor's file tells; it has two ways to say them."""
    size = found.get("size") or {}
    low = found.get("min_pixels") or size.get("shortest_edge")
    high = found.get("max_pixels") or size.get("longest_edge")
    return int(low) if low else None, int(high) if high else None


IMAGE_PIXELS = 56 * 56, 1280 * 28 * 28
"""Of transformers' Qwen2VLImageProcessor, which Qwen2.5-VL and Qwen3-VL have too."""


def image_limits(checkpoint: Checkpoint) -> dict[str, Any]:
    """Pixel limits of single images, as fields of the rule; what a file leaves out is as in the processor's class."""
    low, high = pixel_limits(processor(checkpoint, "image"))
    return {"image_min_pixels": low or IMAGE_PIXELS[0], "image_max_pixels": high or IMAGE_PIXELS[1]}


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
    told = {key: token_id(checkpoint.config, key) for key in keys.values()}
    return replace(template, pads={token: int(required(told, key, checkpoint)) for token, key in keys.items()})


def tokenizer_begin(checkpoint: Checkpoint) -> str:
    """What the checkpoint's tokenizer puts before every text."""
    if needed(checkpoint):
        return begin_token(checkpoint)
    backend = tokenizer_of(checkpoint)
    with_begin, bare = (backend.encode("a", add_special_tokens=special) for special in (True, False))
    return "".join(with_begin.tokens[: with_begin.ids.index(bare.ids[0])]) if bare.ids else ""


def with_begin(checkpoint: Checkpoint, layout: PromptTemplate) -> PromptTemplate:
    """The layout behind what the tokenizer puts before every text, unless the layout says that itself.

    A tokenizer may read the first word of a text as if a space stood before it; then one does.
    """
    begin = tokenizer_begin(checkpoint)
    if begin and layout.begin.startswith(begin):
        return layout
    told = checkpoint.read_optional_json("tokenizer.json")
    splitter = told.get("pre_tokenizer") or {}
    controls = added_tokens(checkpoint)
    schemes = [part.get("prepend_scheme") for part in (splitter, *splitter.get("pretokenizers", ()))]
    opening = layout.begin or layout.turns["system" if layout.default_system else "user"].prefix
    mark = " " if "first" in schemes and not opening.startswith(tuple(controls)) else ""
    return replace(layout, begin=begin + mark + layout.begin)


def generation(checkpoint: Checkpoint, terminators: Sequence[int] = ()) -> GenerationConfig:
    """How the checkpoint chooses tokens: see `generation_file.read_generation`."""
    return read_generation(checkpoint, text_config(checkpoint), terminators)


def check_tokens(checkpoint: Checkpoint, tokens: Sequence[str]) -> None:
    """Refuse a tokenizer without one of these control tokens.

    Raises:
        CheckpointError: naming what is missing.
    """
    known = added_tokens(checkpoint)
    missing = [token for token in tokens if token not in known]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}/tokenizer.json has no token {', '.join(missing)} among its added_tokens: "
            "the checkpoint is incomplete"
        )


def check_rows(checkpoint: Checkpoint, texts: Iterable[object], rows: int) -> None:
    """Refuse an embedding table without a row for a control token that prompts hold.

    Args:
        checkpoint: whose tokenizer says the ids.
        texts: what stands in prompts; what is no text is passed over.
        rows: of the embedding table.

    Raises:
        CheckpointError: naming the token, its id and the size of the table.
    """
    written = "\n".join(text for text in texts if isinstance(text, str))
    for token, index in added_tokens(checkpoint).items():
        if index >= rows and token in written:
            raise CheckpointError(
                f"{checkpoint.folder}: {token} is token {index}, the embedding table has {rows} rows: the tokenizer is "
                "of another model, or the table was not resized when tokens were added"
            )


def check_placeholders(checkpoint: Checkpoint, template: PromptTemplate, rows: int) -> None:
    """Refuse pad tokens without a row in an embedding table of `rows` rows.

    Raises:
        CheckpointError: naming the token and its id.
    """
    for token, index in template.pads.items():
        if not 0 <= index < rows:
            raise CheckpointError(
                f"{checkpoint.folder}/config.json says that {token} is token {index}, the embedding table has {rows} "
                "rows: config.json is of another model, or the table was not resized"
            )


def check_pads(checkpoint: Checkpoint, template: PromptTemplate) -> None:
    """Refuse a config.json that gives the pad tokens other ids than the tokenizer.

    Raises:
        CheckpointError: naming the token and both ids.
    """
    check_tokens(checkpoint, list(template.pads))
    known = added_tokens(checkpoint)
    for token, told in template.pads.items():
        if known[token] != told:
            raise CheckpointError(
                f"{checkpoint.folder}/config.json says that {token} is id {told}, in the tokenizer it is "
                f"{known[token]}: correct config.json, or take the tokenizer that belongs to it"
            )
