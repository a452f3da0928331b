"""What memory a generation takes, worked out from the manifest alone.

The peak of a process is the sum of these, or what is there while the vision tower runs, whichever is more:

    process      interpreter and libraries (BASE, measured), and the tokenizer's tables
    weights      all segments and the vision tower, once for each graph over them: ONNX Runtime packs its own copy.
                 Codes are packed with a scale and a sum in fp32 for each block (PARTS). While a session opens, the
                 scales of its file are mapped as well: pages that the system takes back at any time, not counted here
    embedding    rows of the memory-mapped table that the prompt touches, a page for each at least
    activations  one arena for all graphs, which never shrinks:
                   a segment with MLPs   tokens of a chunk * (4 intermediate + 5 hidden) * 4 bytes
                   a segment without     tokens of a chunk * 6 hidden * 4 bytes
                   the vision tower      patches at once * (2 MLP + 9 width) * 4 bytes
                 the largest segment's share and the tower's together, less OVERLAP of the smaller: where a block that
                 one of them left is large enough, it serves the other
                 a chunk is the padded prompt; in the last segment it may be a part of it (backends.host.CHUNK)
    rows         outside the arena: hidden states of the prompt, into a segment and out of it, with their rotary tables,
                 tokens * (3 hidden + head_dim) * 4 bytes; a hidden state more for each layer that adds visual features,
                 and for each of those that one segment takes
    caches       keys and values, 2 * heads * head_dim * 4 bytes a layer and slot, 1 byte where they are in int8; slots:
                 tokens there + new ones

    in float16   rows and caches take 2 bytes a number, and the fp32 rows that were embedded stay beside them. ONNX
                 Runtime's CPU kernels multiply in fp32: weights are held widened, all but codes, activations have their
                 cast beside them (WITH_CAST), and attention writes its scores out: heads * tokens of a chunk * tokens *
                 SCORE bytes

    while the tower runs: process, all weights, the tower's activations, patches of the video and its features

Frames at the film's own size are not in it: they are gone before the first graph runs. The constants were measured with
ONNX Runtime on the CPU.

Of a GPU only what is certain is forecast, `GpuMemory`: weights and caches in the bundle's type, and the embedding
table, which the first greedy answer copies there where it takes no more than an eighth of what is free: see
`Embedding.upload`. Activations are the library's. Knows no other backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from framefusion.errors import PromptError
from framefusion.reduction.budget import check_cost
from framefusion.runtime.backends.host import CHUNK
from framefusion.runtime.format.manifest import FLOAT_BYTES, Manifest, SegmentRecord
from framefusion.runtime.generation.embedder import PATCHES_AT_ONCE
from framefusion.runtime.generation.segments import bucket_for, chunks_of

FLOAT = 4
PAGE = 4096
BASE = 95_000_000
OVERLAP = 0.4
WITH_CAST = 1.5
SCORE = 6
MAPS_OF_A_LAYER = 7  # query, key, value, output; gate, up, down
PARTS = 2  # numbers of a block of codes that are packed with them: scale, sum
HALF_PARTS = 3  # and the scale once more, widened
TOKENIZER_FACTOR = 15  # bytes in memory for each byte of tokenizer.json


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak, by what takes them, and tokens in the cache of each segment after the prefill."""

    process: int
    weights: int
    embedding: int
    activations: int
    rows: int
    caches: int
    vision_peak: int  # of the process while the tower runs
    lengths: tuple[int, ...]
    caches_by_segment: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes at the peak: while generating, or while the tower runs."""
        generating = self.process + self.weights + self.embedding + self.activations + self.rows + self.caches
        return max(generating, self.vision_peak)


@dataclass(frozen=True)
class GpuMemory:
    """Bytes that a GPU holds of a bundle while it answers, by what takes them; activations come on top."""

    weights: int
    caches: int
    embedding: int  # only where there is room enough; else the host gives a row a step

    @property
    def least(self) -> int:
        """Without the table, which may stay on the host."""
        return self.weights + self.caches

    @property
    def total(self) -> int:
        """With it."""
        return self.least + self.embedding


def gpu_plan(manifest: Manifest, tokens: int, max_new_tokens: int) -> GpuMemory:
    """What a GPU holds for a prompt and its answer, each segment with the whole prompt in its caches.

    Args:
        manifest: of the bundle.
        tokens: of the prompt.
        max_new_tokens: of the answer.
    """
    lengths = worst_lengths(manifest, tokens)
    return GpuMemory(
        weights=sum(manifest.graphs.values()),
        caches=sum(cache_bytes(manifest, index, n, max_new_tokens) for index, n in enumerate(lengths)),
        embedding=table_bytes(manifest),
    )


def table_bytes(manifest: Manifest) -> int:
    """Bytes of the embedding table on a device, in the bundle's type; rows that no token names stay on the host."""
    record = manifest.embedding
    return record.rows * record.width * FLOAT_BYTES[manifest.model.dtype]


