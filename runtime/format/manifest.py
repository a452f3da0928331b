"""The records of a manifest: everything a bundle says about itself. Knows neither files, nor how records are checked.

Engines are in engine_record.py, ranges of the fields in manifest_rules.py, what they have to do with each other in
manifest_checks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from framefusion.errors import BackendError
from framefusion.reduction.budget import FixedSchedule
from framefusion.runtime.format.engine_record import EngineRecord
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.preprocess import Preprocessing
from framefusion.runtime.media.tower_kinds import TowerSettings
from framefusion.runtime.text.prompt import PromptTemplate
from framefusion.runtime.text.sampling import GenerationConfig

SCHEMA_VERSION = 6
"""Of the manifests that are written; a field that older readers do not know raises it, so that they say "upgrade".

    2   no digest
    3   no word of what the tower takes, nor of quantised weights, the checkpoint's among them
    4   no word of KV caches in another type than the bundle's
    5   no word of weights in floats of 8 bits, nor of prompts that codes were chosen by
"""
OLDEST_SCHEMA = 2
UNKNOWN_LICENSE = "unknown"  # the hub's word where nothing is stated

Mode = Literal["none", "fixed", "adaptive"]
FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FLOAT_TYPES: dict[str, type[np.floating[Any]]] = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class ModelRecord:
    """Geometry of the LLM, as far as running and planning need it."""

    family: str
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # rows that the checkpoint has; a token id beyond is never produced
    rope_theta: float
    mrope_section: tuple[int, ...] | None
    importance_rows: int
    dtype: str  # of FLOAT_BYTES: of hidden states, tables and weights, and of caches without a KvCacheRecord
    mrope_interleaved: bool = False  # the axes take turns channel by channel (Qwen3-VL), instead of three blocks

    @property
    def float_type(self) -> type[np.floating[Any]]:
        """numpy's type of the buffers that graphs are bound to; bfloat16 is that of ml_dtypes.

        Raises:
            BackendError: the bundle is in bfloat16 and ml_dtypes is not installed.
        """
        if self.dtype in _FLOAT_TYPES:
            return _FLOAT_TYPES[self.dtype]
        try:
            import ml_dtypes
        except ImportError:
            raise BackendError("the bundle is in bfloat16, which needs ml_dtypes: pip install ml_dtypes") from None
        float_type: type[np.floating[Any]] = ml_dtypes.bfloat16
        return float_type


@dataclass(frozen=True)
class Limits:
    """What the bundle was built for."""

    max_input_len: int
    max_kv_cache_capacity: int  # input and generated tokens together


@dataclass(frozen=True)
class ReductionRecord:
    """How tokens are reduced, by default; an adaptive bundle takes other thresholds at run time."""

    mode: Mode
    cost: float = 1.0
    similarity_lower_bound: float = 1.0
    ratio_lower_bound: float = 0.1
    depth: int | None = None  # deepest layer whose attention a reduction may follow; None where it ends before the LLM
    schedule: FixedSchedule | None = None
    reducer: str = "framefusion"  # a name of framefusion.reducers


@dataclass(frozen=True)
class FixedRecord:
    """Sizes that the prefill graph of the fixed mode was built for."""

    max_text: int
    max_visual: int
    max_track: int  # longest track, in temporal grids
    lengths: tuple[int, ...]  # tokens that enter each layer, padding included
    drops: tuple[int, ...]  # most tokens each reduction drops


@dataclass(frozen=True)
class SegmentRecord:
    """One segment: its graphs and the layers whose caches it holds.

    Fields have the manifest's keys, where `graph` is also what decodes unless `decode_graph` says otherwise. Code asks
    for a graph by what it runs it for: `prefill`, `decode`.
    """

    name: str
    graph: str
    attention_layers: tuple[int, ...]
    num_mlps: int
    scores: bool
    head: bool
    weight_bytes: int
    buckets: tuple[int, ...] | None  # sizes of a prefill; None runs every length as it is
    decode_graph: str | None = None  # where decoding needs another graph than the prefill
    deepstack: int = 0  # of its MLPs, how many add visual features

    @property
    def prefill(self) -> str:
        """Name of the graph that runs a prompt."""
        return self.graph

    @property
    def decode(self) -> str:
        """Name of the graph that runs generated tokens: the prefill's, where that takes any length."""
        return self.decode_graph or self.graph

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of its graphs, each once, the prefill's first."""
        return tuple(dict.fromkeys((self.prefill, self.decode)))

    @property
    def call(self) -> int:
        """The call of a reduction that follows its last attention."""
        return self.attention_layers[-1] + 1


@dataclass(frozen=True)
class VisionRecord:
    """The vision tower with its projector."""

    graph: str
    kind: str  # what the graph takes beside patches: see framefusion.runtime.media.tower_kinds
    patch_width: int
    head_dim: int
    embed_dim: int
    mlp_width: int
    weight_bytes: int
    patches_per_token: float
    deepstack: int = 0  # further outputs, one for each of the first layers of the LLM
    settings: TowerSettings = field(kw_only=True)  # numbers of the kind
    input: Literal["float", "uint8"] = "float"  # patches: normalised, in the bundle's type, or the pictures' levels


