"""What the fields of a manifest have to do with each other and with the recorded sizes of the files.

Types and ranges hold already (manifest_rules.py). Whatever is inconsistent here would be a wrong answer or a failure in
the middle of one later. Reads no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from framefusion.runtime.backends.table import backend, engine_kinds
from framefusion.runtime.format.manifest import FLOAT_BYTES, Manifest, ReductionRecord
from framefusion.runtime.text.prompt import ROLES
from framefusion.storage.records import RecordError

TOKENIZER = "tokenizer.json"
WEIGHTS = "weights.bin"
PAGE = 4096  # bytes that weights are aligned to
MOST_PIXELS = 1 << 26  # of a picture as the tower sees it, tiles and all
DIALECTS = ("gqa", "portable")

Problem = tuple[str, str]
"""Where, and what is wrong there."""


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest that contradicts itself.

    Raises:
        RecordError: with the place and both values.
    """
    for check in (
        _model,
        _limits,
        _reduction,
        _caches,
        _segments,
        _files,
        _vision,
        _pictures,
        _prompt,
        _engines,
        _report,
    ):
        for where, problem in check(manifest):
            raise RecordError(f"{where}: {problem}")


def _model(manifest: Manifest) -> Iterator[Problem]:
    model = manifest.model
    if model.dtype not in FLOAT_BYTES:
        yield "model.dtype", f"expected one of {', '.join(FLOAT_BYTES)}, found {ascii(model.dtype)[:60]}"
    if model.num_heads % model.num_kv_heads:
        yield "model.num_kv_heads", f"{model.num_heads} heads are no multiple of {model.num_kv_heads}"
    if model.head_dim % 2:
        yield "model.head_dim", f"{model.head_dim} is odd, channels turn in pairs"
    section = model.mrope_section
    if section is not None and (len(section) != 3 or sum(section) != model.head_dim // 2):
        yield "model.mrope_section", f"{section} are no three parts of {model.head_dim // 2} pairs of channels"
    if manifest.dialect not in DIALECTS:
        yield "dialect", f"expected one of {', '.join(DIALECTS)}, found {ascii(manifest.dialect)[:60]}"


def _caches(manifest: Manifest) -> Iterator[Problem]:
    """Caches in another type are those of the graphs that say so, and no engine has such."""
    if manifest.kv_cache is None:
        return
    if manifest.dialect != "gqa" or manifest.fixed is not None or manifest.engines:
        yield "kv_cache", f"caches in {manifest.kv_cache.dtype} are of the dialect gqa, without engines and schedule"


def _limits(manifest: Manifest) -> Iterator[Problem]:
    limits = manifest.limits
    if limits.max_input_len > limits.max_kv_cache_capacity:
        yield (
            "limits",
            f"an input of {limits.max_input_len} does not fit {limits.max_kv_cache_capacity} slots of KV cache",
        )
    known = max(manifest.model.vocab_size, manifest.embedding.rows)
    if any(token >= known for token in manifest.generation.eos_token_ids or ()):
        yield "generation.eos_token_ids", f"{manifest.generation.eos_token_ids} are beyond {known} tokens"


def _reduction(manifest: Manifest) -> Iterator[Problem]:
    record = manifest.reduction
    fixed = manifest.fixed
    layers = manifest.model.num_layers
    is_fixed = record.mode == "fixed"
    if is_fixed != (fixed is not None) or is_fixed != (record.schedule is not None):
        yield "reduction.mode", f"{record.mode} does not agree with whether there is a schedule and its sizes"
    if record.depth is not None and record.depth >= layers:
        yield "reduction.depth", f"{record.depth} is beyond {layers} layers"
    if record.mode == "adaptive":
        yield from _adaptive(record, layers)
    if fixed is None or record.schedule is None:
        return
    size = fixed.max_text + fixed.max_visual
    if len(fixed.lengths) != layers or max(fixed.lengths) > size:
        yield "fixed.lengths", f"{len(fixed.lengths)} lengths of {layers} layers, at most {size} tokens each"
    if len(fixed.drops) != len(record.schedule.merge_shares) + 1 or sum(fixed.drops) >= size:
        yield "fixed.drops", f"{fixed.drops} do not fit the schedule, or leave nothing of {size} tokens"
    if record.schedule.prune_layer >= layers:
        yield "reduction.schedule.prune_layer", f"{record.schedule.prune_layer} is beyond {layers} layers"
    if size > manifest.limits.max_input_len:
        yield "fixed", f"{size} tokens are more than the longest input, {manifest.limits.max_input_len}"


def _adaptive(record: ReductionRecord, layers: int) -> Iterator[Problem]:
    """The ranges of `policy.ReductionSettings`, where the bundle is at fault and not the request."""
    if record.depth is not None and record.depth > layers - 2:
        yield "reduction.depth", f"{record.depth} is beyond {layers - 2}, the last layer but one of {layers}"
    if not -1 <= record.similarity_lower_bound <= 1:
        yield "reduction.similarity_lower_bound", f"{record.similarity_lower_bound} is outside [-1, 1], as cosines go"
    if not 0 <= record.ratio_lower_bound < 1:
        yield "reduction.ratio_lower_bound", f"{record.ratio_lower_bound} is outside [0, 1), it is a share of tokens"


def _segments(manifest: Manifest) -> Iterator[Problem]:
    segments = manifest.segments
    layers = manifest.model.num_layers
    if not segments:
        yield "segments", "there is none"
        return
    if [layer for segment in segments for layer in segment.attention_layers] != list(range(layers)):
        yield "segments", f"their attention layers are not 0 to {layers - 1}, each once and in order"
    if sum(segment.num_mlps for segment in segments) != layers:
        yield "segments", f"they have {sum(segment.num_mlps for segment in segments)} MLPs, the model {layers}"
    if [segment.head for segment in segments] != [False] * (len(segments) - 1) + [True]:
        yield "segments", "the last one, and no other, has the head"
    if len({segment.name for segment in segments}) != len(segments):
        yield "segments", "two have one name"
    for index, segment in enumerate(segments):
        where = f"segments[{index}]"
        buckets = segment.buckets
        if not segment.attention_layers:
            yield f"{where}.attention_layers", "there is none"
        if buckets is not None and (not buckets or sorted(set(buckets)) != list(buckets)):
            yield f"{where}.buckets", f"{buckets} are not ascending"
        if max(buckets or (0,)) > manifest.limits.max_input_len:
            yield f"{where}.buckets", f"{buckets} are larger than the longest input, {manifest.limits.max_input_len}"
        if segment.deepstack > min(segment.num_mlps, manifest.vision.deepstack):
            yield f"{where}.deepstack", f"{segment.deepstack} is more than its MLPs or the tower's outputs"
        if (segment.decode_graph is not None) != (manifest.fixed is not None):
            yield f"{where}.decode_graph", "the fixed mode, and no other, has one"


def _files(manifest: Manifest) -> Iterator[Problem]:
    """Files that are used are listed, and of the size that the rest of the manifest says."""
    files = manifest.files
    record = manifest.embedding
    for name in (TOKENIZER, record.file):
        if name not in files:
            yield "files", f"{name} is not listed"
            return
    rows = record.rows + len(record.extra)
    recorded = files[record.file].size
    size = rows * record.width * FLOAT_BYTES[record.dtype]
    if size != recorded:
        yield (
            "embedding",
            f"{rows} rows of {record.width} in {record.dtype} are {size} bytes, {record.file} has {recorded}",
        )
    if record.width != manifest.model.hidden_size:
        yield "embedding.width", f"{record.width} is not the model's hidden_size {manifest.model.hidden_size}"
    for where, graph, weight_bytes in _graphs(manifest):
        weights = files.get(str(PurePosixPath(graph).parent / WEIGHTS))
        if weights is not None and not 0 <= weight_bytes - weights.size < PAGE:  # the last tensor is not padded
            yield f"{where}.weight_bytes", f"{weight_bytes} is not the file's {weights.size}, rounded up to pages"


def _graphs(manifest: Manifest) -> Iterator[tuple[str, str, int]]:
    """Place in the manifest, name and bytes of weights of each graph."""
    yield "vision", manifest.vision.graph, manifest.vision.weight_bytes
    for index, segment in enumerate(manifest.segments):
        for graph in segment.graphs:
            yield f"segments[{index}]", graph, segment.weight_bytes


def _prompt(manifest: Manifest) -> Iterator[Problem]:
    turns = manifest.prompt.turns
    if "user" not in turns or not set(turns) <= set(ROLES):
        yield "prompt.turns", f"they are of {ascii(sorted(turns))[:60]}, expected user and others of {', '.join(ROLES)}"


def _vision(manifest: Manifest) -> Iterator[Problem]:
    vision = manifest.vision
    preprocessing = manifest.preprocessing
    depth = preprocessing.frames_per_patch()
    side = preprocessing.patch_size
    if vision.patch_width != 3 * depth * side**2:
        yield "vision.patch_width", f"{vision.patch_width} is not 3 * {depth} * {side} * {side}, a patch's numbers"
    if vision.input == "uint8" and not preprocessing.byte_patches:
        yield "vision.input", f"the tower takes bytes, {preprocessing.rule} gives floats"
    blocks = vision.settings.block_side()
    expected = preprocessing.block_side()
    if blocks is not None and blocks != expected:
        yield "vision.settings.merge_size", f"{blocks} is not the preprocessing's {expected}"


def _pictures(manifest: Manifest) -> Iterator[Problem]:
    """However small a picture is, it may become as large as this says: that much memory is taken before one is read."""
    pixels = manifest.preprocessing.most_pixels()
    if pixels > MOST_PIXELS:
        yield "preprocessing", f"pictures of {pixels} pixels, the limit is {MOST_PIXELS}"


def _report(manifest: Manifest) -> Iterator[Problem]:
    """What a check reported is for people, but for the tolerance that the next one takes."""
    tolerance = manifest.check.get("tolerance")
    if tolerance is not None and (type(tolerance) not in (int, float) or not 0 < tolerance < 1e6):
        yield "check.tolerance", f"expected a number above 0, found {ascii(tolerance)[:60]}"


def _engines(manifest: Manifest) -> Iterator[Problem]:
    graphs: dict[str, Sequence[int] | None] = {manifest.vision.graph: None}
    for segment in manifest.segments:
        graphs |= dict.fromkeys(segment.graphs, segment.attention_layers)
    for index, engine in enumerate(manifest.engines):
        where = f"engines[{index}]"
        if engine.kind not in engine_kinds():
            expected = ", ".join(engine_kinds())
            yield f"{where}.kind", f"expected one of {expected}, found {ascii(engine.kind)[:60]}"
        layers = graphs.get(engine.graph)
        if engine.graph not in graphs:
            yield f"{where}.graph", f"{engine.graph} is no graph of this bundle"
        if layers is not None and engine.capacities and len(engine.capacities) != len(layers):
            yield f"{where}.capacities", f"{len(engine.capacities)} caches of {len(layers)} layers"
        library = backend(engine.kind).library  # a manifest never says what is imported
        if engine.library != library:
            yield f"{where}.library", f"{engine.library} does not load {engine.kind}, {library} does"
        if engine.file not in manifest.files or not engine.file.startswith(f"engines/{engine.kind}/"):
            yield f"{where}.file", f"{engine.file} is not listed, or not in engines/{engine.kind}"
        if not engine.targets or not all(target.split() for target in engine.targets):
            yield f"{where}.targets", "there is none"
        if engine.dtype not in FLOAT_BYTES:
            yield f"{where}.dtype", f"expected one of {', '.join(FLOAT_BYTES)}, found {ascii(engine.dtype)[:60]}"
    pairs = [(engine.kind, engine.graph) for engine in manifest.engines]
    if len(set(pairs)) != len(pairs):
        yield "engines", "two of one kind stand for one graph"
