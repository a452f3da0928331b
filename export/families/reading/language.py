"""What an LLM's configuration says that changes its numbers: RoPE, windows, biases, activation, tied heads.

One decoder computes all of them, so each key is computed, refused by name, or known to change nothing. transformers 5
is followed where a file can be read in several ways. Knows no weights. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from framefusion.errors import CheckpointError
from framefusion.export.families.reading.configs import required, text_config
from framefusion.export.families.reading.formats import LlmClass, family_llm_classes, format_of

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint

ROPE_TYPES = ("default", "mrope", "dynamic")
"""dynamic is the plain rule up to max_position_embeddings, and no bundle is built for more: see plan.py."""
ACTIVATIONS = ("silu", "swish")  # two names of one function
ATTENTION = ("attention.q", "attention.k", "attention.v")
OUT = ("attention.o",)
MLP = ("mlp.gate", "mlp.up", "mlp.down")


_QWEN2 = LlmClass(ATTENTION, window="use_sliding_window")
_ALL = (*ATTENTION, *OUT)
LLM_CLASSES: Mapping[str, LlmClass] = MappingProxyType(
    {
        "qwen2": _QWEN2,
        "qwen3": LlmClass(switches={"attention_bias": _ALL}, qk_norm=True, window="use_sliding_window"),
        "llama": LlmClass(switches={"attention_bias": _ALL, "mlp_bias": MLP}),
        "mistral": LlmClass(window="always"),
        "internlm2": LlmClass(switches={"bias": _ALL}),
    }
)
"""model_type -> class. What is neither here nor in a family's `ConfigFormat` is another decoder than ours."""

SUSPECT = re.compile(
    r"multiplier|soft_?cap|logits?_scal|scale_|_scale$|_scalar$|attention_scal|attn_scal|rotary|rope|alibi|qk_norm|"
    r"qk_layernorm|clip_qkv|qkv_clip|experts|moe_|parallel_attn|parallel_residual|temperature_tuning|unit_offset|window|"
    r"chunk_size|sinks?$|sparse|ssm_|mamba|linear_attn|norm_type|activation|act_fn|pruned_heads"
)
"""Parts of the keys by which decoders of the field differ from ours: scaled embeddings, attention or logits, capped
logits, partial RoPE, norms of queries and keys, experts, other attentions and activations."""
KNOWN = frozenset(
    ("rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers")
)
"""Keys of that form that are computed, and checked where they are."""
HARMLESS = re.compile(r"^(mm_|image_|vision_|video_|s2_|audio_|chunk_size_feed_forward$|scale_resolution$)|_dropout$")
"""Keys of that form that are not the LLM's, or change how it is computed and not what."""
NEUTRAL: tuple[Any, ...] = (None, False, 0, 1, "", [], {}, *ACTIVATIONS, "rms_norm", "rmsnorm")
ONLY_ABSENT = ("attention_multiplier", "query_pre_attn_scalar", "scale_depth")  # no number of theirs means ours


def llm_classes() -> dict[str, LlmClass]:
    """model_type -> class of every decoder that is computed here."""
    return {**LLM_CLASSES, **family_llm_classes()}


def llm_class(checkpoint: Checkpoint) -> LlmClass:
    """The class of a checkpoint's LLM.

    Raises:
        CheckpointError: its model_type is none of the decoders that are computed here.
    """
    model_type = text_config(checkpoint).get("model_type")
    known = llm_classes()
    if not isinstance(model_type, str) or model_type not in known:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: its LLM has model_type {model_type!r}, which is not supported, "
            f"{', '.join(known)} are"
        )
    return known[model_type]


def check_llm(checkpoint: Checkpoint) -> None:
    """Refuse what the generic decoder does not compute.

    Raises:
        CheckpointError: naming the key, its value and what is supported.
    """
    config = text_config(checkpoint)
    decoder = llm_class(checkpoint)
    act = config.get("hidden_act")
    if act not in ACTIVATIONS:
        raise _unsupported(checkpoint, "hidden_act", act, "'silu' is what the decoder computes")
    for key, value in config.items():
        if not SUSPECT.search(key) or key in KNOWN or HARMLESS.search(key):
            continue
        if value is not None and (key in ONLY_ABSENT or value not in NEUTRAL):
            raise _unsupported(
                checkpoint, key, value, "which this decoder does not compute: take it out if the model does not read it"
            )
    _check_layer_types(checkpoint, config, decoder)


def _check_layer_types(checkpoint: Checkpoint, config: Mapping[str, Any], decoder: LlmClass) -> None:
    """Layers of other kinds than full attention, or windows that nothing switches on."""
    types = config.get("layer_types")
    if types is None:
        return
    known = ("full_attention", "sliding_attention") if decoder.window else ("full_attention",)
    if not isinstance(types, list) or any(kind not in known for kind in types):
        raise _unsupported(checkpoint, "layer_types", types, f"{' or '.join(known)} for each layer is")
    if len(types) != config.get("num_hidden_layers"):
        raise _unsupported(
            checkpoint, "layer_types", types, f"one for each of {config.get('num_hidden_layers')} layers"
        )
    if "sliding_attention" in types and not _sliding(config, decoder):
        raise _unsupported(
            checkpoint, "layer_types", types, "'full_attention' is where use_sliding_window and sliding_window are off"
        )


