"""The bundle: a folder that says everything about itself, its format, and the checks before it is used.

    manifest.json     what this module describes
    segments/NAME/    graph.onnx (and decode.onnx in the fixed mode) over one weights.bin
    vision/           graph.onnx over weights.bin
    embedding.bin     the rows of the embedding table, memory-mapped
    engines/KIND/     what was compiled of the graphs, and report.json
    tokenizer.json
    README.md         the model card, and beside it the licence files of the checkpoint

Knows the format only: it neither builds nor runs one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from framefusion.budget import FixedSchedule
from framefusion.errors import BackendError, BundleError
from framefusion.runtime.engine_record import EngineKind as EngineKind  # the records of engines are the format's, too
from framefusion.runtime.engine_record import EngineRecord as EngineRecord
from framefusion.runtime.engine_record import ProfileRecord as ProfileRecord
from framefusion.runtime.engine_record import TensorRecord as TensorRecord
from framefusion.runtime.families import RULES as RULES  # makes every rule of preprocessing known
from framefusion.runtime.frame_sampling import FrameSampling
from framefusion.runtime.preprocess import Preprocessing
from framefusion.runtime.prompt import PromptTemplate
from framefusion.runtime.records import RecordError, from_json, to_json
from framefusion.runtime.sampling import GenerationConfig

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
VERIFIED = ".verified.json"
UNKNOWN_LICENSE = "unknown"  # the hub's word where nothing is stated
_CHUNK = 1 << 22

Mode = Literal["none", "fixed", "adaptive"]
FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FLOAT_TYPES: dict[str, type[np.floating[Any]]] = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class ModelRecord:
    """Geometry of the LLM, as far as stitching and planning need it."""

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
    dtype: str  # of hidden states, rotary tables, caches and weights: a name of FLOAT_BYTES
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
    """One segment: its graph and the layers whose caches it holds."""

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
    def call(self) -> int:
        """The call of a reduction that follows its last attention."""
        return self.attention_layers[-1] + 1


@dataclass(frozen=True)
class VisionRecord:
    """The vision tower with its projector."""

    graph: str
    kind: str  # what the graph wants beside patches: see framefusion.runtime.vision
    patch_width: int
    head_dim: int
    embed_dim: int
    mlp_width: int
    weight_bytes: int
    patches_per_token: float
    deepstack: int = 0  # further outputs, one for each of the first layers of the LLM
    settings: Mapping[str, Any] = field(default_factory=dict)  # numbers of the kind


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
    revision: str | None  # as asked; None for a folder
    commit: str | None  # what the revision stood for
    config_sha256: str
    license: str = UNKNOWN_LICENSE  # as the hub writes it
    license_name: str | None = None  # where `license` is "other"
    license_link: str | None = None


@dataclass(frozen=True)
class FileRecord:
    """Identity of one file."""

    size: int
    sha256: str


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
    options: Mapping[str, Any] = field(default_factory=dict)  # what the build was asked, in the exporter's own names
    source: SourceRecord | None = None
    engines: tuple[EngineRecord, ...] = ()  # readers of the same schema that know none leave them alone

    @property
    def calls(self) -> tuple[int, ...]:
        """Calls at which a reduction may act between graphs: 0 before the LLM, one behind each segment but the last."""
        return (0, *(record.call for record in self.segments if not record.head))


class Bundle:
    """A bundle on disk whose manifest has been read.

    Args:
        folder: the bundle.
        verify: compare sizes and hashes of all files first. Hashes that were right once are not computed again while
            size and modification time stay.

    Raises:
        BundleError: something is missing, truncated, altered, or newer than this package reads.
    """

    def __init__(self, folder: Path | str, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if verify:
            verify_files(self.folder, self.manifest.files)

    def seen_as(self, **changes: Any) -> Bundle:
        """The same files under a manifest with some entries changed: the same weights in another way of running."""
        other = copy.copy(self)
        other.manifest = replace(self.manifest, **changes)
        return other

    def engine(self, graph: str, kind: EngineKind) -> EngineRecord | None:
        """The engine of a graph, None where the bundle holds none of that kind."""
        return next((e for e in self.manifest.engines if (e.graph, e.kind) == (graph, kind)), None)

    def require_graphs(self) -> None:
        """Refuse what needs the ONNX graphs where only their engines were kept."""
        missing = [graph for graph in self.graphs if graph not in self.manifest.files]
        if missing:
            raise BundleError(
                f"{self.folder} holds engines only, {missing[0]} was left out (--engines-only): run it on a GPU that "
                "they were built for, or build the bundle again to run it on the CPU, to check it or to compile it"
            )

    @property
    def graphs(self) -> list[str]:
        """All graphs, the heaviest first: while one is loaded its largest tensor is there twice."""
        manifest = self.manifest
        heavy = [(segment.weight_bytes, segment.graph) for segment in manifest.segments]
        heavy += [(s.weight_bytes, s.decode_graph) for s in manifest.segments if s.decode_graph is not None]
        heavy.append((manifest.vision.weight_bytes, manifest.vision.graph))
        return [graph for _, graph in sorted(heavy, reverse=True)]


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if folder.is_dir():
            raise BundleError(f"{folder} holds no {MANIFEST}: it is no bundle, or unfinished; build it") from None
        raise BundleError(f"no bundle at {folder}: build one with ff-export build") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is not readable ({error}): rebuild or copy the bundle again") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, int):
        raise BundleError(f"{path} has no schema_version: it is no manifest of a bundle")
    if version < SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version}, this package reads {SCHEMA_VERSION}: rebuild the bundle"
        )
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version}, this package reads up to {SCHEMA_VERSION}: upgrade framefusion-aot"
        )
    try:
        return from_json(Manifest, raw)
    except RecordError as error:
        raise BundleError(f"{path}: {error}: rebuild the bundle") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, in one step: a bundle that is in use gets engines while others read it."""
    text = json.dumps(to_json(manifest), indent=2, ensure_ascii=False)
    fresh = folder / f"{MANIFEST}.new"
    fresh.write_text(text + "\n", encoding="utf-8")
    os.replace(fresh, folder / MANIFEST)


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hash a file chunk by chunk; `progress` is told the bytes of each."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def file_record(path: Path) -> FileRecord:
    """Identity of a file as it is now."""
    return FileRecord(path.stat().st_size, sha256_of(path))


