"""What decides the bytes of an engine: a graph, its caches, and the sizes that it is built for. No library, no GPU.

A segment has static profiles: one for each prefill bucket, one for a decode of two tokens, the second of which is
padding, and one for a token of each of 2, 4, 8 requests, whose rows are padded up to the next of these. They share the
weights and each costs its code alone, CODE_BYTES. A profile of one token would get a copy of all weights. Ranges of
rows would be compiled for each number of them on the user's GPU, and cost as much code as two static shapes.

A tower has ranges, because pictures come in many sizes: a profile for each stretch of sizes, a quarter of the next.
The number of pictures at once is free within PATCHES_AT_ONCE patches, so one stretch never asks for the memory of many
of the largest. A range costs as much code as a static shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from framefusion.errors import BundleError
from framefusion.export.engines.builder import EngineSpec
from framefusion.export.engines.tensorrt.plain import PREFILL_SLOTS
from framefusion.export.options import MAX_BATCH_SIZE
from framefusion.runtime.backends.tensorrt.engine import DECODE
from framefusion.runtime.backends.tensorrt.library import PLAIN, plain_options
from framefusion.runtime.format.engine_record import ProfileRecord
from framefusion.runtime.format.manifest import Manifest, SegmentRecord
from framefusion.runtime.generation.embedder import PATCHES_AT_ONCE
from framefusion.runtime.media.tower_kinds import Range

DECODE_TOKENS = 2
CACHE_MULTIPLE = 16
BATCH = "batch"  # name of the axis of rows
STRETCH = 4  # the largest picture of a profile over the smallest
CODE_BYTES = 2 << 20  # of a profile: between 1.5 and 3 MB whatever the weights (TensorRT-RTX 1.7)


def segment_spec(
    folder: Path,
    manifest: Manifest,
    record: SegmentRecord,
    graph: str,
    kind: str,
    targets: Sequence[str],
    variant: str = "attention",
    max_batch_size: int | None = None,
) -> EngineSpec:
    """The engine of a segment's prefill and decode graph, or of one of them where they differ.

    Args:
        folder: the bundle.
        manifest: of it.
        record: the segment.
        graph: one of its `graphs`.
        kind: of the engine.
        targets: compute capabilities.
        variant: of the network; a plain one takes a prefill's caches as short as they are empty.
        max_batch_size: most requests that it decodes in a step; None takes MAX_BATCH_SIZE, or 1 where the graph was
            built before there were batches.

    Raises:
        BundleError: the bundle's dialect has no static sizes, or its graphs have one row.
    """
    capacities = cache_capacities(manifest, record)
    plain = variant == PLAIN
    before_prefill = (PREFILL_SLOTS,) * len(capacities) if plain else capacities
    sizes: list[tuple[str, int | None, int]] = []
    axes = graph_axes(folder / graph)
    if graph == record.prefill:
        if manifest.fixed is not None:
            sizes.append(("prefill", None, 1))
        elif record.buckets is None:
            raise BundleError(
                f"{folder} is of the {manifest.dialect} dialect, which has no static sizes for {kind} to be built for: "
                "build it with --dialect portable"
            )
        else:
            sizes += [(f"prefill {size}", size, 1) for size in record.buckets]
    if graph == record.decode:
        sizes.append((DECODE, DECODE_TOKENS, 1))
        sizes += [(f"{DECODE} {rows} rows", 1, rows) for rows in _batch_sizes(folder / graph, axes, max_batch_size)]
    profiles = tuple(
        _segment_profile(name, size, axes, capacities if name.startswith(DECODE) else before_prefill, rows)
        for name, size, rows in sizes
    )
    options = plain_options(one_length=manifest.fixed is None) if plain else {}
    return EngineSpec(folder / graph, kind, tuple(targets), manifest.model.dtype, capacities, profiles, options)


def tower_spec(
    folder: Path, manifest: Manifest, kind: str, targets: Sequence[str], variant: str = "attention"
) -> EngineSpec:
    """The engine of the vision tower."""
    axes = graph_axes(folder / manifest.vision.graph)
    profiles = tower_profiles(manifest, axes)
    options = plain_options() if variant == PLAIN else {}
    return EngineSpec(folder / manifest.vision.graph, kind, tuple(targets), manifest.model.dtype, (), profiles, options)


def cache_capacities(manifest: Manifest, record: SegmentRecord) -> tuple[int, ...]:
    """Slots of each layer of a segment: a full cache or the largest bucket, and the padding of a decode step.

    In the fixed mode a layer's prompt is as long as the reductions before it leave it.
    """
    limits = manifest.limits
    fixed = manifest.fixed
    answer = limits.max_kv_cache_capacity - limits.max_input_len
    if fixed is not None:
        slots = [fixed.lengths[layer] + answer for layer in record.attention_layers]
    else:
        slots = [max(limits.max_kv_cache_capacity, *(record.buckets or (0,)))] * len(record.attention_layers)
    return tuple(_multiple(count + DECODE_TOKENS - 1, CACHE_MULTIPLE) for count in slots)


def graph_axes(graph: Path) -> dict[str, tuple[int | str, ...]]:
    """Inputs of a graph and their axes: numbers where static, names where free."""
    return {
        value.name: tuple(axis.dim_param or int(axis.dim_value) for axis in value.type.tensor_type.shape.dim)
        for value in read_model(graph).graph.input
    }


def read_model(graph: Path) -> onnx.ModelProto:
    """The proto of a graph without its weights.

    Raises:
        BundleError: there is none.
    """
    try:
        return onnx.load(str(graph), load_external_data=False)
    except Exception as error:  # protobuf's and the file system's classes have nothing in common
        raise BundleError(f"{graph} is no readable ONNX graph ({error}): copy the bundle again or rebuild it") from None


def weight_bytes(graph: Path) -> int:
    """Bytes of the weights that a graph reads from its file."""
    places = (entry for tensor in read_model(graph).graph.initializer for entry in tensor.external_data)
    return sum(int(entry.value) for entry in places if entry.key == "length")


def _segment_profile(
    name: str, tokens: int | None, axes: Mapping[str, Sequence[int | str]], capacities: Sequence[int], rows: int = 1
) -> ProfileRecord:
    """One shape for each input; the fixed prefill has no free axis but the caches'."""
    sizes = {f"capacity_{j}": size for j, size in enumerate(capacities)} | ({"tokens": tokens} if tokens else {})
    sizes |= row_axes(rows, len(capacities))
    shapes = {
        value: (tuple(axis if isinstance(axis, int) else sizes[axis] for axis in shape),)
        for value, shape in axes.items()
    }
    return ProfileRecord(name, tokens or shapes["hidden"][0][1], shapes)


