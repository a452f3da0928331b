"""Types and ranges of the keys of config.json that are read: a value of another type is refused with its key.

A file of a stranger may say anything; what passes here can be converted and counted with. What a number must be beside
that (a multiple, the size of a tensor) is checked where it is used. Knows no family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from framefusion.errors import CheckpointError


class _Kind(NamedTuple):
    """What a value must be, as a message says it and as a test."""

    description: str
    fits: Callable[[object], bool]


def _whole(low: int, high: int) -> _Kind:
    return _Kind(f"a whole number of {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def _number(low: float, high: float) -> _Kind:
    def fits(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return low <= value <= high and math.isfinite(value)

    return _Kind(f"a number of {low:g} to {high:g}", fits)


def _list_of(kind: _Kind, longest: int, shortest: int = 0) -> _Kind:
    def fits(value: object) -> bool:
        return isinstance(value, list) and shortest <= len(value) <= longest and all(map(kind.fits, value))

    return _Kind(f"a list of {shortest} to {longest}, each {kind.description}", fits)


def _either(*kinds: _Kind) -> _Kind:
    return _Kind(" or ".join(kind.description for kind in kinds), lambda value: any(kind.fits(value) for kind in kinds))


WIDTH = _whole(1, 1_000_000)
DEPTH = _whole(1, 10_000)
SIDE = _either(_whole(1, 16_384), _list_of(_whole(1, 16_384), 2, 1))  # of pictures and patches, in pixels
FRAMES = _whole(1, 100_000)
TILES = _whole(0, 256)  # every number of tiles up to this one is tried when a picture is cut
LAYER = _whole(-10_000, 10_000)
LAYERS = _list_of(_whole(0, 9_999), 10_000)
ID = _whole(-1_000_000, 1 << 31)  # LLaVA has negative ones for tokens that no tokenizer knows
POSITIVE = _number(1e-30, 1e12)
NOT_NEGATIVE = _number(0, 1e12)
FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
TEXT = _Kind("printable text", lambda value: isinstance(value, str) and value.isprintable() and len(value) < 4096)
OBJECT = _Kind("an object", lambda value: isinstance(value, dict))
TEXTS = _list_of(TEXT, 10_000)
PAIRS = _list_of(_list_of(_whole(1, 100_000), 2, 2), 4_096)

TYPES: Mapping[str, _Kind] = MappingProxyType(
    dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"), WIDTH)
    | dict.fromkeys(("num_heads", "embed_dim", "out_hidden_size", "in_channels", "in_chans", "num_channels"), WIDTH)
    | dict.fromkeys(("query_num", "num_position_embeddings", "temporal_patch_size"), WIDTH)
    | {"spatial_merge_size": _whole(1, 64)}
    | dict.fromkeys(("num_hidden_layers", "depth"), DEPTH)
    | {"vocab_size": _whole(1, 1 << 31), "max_position_embeddings": _whole(1, 1 << 31)}
    | {"sliding_window": _whole(0, 1 << 31), "max_window_layers": _whole(0, 1 << 31)}
    | dict.fromkeys(("patch_size", "image_size", "force_image_size", "scale_resolution"), SIDE)
    | {"vision_resolution": _whole(-1, 16_384), "num_video_frames": FRAMES, "num_time_tokens": _whole(0, 100_000)}
    | dict.fromkeys(("max_slice_nums", "min_tiles", "max_tiles", "min_dynamic_patch", "max_dynamic_patch"), TILES)
    | dict.fromkeys(("image_token_id", "video_token_id", "image_token_index", "video_token_index"), ID)
    | dict.fromkeys(("vision_start_token_id", "vision_end_token_id", "vision_token_id"), ID)
    | {"mm_vision_select_layer": LAYER, "spatial_pool_stride": WIDTH}
    | {"window_size": WIDTH}
    | {key: _either(LAYER, _list_of(LAYER, 100)) for key in ("vision_feature_layer", "select_layer")}
    | dict.fromkeys(("fullatt_block_indexes", "deepstack_visual_indexes"), LAYERS)
    | {"mrope_section": _list_of(_whole(0, 100_000), 8), "layer_types": TEXTS, "architectures": TEXTS}
    | dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "fps", "mlp_ratio"), NOT_NEGATIVE)
    | dict.fromkeys(("rope_theta", "tokens_per_second", "downsample_ratio", "factor"), POSITIVE)
    | dict.fromkeys(("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias", "qkv_bias"), FLAG)
    | dict.fromkeys(("qk_normalization", "use_qk_norm", "use_mean_pooling", "use_mask_token", "pad2square"), FLAG)
    | dict.fromkeys(("use_thumbnail", "dynamic_image_size", "force_sample", "add_time_instruction"), FLAG)
    | dict.fromkeys(("slice_mode", "use_image_id", "drop_vision_last_layer", "dynamic_s2", "mrope_interleaved"), FLAG)
    | dict.fromkeys(("model_type", "hidden_act", "template", "mm_vision_tower", "mm_projector_type"), TEXT)
    | dict.fromkeys(("image_aspect_ratio", "vision_aspect_ratio", "mm_spatial_pool_mode", "norm_type"), TEXT)
    | dict.fromkeys(("mm_newline_position", "mm_patch_merge_type", "rope_type", "ps_version"), TEXT)
    | dict.fromkeys(("projector_hidden_act", "vision_feature_select_strategy", "time_token_format"), TEXT)
    | dict.fromkeys(("text_config", "llm_config", "vision_config", "rope_scaling", "rope_parameters"), OBJECT)
    | {"slice_config": OBJECT, "image_grid_pinpoints": _either(PAIRS, TEXT)}
    | {"s2_scales": _either(TEXT, _list_of(_whole(1, 16_384), 16))}
)
"""Key -> what it must be where it is not null."""
NESTED = ("text_config", "llm_config", "vision_config", "rope_scaling", "rope_parameters", "slice_config")
PART = "_cfg"


def check_types(config: Mapping[str, Any], path: Path, within: str = "") -> None:
    """Refuse values that cannot be what their keys mean, in a configuration and in the ones within it.

    Args:
        config: what the file says.
        path: of the file, for the message.
        within: the keys that lead to `config`, with a dot behind them.

    Raises:
        CheckpointError: naming the key, its value and what it must be.
    """
    for key, value in config.items():
        if value is None:
            continue
        kind = TYPES.get(key)
        if kind is not None and not kind.fits(value):
            raise CheckpointError(f"{path}: {within}{key} is {value!r:.60}, {kind.description} was expected")
        if isinstance(value, dict) and (key in NESTED or key.endswith(PART)):
            check_types(value, path, f"{within}{key}.")