@dataclass(frozen=True)
class EmbeddingRecord:
    """The embedding table: raw rows, to be memory-mapped."""

    file: str
    dtype: Literal["float32", "float16", "bfloat16"]
    rows: int
    width: int
    extra: tuple[str, ...] = ()  # learned rows of no token id, behind the table's: a prompt's pieces name them


@dataclass(frozen=True)
class SourceRecord:
    """The checkpoint that a bundle was made of; never a path of the machine that made it."""

    name: str  # id on the hub, or the folder's name
    on_hub: bool
    revision: str | None  # as given; None for a folder
    commit: str | None  # what the revision stood for
    config_sha256: str
    license: str = UNKNOWN_LICENSE  # as the hub writes it
    license_name: str | None = None  # where `license` is "other"
    license_link: str | None = None
    quantization: str | None = None  # how its weights are quantized, and what the build made of them


@dataclass(frozen=True)
class WeightFormatRecord:
    """One way in which linear maps are stored, and how many of them are."""

    bits: int
    block: int  # inputs that share a scale; 0: all of a row
    symmetric: bool  # no zero points
    linears: int
    kind: Literal["int", "float"] = "int"  # float: of 8 bits, e4m3
    rounds: bool = False  # products round activations to the same floats, each token by its own scale


@dataclass(frozen=True)
class LossRecord:
    """What quantized weights cost in answers to a user's questions, under one reducer and cost."""

    reducer: str
    cost: float
    questions: int
    right_in_floats: int
    right_quantized: int
    points: float  # hundredths of the questions; less than 0 where more answers are right
    low: float
    high: float  # 95 % interval of the points


@dataclass(frozen=True)
class CalibrationRecord:
    """Films that codes were chosen by."""

    films: tuple[str, ...]  # SHA-256 of each film or picture, in order
    rows: int  # of all of them that entered the first layer
    answer_rows: int = 0  # of these, tokens of the answers; bundles of before chose by prompts alone
    prompts: int = 0  # conversations about the films; 0: one a film, of before
    texts: str = ""  # SHA-256 over the tokens of these conversations and of their answers
    held_out: int = 0  # prompts of these that took no part in the choice
    divergence: float | None = None  # from floats on those, in nats a token; None where none were
    search_divergence: float | None = None  # the same behind codes of the search alone
    taken: bool = True  # else the search's codes were nearer, and are in the bundle


@dataclass(frozen=True)
class QuantizationRecord:
    """Linear maps of the decoder, its head among them, whose weights are in 4 or 8 bits."""

    method: str  # what chose the codes
    read: bool  # the checkpoint holds them so; else this build made them of floats
    formats: tuple[WeightFormatRecord, ...]
    floats: int  # linear maps of the decoder that stay floats; table and tower do as well
    losses: tuple[LossRecord, ...] = ()  # empty where no questions were given
    calibration: CalibrationRecord | None = None  # None: codes were chosen by the weights alone


@dataclass(frozen=True)
class KvCacheRecord:
    """KV caches as codes, by scales of each channel of a head that are in the graphs."""

    dtype: Literal["int8"]
    tokens: int  # that the scales were measured on
    clipped: float  # share of the numbers of further tokens that lie beyond the codes
    losses: tuple[LossRecord, ...] = ()  # of a bundle whose weights are floats; empty where no questions were given


@dataclass(frozen=True)
class FileRecord:
    """What one file of the bundle must be."""

    size: int  # bytes
    sha256: str  # 64 hexadecimal digits


@dataclass(frozen=True)
class Manifest:
    """Everything a bundle says about itself."""

    schema_version: int
    tools: Mapping[str, str]
    model: ModelRecord
    limits: Limits
    dialect: str
    reduction: ReductionRecord
    segments: tuple[SegmentRecord, ...]
    vision: VisionRecord
    embedding: EmbeddingRecord
    prompt: PromptTemplate
    preprocessing: Preprocessing
    sampling: FrameSampling
    generation: GenerationConfig
    files: Mapping[str, FileRecord]
    fixed: FixedRecord | None = None
    check: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # of the build, in the exporter's own names
    source: SourceRecord | None = None
    engines: tuple[EngineRecord, ...] = ()  # readers of the same schema that know none leave them alone
    quantization: QuantizationRecord | None = None
    kv_cache: KvCacheRecord | None = None

    @property
    def cache_type(self) -> type[np.generic]:
        """numpy's type of the caches; see `ModelRecord.float_type`, where they are floats."""
        return self.model.float_type if self.kv_cache is None else np.int8

    @property
    def cache_number_bytes(self) -> int:
        """Bytes of a number of the caches."""
        return FLOAT_BYTES[self.model.dtype] if self.kv_cache is None else 1

    @property
    def graphs(self) -> Mapping[str, int]:
        """Name of each graph -> bytes of its weights: the segments' graphs in the order they run, then the tower's."""
        sizes = {graph: segment.weight_bytes for segment in self.segments for graph in segment.graphs}
        return sizes | {self.vision.graph: self.vision.weight_bytes}

    @property
    def calls(self) -> tuple[int, ...]:
        """Calls at which a reduction may act between graphs: 0 before the LLM, one behind each segment but the last."""
        return (0, *(record.call for record in self.segments if not record.head))