def batch_sizes(most: int) -> tuple[int, ...]:
    """Rows of the profiles of a step for up to so many requests: powers of two and the most; none for one request."""
    return tuple(sorted({most, *(1 << power for power in range(1, most.bit_length()))})) if most > 1 else ()


def _batch_sizes(graph: Path, axes: Mapping[str, Sequence[int | str]], max_batch_size: int | None) -> tuple[int, ...]:
    """The same, of a graph that may have one row."""
    is_batched = axes["hidden"][0] == BATCH
    if max_batch_size is not None and max_batch_size > 1 and not is_batched:
        raise BundleError(
            f"{graph} takes one row, as it was built before there were batches: rebuild the bundle, or leave out "
            "--max-batch-size"
        )
    return batch_sizes(max_batch_size or MAX_BATCH_SIZE) if is_batched else ()


def row_axes(rows: int, layers: int) -> dict[str, int]:
    """Axes of a graph that is free in its rows, by their names: see export/graphs/decoder.py."""
    return {BATCH: rows, "lengths": rows * layers}


def one_row_axes(layers: int) -> dict[str, int]:
    """The same of a single row."""
    return row_axes(1, layers)


def most_rows(profiles: Sequence[ProfileRecord]) -> int:
    """Rows that the largest of a segment's profiles takes at once; 1 where there are none."""
    return max((shapes[-1][0] for profile in profiles for shapes in [profile.shapes.get("hidden", ((1,),))]), default=1)


def tower_profiles(manifest: Manifest, axes: Mapping[str, Sequence[int | str]]) -> tuple[ProfileRecord, ...]:
    """A profile for each stretch of picture sizes, the smallest first.

    Args:
        manifest: its preprocessing says how large pictures may be, its tower what follows from that.
        axes: of the tower's inputs: numbers where static, names where free.
    """
    settings = manifest.vision.settings
    count, patches = axes["patches"][:2]
    stretches = [(patches, patches)] if isinstance(patches, int) else _stretches(*picture_patches(manifest))
    profiles = []
    for low, high in stretches:
        axis_ranges = {str(count): _at_once(low, high), str(patches): (low, high, high), **settings.ranges(low, high)}
        shapes = {name: _ranged(shape, axis_ranges) for name, shape in axes.items()}
        profiles.append(ProfileRecord(f"pictures of up to {high} patches", None, shapes))
    return tuple(profiles)


def picture_patches(manifest: Manifest) -> tuple[int, int, int]:
    """Fewest and most patches of a picture that fits into a prompt, and what they are multiples of."""
    settings = manifest.vision.settings
    (least, most) = manifest.preprocessing.picture_patches()
    longest = round(manifest.limits.max_input_len * manifest.vision.patches_per_token) + settings.rowless_patches()
    step = settings.patch_step()
    most = max(least, min(most, longest))
    return least, most - most % step, step


def _stretches(least: int, most: int, step: int) -> list[tuple[int, int]]:
    """From the least to the most, in multiples of `step`; each stretch ends at about STRETCH times its begin."""
    ends = [most]
    while ends[-1] // STRETCH > least:
        ends.append(_multiple(ends[-1] // STRETCH, step))
    ends.reverse()
    return list(zip([least, *(end + step for end in ends[:-1])], ends, strict=True))


def _at_once(low: int, high: int) -> Range:
    """Pictures of one call, as `Pipeline` makes them."""
    return 1, max(1, PATCHES_AT_ONCE // high), max(1, PATCHES_AT_ONCE // low)


def _ranged(shape: Sequence[int | str], axis_ranges: Mapping[str, Range]) -> tuple[tuple[int, ...], ...]:
    """(min, opt, max) of a shape, or one where nothing is free."""
    by_axis = [(axis,) * 3 if isinstance(axis, int) else axis_ranges[axis] for axis in shape]
    shapes = tuple(zip(*by_axis, strict=True))
    return shapes[:1] if len(set(shapes)) == 1 else shapes


def _multiple(size: int, step: int) -> int:
    return -(-size // step) * step
