"""What each field of a manifest may hold beyond its type: the table that a bundle of unknown origin is read by.

Ranges are far beyond any model there is and far below what would break arithmetic or memory. What fields have to do
with each other and with the files is in manifest_checks.py. Every number has a line here, or, where it is of a family's
preprocessing or of a kind of tower, in the `field_rules` of that class: a test keeps it so. Knows no family.
"""

from __future__ import annotations

from framefusion.reduction.budget import FixedSchedule
from framefusion.runtime.format.engine_record import EngineRecord, ProfileRecord, TensorRecord
from framefusion.runtime.format.manifest import (
    CalibrationRecord,
    EmbeddingRecord,
    FileRecord,
    FixedRecord,
    KvCacheRecord,
    Limits,
    LossRecord,
    Manifest,
    ModelRecord,
    QuantizationRecord,
    ReductionRecord,
    SegmentRecord,
    SourceRecord,
    VisionRecord,
    WeightFormatRecord,
)
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.text.prompt import PromptTemplate
from framefusion.runtime.text.sampling import GenerationConfig
from framefusion.storage.records import Rule, Rules

LAYERS = 1024
LINEARS = 16 * LAYERS
TOKENS = 1 << 21
IDS = 1 << 24
WIDTH = 1 << 18
BYTES = 1 << 45
SIDE = 1 << 14
FRAMES = 1 << 16


def _between(least: float, most: float, **more: object) -> Rule:
    return Rule(least, most, **more)  # type: ignore[arg-type]


_NAME = Rule(is_name=True)
_SHARE = Rule(0, 1)
_ANY_NUMBER = Rule(-(2.0**63), 2.0**63)
_LAYER_COUNT = Rule(1, LAYERS)
_LAYER = Rule(0, LAYERS - 1, items=LAYERS)
_WIDTH = Rule(1, WIDTH)
_TOKENS = Rule(1, TOKENS)
_COUNT = Rule(0, TOKENS)
_BYTES = Rule(0, BYTES)

RULES: Rules = {
    Manifest: {
        "schema_version": _between(1, 1000),
        "segments": Rule(items=LAYERS),
        "engines": Rule(items=4 * LAYERS),
        "files": Rule(items=1 << 16, is_name=True),
        "tools": Rule(characters=200, items=100),
        "check": _ANY_NUMBER,
        "options": _ANY_NUMBER,
    },
    ModelRecord: {
        "num_layers": _LAYER_COUNT,
        "hidden_size": _WIDTH,
        "intermediate_size": _between(1, 1 << 22),
        "num_heads": _WIDTH,
        "num_kv_heads": _WIDTH,
        "head_dim": _between(2, SIDE),
        "vocab_size": _between(1, IDS),
        "rope_theta": _between(1, 1e15),
        "mrope_section": _between(0, SIDE, items=3),
        "importance_rows": _between(1, 1024),
    },
    Limits: {"max_input_len": _TOKENS, "max_kv_cache_capacity": _TOKENS},
    ReductionRecord: {
        "cost": _between(0, 1, above=True),
        "similarity_lower_bound": _between(-4, 4),
        "ratio_lower_bound": _between(0, 4),
        "depth": _LAYER,
        "reducer": Rule(characters=200),
    },
    FixedSchedule: {"merge_shares": Rule(0, 1, items=LAYERS), "prune_layer": _LAYER, "prune_share": _SHARE},
    FixedRecord: {
        "max_text": _TOKENS,
        "max_visual": _TOKENS,
        "max_track": _TOKENS,
        "lengths": Rule(1, TOKENS, items=LAYERS),
        "drops": Rule(0, TOKENS, items=LAYERS),
    },
    SegmentRecord: {
        "name": Rule(is_name=True),
        "graph": _NAME,
        "decode_graph": _NAME,
        "attention_layers": _LAYER,
        "num_mlps": _between(0, LAYERS),
        "weight_bytes": _BYTES,
        "buckets": Rule(1, TOKENS, items=1024),
        "deepstack": _between(0, LAYERS),
    },
    VisionRecord: {
        "graph": _NAME,
        "patch_width": _between(1, 1 << 22),
        "head_dim": _between(0, SIDE),
        "embed_dim": _WIDTH,
        "mlp_width": _between(0, 1 << 22),
        "weight_bytes": _BYTES,
        "patches_per_token": _between(0, 1e6, above=True),
        "deepstack": _between(0, LAYERS),
    },
    EmbeddingRecord: {"file": _NAME, "rows": _between(1, IDS), "width": _WIDTH, "extra": Rule(items=1024)},
    SourceRecord: {"config_sha256": Rule(characters=64)},
    QuantizationRecord: {
        "method": Rule(characters=200),
        "formats": Rule(items=64),
        "floats": _between(0, LINEARS),
        "losses": Rule(items=64),
    },
    CalibrationRecord: {
        "films": Rule(items=4096, pattern="[0-9a-f]{64}"),
        **dict.fromkeys(("rows", "answer_rows", "prompts", "held_out"), _between(0, 1 << 40)),
        "texts": Rule(characters=64),
        **dict.fromkeys(("divergence", "search_divergence"), _between(0, 1e6)),
    },
    LossRecord: {
        "reducer": Rule(characters=200),
        "cost": _between(0, 1, above=True),
        **dict.fromkeys(("questions", "right_in_floats", "right_quantized"), _between(0, 1 << 31)),
        **dict.fromkeys(("points", "low", "high"), _between(-100, 100)),
    },
    WeightFormatRecord: {"bits": _between(4, 8), "block": _between(0, 256), "linears": _between(1, LINEARS)},
    KvCacheRecord: {"tokens": _COUNT, "clipped": _SHARE, "losses": Rule(items=64)},
    FileRecord: {"size": _BYTES, "sha256": Rule(pattern="[0-9a-f]{64}")},
    EngineRecord: {
        "graph": _NAME,
        "file": _NAME,
        "library": Rule(pattern=r"[A-Za-z_][A-Za-z0-9_.]{0,60}"),
        "version": Rule(characters=200),
        "targets": Rule(characters=200, items=64),
        "key": Rule(characters=200),
        "profiles": Rule(items=1024),
        "tensors": Rule(items=1 << 14),
        "capacities": Rule(1, TOKENS, items=LAYERS),
        "weight_bytes": _BYTES,
        "options": _ANY_NUMBER,
    },
    ProfileRecord: {"tokens": _COUNT, "shapes": Rule(0, BYTES)},
    TensorRecord: {"shape": Rule(-1, BYTES, items=16)},
    GenerationConfig: {
        "temperature": _between(0, 1e6),
        "top_k": _between(0, 1 << 31),
        "top_p": _SHARE,
        "repetition_penalty": _between(0, 1e6, above=True),
        "eos_token_ids": Rule(0, IDS, items=1024),
        "pad_token_id": _between(-1, IDS),
        "min_p": _SHARE,
        "no_repeat_ngram_size": _COUNT,
        "min_new_tokens": _COUNT,
        "suppress_tokens": Rule(0, IDS, items=1 << 18),
        "begin_suppress_tokens": Rule(0, IDS, items=1 << 18),
        "bad_words_ids": Rule(0, IDS, items=1 << 16),
    },
    FrameSampling: {
        "fps": _between(0, 1e4, above=True),
        "min_frames": _between(0, FRAMES),
        "max_frames": _between(1, FRAMES),
        "frame_factor": _between(1, 1024),
    },
    PromptTemplate: {"pads": Rule(0, IDS, items=1024), "turns": Rule(items=16)},
}
"""Class -> field -> rule; a class that refines another adds to its lines."""