def memory_plan(
    manifest: Manifest,
    tokens: int,
    visual: int | None = None,
    max_new_tokens: int = 128,
    *,
    lengths: Sequence[int] | None = None,
) -> MemoryPlan:
    """Plan the memory of one generation; see the module for the formula.

    Args:
        manifest: of the bundle.
        tokens: of the prompt.
        visual: tokens among them that are visual; None takes all.
        max_new_tokens: cache slots behind the prompt.
        lengths: tokens in each segment; None takes the worst case, in which every segment gets the whole prompt.
    """
    visual = tokens if visual is None else visual
    lengths = worst_lengths(manifest, tokens) if lengths is None else tuple(lengths)
    if len(lengths) != len(manifest.segments):
        raise PromptError(f"{len(lengths)} lengths for {len(manifest.segments)} segments: give one for each")
    caches = tuple(cache_bytes(manifest, index, n, max_new_tokens) for index, n in enumerate(lengths))
    process = BASE + TOKENIZER_FACTOR * manifest.files["tokenizer.json"].size
    tower = _tower_bytes(manifest, visual)
    segment = max(_segment_bytes(manifest, record, n) for record, n in zip(manifest.segments, lengths, strict=True))
    states = 3 + manifest.vision.deepstack + max(record.deepstack for record in manifest.segments)
    model = manifest.model
    rows = tokens * (states * model.hidden_size + model.head_dim) * FLOAT_BYTES[model.dtype]
    rows += tokens * (model.hidden_size + model.head_dim) * FLOAT if _is_half(manifest) else 0
    weights = _weight_bytes(manifest)
    vision_peak = process + weights + tower + _video_bytes(manifest, visual)
    return MemoryPlan(
        process=process,
        weights=weights,
        embedding=_embedding_bytes(manifest, tokens - visual + max_new_tokens),
        activations=segment + tower - round(OVERLAP * min(segment, tower)),
        rows=rows,
        caches=sum(caches),
        vision_peak=vision_peak if visual else 0,
        lengths=lengths,
        caches_by_segment=caches,
    )


def worst_lengths(manifest: Manifest, tokens: int) -> tuple[int, ...]:
    """The whole prompt in every segment."""
    return (tokens,) * len(manifest.segments)


def expected_lengths(manifest: Manifest, tokens: int, visual: int, cost: float | None = None) -> tuple[int, ...]:
    """Where an adaptive bundle reduces: the last segment holds the text and the share `cost` of the visual tokens.

    The segments before it are taken to hold all, an upper bound: which of them reduces depends on the video.
    """
    lengths = worst_lengths(manifest, tokens)
    if manifest.reduction.mode != "adaptive":
        return lengths
    cost = manifest.reduction.cost if cost is None else cost
    check_cost(cost, 1 / manifest.model.num_layers)
    return (*lengths[:-1], tokens - visual + round(cost * visual))


def _weight_bytes(manifest: Manifest) -> int:
    """Bytes of all weights, each graph's by itself: in fp32, but for codes."""
    coded = _coded_bytes(manifest)
    floats = sum(manifest.graphs.values()) - coded.stored
    return floats * FLOAT // FLOAT_BYTES[manifest.model.dtype] + coded.packed


class _CodedBytes(NamedTuple):
    """What linear maps that are codes take: in the files of all graphs, and in memory."""

    stored: int
    packed: int