def verify_files(folder: Path, files: Mapping[str, FileRecord], *, trust_stamps: bool = True) -> None:
    """Compare every file with its record; sizes of all first, because that is instant.

    Args:
        folder: the bundle.
        files: name -> record.
        trust_stamps: spare the hash of files that were right before and have the modification time they had then.
    """
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path} is missing: copy the bundle again or rebuild it")
        size = path.stat().st_size
        if size != record.size:
            kind = "truncated" if size < record.size else "altered"
            raise BundleError(f"{path} is {kind}: {size} bytes, {record.size} expected; copy it again or rebuild")
    known = _read_stamps(folder)
    stamps = known if trust_stamps else {}
    fresh: dict[str, list[Any]] = {}
    for name, record in files.items():
        path = folder / name
        stamp = [path.stat().st_mtime_ns, record.sha256]
        if stamps.get(name) != stamp and sha256_of(path) != record.sha256:
            raise BundleError(f"{path} is altered: its sha256 is not the manifest's; copy it again or rebuild")
        fresh[name] = stamp
    if known | fresh != known:
        _write_stamps(folder, known | fresh)


def _read_stamps(folder: Path) -> dict[str, Any]:
    try:
        stamps = json.loads((folder / VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def _write_stamps(folder: Path, stamps: Mapping[str, Any]) -> None:
    try:
        (folder / VERIFIED).write_text(json.dumps(stamps), encoding="utf-8")
    except OSError:
        return  # a read-only bundle is hashed at every start