def biased_slots(checkpoint: Checkpoint, stored: Callable[[str], bool]) -> frozenset[str]:
    """Slots of the generic decoder whose linear map has a bias.

    Args:
        checkpoint: of the LLM.
        stored: whether the first layer has a bias for a slot; called where no key and no class says it.
    """
    config = text_config(checkpoint)
    decoder = llm_class(checkpoint)
    slots = set(decoder.biased)
    for key, switched in decoder.switches.items():
        slots |= {slot for slot in switched if (stored(slot) if config.get(key) is None else config[key])}
    return frozenset(slots)


def attention_window(config: Mapping[str, Any]) -> int | None:
    """Tokens that one token sees at most, None where it sees all.

    Mistral has such a window unless its configuration says null; Qwen2 and Qwen3 have a switch, and layers below
    max_window_layers that see everything.
    """
    decoder = llm_classes().get(str(config.get("model_type")), _QWEN2)
    if not _sliding(config, decoder):
        return None
    types = config.get("layer_types")
    layers = config.get("num_hidden_layers")
    if types is not None:
        slides = "sliding_attention" in types
    else:
        slides = decoder.window == "always" or layers is None or config.get("max_window_layers", 0) < layers
    return int(config["sliding_window"]) if slides else None


def _sliding(config: Mapping[str, Any], decoder: LlmClass) -> bool:
    """Whether a window is switched on."""
    used = decoder.window == "always" or (decoder.window and config.get(decoder.window))
    return bool(used and config.get("sliding_window"))


def rope_scaling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a configuration says of its RoPE: as in transformers `rope_scaling`, else `rope_parameters`."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def rope_type(config: Mapping[str, Any]) -> str:
    """The kind of RoPE of an LLM's configuration."""
    scaling = rope_scaling(config)
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def rope(checkpoint: Checkpoint, head_dim: int) -> tuple[float, tuple[int, ...] | None, bool]:
    """theta, M-RoPE sections and whether they are interleaved.

    They stand in `rope_parameters` since transformers 5, in `rope_theta` and `rope_scaling` before; where a file has
    both, `rope_scaling` is taken whole, as transformers does.

    Raises:
        CheckpointError: another kind of RoPE, or sections that do not fit the heads.
    """
    config = text_config(checkpoint)
    decoder = llm_class(checkpoint)
    scaling = rope_scaling(config)
    kind = rope_type(config)
    if kind not in ROPE_TYPES:
        raise CheckpointError(_other_rope(checkpoint, config, kind))
    for key, values in (("partial_rotary_factor", (1, None)), ("mrope_interleaved", (decoder.interleaved, None))):
        if scaling.get(key) not in values:
            raise _unsupported(checkpoint, f"{key} of its RoPE", scaling[key], f"{values[0]!r} is")
    theta = float(scaling.get("rope_theta") or required(config, "rope_theta", checkpoint))
    if decoder.mrope is None:
        return theta, None, False
    section = tuple(scaling.get("mrope_section") or decoder.mrope)
    if len(section) != 3 or sum(section) != head_dim // 2:
        said = "" if scaling.get("mrope_section") else ", what transformers takes where config.json has none,"
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: mrope_section {list(section)}{said} must be 3 numbers whose sum is "
            f"{head_dim // 2}, half of a head of {head_dim}: write the mrope_section of the original model into it"
        )
    return theta, section, decoder.interleaved


def _other_rope(checkpoint: Checkpoint, config: Mapping[str, Any], kind: str) -> str:
    """Why another kind of RoPE is refused, and what helps."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    remedy = "no bundle can be built of a model that was trained with it"
    if kind == "yarn":
        change = f"take {key} out of it"
        if "mrope_section" in rope_scaling(config):
            change = "write the type 'default' there and leave its mrope_section there"
        remedy = (
            f"if it was added for longer prompts, as model cards say, {change}; of a model that was trained with it no "
            "bundle can be built"
        )
    return (
        f"{checkpoint.folder}/config.json: {key} has rope type {kind!r}, which is not supported, only "
        f"{', '.join(ROPE_TYPES)} are: {remedy}"
    )


def head_is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the embedding table is the vocabulary projection, by the rule of the model's class: see `Tied`."""
    top = checkpoint.config.get("tie_word_embeddings")
    llm = text_config(checkpoint).get("tie_word_embeddings")
    rule = format_of(checkpoint.config).tied
    if rule == "top":
        return bool(top)
    if rule == "top unless false":
        return bool(True if top is None else top)
    if rule == "either":  # old files say it only in the LLM's
        return bool(top or llm)
    return bool(llm)


def _unsupported(checkpoint: Checkpoint, key: str, value: Any, supported: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint.folder}/config.json: the LLM's {key} is {value!r:.80}, {supported}")