def _coded_bytes(manifest: Manifest) -> _CodedBytes:
    """Bytes of all linear maps that are codes, each graph's by itself.

    A manifest counts the maps of each format and does not name them. Where all are codes the head's format is the last,
    else the head is taken to be floats; the maps of layers are taken to have each format in equal shares.
    """
    record = manifest.quantization
    if record is None or not record.formats:
        return _CodedBytes(0, 0)
    model = manifest.model
    attention = 2 * model.hidden_size * model.head_dim * (model.num_heads + model.num_kv_heads)
    mlp = 3 * model.hidden_size * model.intermediate_size
    head = record.formats[-1] if record.floats == 0 else None
    maps = MAPS_OF_A_LAYER * model.num_layers
    of_a_block = FLOAT * (HALF_PARTS if _is_half(manifest) else PARTS)
    shares = {form: (form.linears - (form is head)) / maps for form in record.formats}
    stored = 0.0
    packed = 0.0
    for segment in manifest.segments:
        graphs = len(segment.graphs)
        layers = len(segment.attention_layers) * attention + segment.num_mlps * mlp
        weights = {form: graphs * layers * share for form, share in shares.items()}
        if segment.head and head is not None:
            weights[head] += graphs * model.hidden_size * model.vocab_size
        for form, count in weights.items():
            blocks = count / (form.block or model.hidden_size)  # 0: a row is a block
            zero = 0.0 if form.symmetric else form.bits / 8
            stored += count * form.bits / 8 + blocks * (FLOAT_BYTES[model.dtype] + zero)
            packed += count * form.bits / 8 + blocks * of_a_block
    return _CodedBytes(round(stored), round(packed))


def _is_half(manifest: Manifest) -> bool:
    """Whether rows and caches are in a type of two bytes."""
    return FLOAT_BYTES[manifest.model.dtype] < FLOAT


def _activations(manifest: Manifest, numbers: int) -> int:
    """Bytes of so many numbers in the arena."""
    return round(numbers * FLOAT * (WITH_CAST if _is_half(manifest) else 1))


def _embedding_bytes(manifest: Manifest, touched: int) -> int:
    """Bytes of the mapped table that `touched` tokens bring into memory."""
    record = manifest.embedding
    row = record.width * (FLOAT if record.dtype == "float32" else 2)
    return min(record.rows * row, touched * max(row, PAGE))


def _tower_bytes(manifest: Manifest, visual: int) -> int:
    """Bytes of the tower's activations for `visual` tokens."""
    vision = manifest.vision
    at_once = max(PATCHES_AT_ONCE, vision.settings.whole_picture())  # never less than one picture
    patches = min(round(visual * vision.patches_per_token), at_once)
    return _activations(manifest, patches * (2 * vision.mlp_width + 9 * vision.embed_dim))


def _video_bytes(manifest: Manifest, visual: int) -> int:
    """Patches of the video, and the tokens that the tower makes of them."""
    patches = visual * round(manifest.vision.patches_per_token * manifest.vision.patch_width)
    rows = _activations(manifest, visual * (1 + manifest.vision.deepstack) * manifest.model.hidden_size)
    return rows + (patches if manifest.vision.input == "uint8" else _activations(manifest, patches))


def _segment_bytes(manifest: Manifest, record: SegmentRecord, length: int) -> int:
    """Bytes of a segment's activations for `length` tokens."""
    model = manifest.model
    fixed = manifest.fixed
    attention = 6 * model.hidden_size
    widest = 4 * model.intermediate_size + 5 * model.hidden_size if record.num_mlps else attention
    scores = model.num_heads * SCORE if _is_half(manifest) else 0
    if fixed is not None:  # one run of many lengths: what one layer left is too small or too large for the next
        return _activations(manifest, max(fixed.lengths) * widest) + scores * max(fixed.lengths) ** 2
    size = bucket_for(record, length)
    longest = max(end - start for start, end in chunks_of(record, size, CHUNK))
    through_mlp = _activations(manifest, longest * widest)
    through_attention = _activations(manifest, longest * attention) + scores * longest * size
    return max(through_mlp, through_attention)


def cache_bytes(manifest: Manifest, index: int, length: int, max_new_tokens: int) -> int:
    """Bytes of a segment's caches for `length` tokens that enter it, and an answer."""
    record = manifest.segments[index]
    fixed = manifest.fixed
    slot = slot_bytes(manifest)
    if fixed is not None:
        return slot * sum(max(n, min(length, n) + max_new_tokens) for n in fixed.lengths)
    return slot * len(record.attention_layers) * max(bucket_for(record, length), length + max_new_tokens)


def slot_bytes(manifest: Manifest) -> int:
    """Bytes of one token's key and value in one layer."""
    model = manifest.model
    return 2 * model.num_kv_heads * model.head_dim * manifest.cache_number_bytes
