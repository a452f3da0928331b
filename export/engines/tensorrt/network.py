"""From an ONNX graph of the portable dialect to a TensorRT network whose attentions know their caches.

    1. the cache axes are made static in the loaded proto; the weights stay in their file beside the graph
    2. the parser makes a network, and two silent mistakes with it: it drops `nonpad_kv_seqlen` and takes
       `is_causal` as aligned to the upper left, so that a decode would see the whole cache, unwritten slots included
    3. each attention over a cache gets back the valid length, and its causal mask is aligned to the lower right

           past_key_j -> KV_CACHE_UPDATE -> (scale) -> ATTENTION_INPUT      key_value_lengths <- int32(kv_len)[j]

       j is read from the cache that feeds the attention, never from the order of the layers
    4. where a target is older than Ampere, products in fp32 become factors and a sum: the library has none for Turing
    5. everything is read back from the finished network and refused if it is not so (`check_network`)

The parser's factor on the keys is left: the compiler folds it (the same kernels with and without it). Knows no profile
and no bundle.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import onnx

from framefusion.errors import BackendError, BundleError
from framefusion.export.engines.builder import EngineSpec
from framefusion.export.engines.tensorrt.api import (
    Attention,
    Builder,
    Layer,
    Network,
    Parser,
    ParserError,
    Tensor,
)
from framefusion.export.engines.tensorrt.plain import rewrite_plain
from framefusion.export.engines.tensorrt.profiles import read_model
from framefusion.runtime.backends.kv_cache import rows_name
from framefusion.runtime.backends.tensorrt.library import AMPERE, Library, is_plain

KV_LENGTHS = "kv_len"
CAPACITY = "capacity"  # begins the names of cache axes in the graphs
SMALLEST_HEAD = 16  # channels for which there are fused attention kernels; below them it is taken apart
_CACHE = re.compile(r"past_(key|value)_(\d+)")
_LAYERS = {"ATTENTION_INPUT", "ATTENTION_OUTPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING"}  # no plain network has them
_TRANSPARENT = ("ELEMENTWISE", "CAST", "IDENTITY", "SHUFFLE")  # what the parser puts between a cache and its attention


class Parsed(NamedTuple):
    """A network, and the parser that owns the memory of its weights: keep both until the engine is built."""

    network: Network
    parser: Parser


class CachedAttention(NamedTuple):
    """An attention and the layer whose cache it reads; None where it reads none."""

    attention: Attention
    name: str
    cache: int | None


def parse_spec(library: Library, builder: Builder, spec: EngineSpec, targets: Sequence[str]) -> Parsed:
    """A network of a graph, complete and checked: see `parse_graph` and `parse_plain`."""
    if not is_plain(spec.options):
        return parse_graph(library, builder, spec.graph, spec.capacities, targets)
    return parse_plain(library, builder, spec.graph, len(spec.capacities), spec.options["one_length"])


def parse_graph(
    library: Library, builder: Builder, graph: Path, capacities: Sequence[int], targets: Sequence[str] = ()
) -> Parsed:
    """A network of a graph, complete and checked.

    Args:
        library: what builds.
        builder: of that library; it must outlive the network.
        graph: ONNX with external weights.
        capacities: slots of each layer's cache, in the graph's order.
        targets: compute capabilities that it is going to be built for.

    Raises:
        BundleError: the graph cannot be read, or its caches are not as many as the capacities.
        BackendError: the library refuses a node, or the network is not what the graph says.
    """
    network, parser = _parsed(library, builder, graph, static_caches(graph, capacities))
    mask_attentions(library, network)
    if any(float(target) < AMPERE for target in targets):
        spell_out_products(library, network)
    check_network(library, network, graph, len(capacities))
    return Parsed(network, parser)


def parse_plain(library: Library, builder: Builder, graph: Path, caches: int, one_length: bool) -> Parsed:
    """A network of a graph without the library's layers for attention, complete and checked.

    Args:
        library: what builds.
        builder: of that library; it must outlive the network.
        graph: ONNX with external weights.
        caches: how many it has.
        one_length: they are equally long.

    Raises:
        BundleError: the graph cannot be read or rewritten, or has another number of caches.
        BackendError: the library refuses a node, or the network is not what the graph says.
    """
    model = read_model(graph)
    _check_weights(graph, model)
    given = [value.name for value in model.graph.input]
    expected = [rows_name(value.name) if _is_cache(value) else value.name for value in model.graph.output]
    found = sum(_CACHE.fullmatch(name) is not None for name in given)
    if found != 2 * caches:
        raise BundleError(f"{graph} has {found // 2} caches, {caches} capacities are given: rebuild the bundle")
    rewrite_plain(model, graph, one_length)
    del model.graph.value_info[:]
    network, parser = _parsed(library, builder, graph, bytes(model.SerializeToString()))
    problems = [f"input {name} is unused" for name in _unused(network)]
    for wanted, tensors in ((given, inputs_of(network)), (expected, outputs_of(network))):
        names = [tensor.name for tensor in tensors]
        problems += [] if names == wanted else [f"it has {', '.join(names)}, not {', '.join(wanted)}"]
    problems += [f"{kind} is no plain layer" for kind in sorted(_LAYERS & layer_kinds(network).keys())]
    _refuse_problems(library, graph, problems)
    return Parsed(network, parser)


def _parsed(library: Library, builder: Builder, graph: Path, proto: bytes) -> Parsed:
    """What the parser makes of a proto whose weights lie beside the graph."""
    network = builder.create_network(1 << int(library.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.module.OnnxParser(network, library.messages)
    if not parser.parse(proto, str(graph)):
        errors = [_error_text(parser.get_error(i)) for i in range(parser.num_errors)]
        raise BackendError(f"{library.kind} {library.version} refuses {graph}: {'; '.join(errors) or library.reason()}")
    return Parsed(network, parser)


def _is_cache(value: onnx.ValueInfoProto) -> bool:
    return value.name.startswith("present_")


def static_caches(graph: Path, capacities: Sequence[int]) -> bytes:
    """The graph's proto with the cache axes as numbers; weights stay in their file."""
    model = read_model(graph)
    caches = 0
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param.startswith(CAPACITY):
                index = int(value.name.rsplit("_", 1)[1])
                caches = max(caches, index + 1)
                if index < len(capacities):
                    axis.dim_value = capacities[index]  # clears dim_param, which is of the same oneof
    if caches != len(capacities):
        raise BundleError(f"{graph} has {caches} caches, {len(capacities)} capacities are given: rebuild the bundle")
    _check_weights(graph, model)
    del model.graph.value_info[:]  # said with the symbols that are numbers now
    return bytes(model.SerializeToString())


def _check_weights(graph: Path, model: onnx.ModelProto) -> None:
    """The parser would name a tensor, not the file that it misses."""
    ends: dict[str, int] = {}
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            end = int(place.get("offset", 0)) + int(place["length"])
            ends[place["location"]] = max(end, ends.get(place["location"], 0))
    for name, end in ends.items():
        path = graph.parent / name
        size = path.stat().st_size if path.is_file() else 0
        if size < end:
            raise BundleError(f"{path} has {size} bytes, {graph.name} reads {end}: copy the bundle again or rebuild it")


def mask_attentions(library: Library, network: Network) -> None:
    """Give every attention over a cache its valid length and its mask; leave the others alone."""
    module = library.module
    lengths = {tensor.name: tensor for tensor in inputs_of(network)}.get(KV_LENGTHS)
    in_32_bits: Tensor | None = None
    for attention, name, cache in attentions_of(module, network):
        smallest = min(int(attention.get_input(i).shape[-1]) for i in range(2))
        attention.decomposable = smallest < SMALLEST_HEAD
        if cache is None:
            continue
        if lengths is None:
            raise BackendError(f"attention {name} reads cache {cache}, and the graph has no {KV_LENGTHS}: rebuild it")
        if in_32_bits is None:
            in_32_bits = network.add_cast(lengths, module.int32).get_output(0)
        attention.key_value_lengths = network.add_slice(in_32_bits, (cache,), (1,), (1,)).get_output(0)
        attention.causal_kind = module.CausalMaskKind.LOWER_RIGHT


def spell_out_products(library: Library, network: Network) -> None:
    """[..., m, k] x [..., k, n] in fp32 as a sum over k of [..., m, k, 1] * [..., 1, k, n]; the compiler fuses the two.

    Only the few query rows of the importance are multiplied in fp32.
    """
    module = library.module
    for layer in layers_of(network):
        out = layer.get_output(0)
        if _kind(layer) != "MATRIX_MULTIPLY" or out.dtype != module.float32:
            continue
        left = _input(layer, 0)
        right = _input(layer, 1)
        rank = len(left.shape)
        factors = (_unsqueezed(network, left, rank), _unsqueezed(network, right, rank - 2))
        products = network.add_elementwise(*factors, module.ElementWiseOperation.PROD).get_output(0)
        summed = network.add_reduce(products, module.ReduceOperation.SUM, 1 << (rank - 1), False).get_output(0)
        for consumer in layers_of(network):
            for index in range(consumer.num_inputs):
                feed = consumer.get_input(index)
                if feed is not None and feed.name == out.name:
                    consumer.set_input(index, summed)


def _unsqueezed(network: Network, tensor: Tensor, axis: int) -> Tensor:
    place = network.add_constant((1,), np.array([axis], np.int64)).get_output(0)
    return network.add_unsqueeze(tensor, place).get_output(0)


def check_network(library: Library, network: Network, graph: Path, caches: int) -> None:
    """Refuse a network that would compute something else than its graph, without an error at run time.

    1. every cache is updated in place and read by one attention, with its own valid length and LOWER_RIGHT
    2. an attention that reads no cache has neither; and no input is unused

    Raises:
        BackendError: names the layer.
    """
    try:
        problems = [
            *_wrong_attentions(library.module, network, caches),
            *_wrong_updates(library.module, network, caches),
        ]
    except RuntimeError as error:  # the bindings' class for a shape that does not follow
        problems = [f"its shapes do not follow from one another ({library.reason() or error})"]
    problems += [f"input {name} is unused" for name in _unused(network)]
    _refuse_problems(library, graph, problems)


def _refuse_problems(library: Library, graph: Path, problems: Sequence[str]) -> None:
    if problems:
        raise BackendError(
            f"{library.kind} {library.version} reads {graph} as something else: {'; '.join(problems)}. "
            "No engine was built; upgrade framefusion-aot, or build with a version of the library that it knows"
        )


def inputs_of(network: Network) -> list[Tensor]:
    """Its input tensors."""
    return [network.get_input(i) for i in range(network.num_inputs)]


def outputs_of(network: Network) -> list[Tensor]:
    """Its output tensors."""
    return [network.get_output(i) for i in range(network.num_outputs)]


def layers_of(network: Network) -> list[Layer]:
    """All layers."""
    return [network.get_layer(i) for i in range(network.num_layers)]


def layer_kinds(network: Network) -> dict[str, int]:
    """How many layers of each kind: KV_CACHE_UPDATE, MATRIX_MULTIPLY, ..."""
    return dict(sorted(Counter(_kind(layer) for layer in layers_of(network)).items()))


def attentions_of(module: ModuleType, network: Network) -> Iterator[CachedAttention]:
    """All attentions, each with the index of the cache that its keys come from."""
    makers = _makers(network)
    for layer in layers_of(network):
        if _kind(layer) == "ATTENTION_INPUT":
            attention = _as(layer, module.IAttentionInputLayer).attention
            yield CachedAttention(attention, layer.name, _cache_of(attention.get_input(1), makers, "key"))


def _wrong_attentions(module: ModuleType, network: Network, caches: int) -> Iterator[str]:
    makers = _makers(network)
    read = list[int]()
    for attention, name, cache in attentions_of(module, network):
        kind = attention.causal_kind
        lengths = attention.key_value_lengths
        if cache is None:
            if kind != module.CausalMaskKind.NONE or lengths is not None:
                yield f"attention {name} reads no cache and has a causal mask or lengths"
            continue
        read.append(cache)
        if kind != module.CausalMaskKind.LOWER_RIGHT:
            yield f"attention {name} has causal mask {kind.name}, not LOWER_RIGHT"
        if lengths is None:
            yield f"attention {name} has no valid length"
        elif _length_index(module, lengths, makers) != cache:
            yield f"attention {name} reads cache {cache} and the valid length of another"
        if _cache_of(attention.get_input(2), makers, "value") != cache:
            yield f"attention {name} takes keys of cache {cache} and values of another"
    if sorted(read) != list(range(caches)):
        yield f"attentions read the caches {sorted(read)} of {caches}"


def _wrong_updates(module: ModuleType, network: Network, caches: int) -> Iterator[str]:
    input_names = {tensor.name for tensor in inputs_of(network)}
    output_names = {tensor.name for tensor in outputs_of(network)}
    updated: list[str] = []
    for layer in layers_of(network):
        if _kind(layer) != "KV_CACHE_UPDATE":
            continue
        before = _input(layer, 0)
        after = layer.get_output(0)
        if (
            before.name not in input_names
            or after.name not in output_names
            or after.name != before.name.replace("past", "present")
        ):
            yield f"cache update {layer.name} writes {before.name} to {after.name}, not in place"
        if before.dtype != after.dtype or tuple(before.shape) != tuple(after.shape) or -1 in before.shape:
            yield f"cache update {layer.name} changes type or shape of {before.name}, or has no static one"
        updated.append(before.name)
    expected = sorted(f"past_{part}_{j}" for j in range(caches) for part in ("key", "value"))
    if sorted(updated) != expected:
        yield f"the caches that are updated are {sorted(updated)}, not {expected}"


def _unused(network: Network) -> list[str]:
    used = {tensor.name for layer in layers_of(network) for tensor in _feeds(layer)}
    return [tensor.name for tensor in inputs_of(network) if tensor.name not in used]


def _cache_of(tensor: Tensor, makers: Mapping[str, Layer], part: str) -> int | None:
    """Index of the cache that a tensor is, up to a factor; None where it comes from elsewhere."""
    maker = makers.get(tensor.name)
    if maker is None:
        return None
    if _kind(maker) == "KV_CACHE_UPDATE":
        match = _CACHE.fullmatch(_input(maker, 0).name)
        return int(match[2]) if match and match[1] == part else None
    if _kind(maker) not in _TRANSPARENT:
        return None
    caches = (_cache_of(feed, makers, part) for feed in _feeds(maker))
    return next((cache for cache in caches if cache is not None), None)


def _length_index(module: ModuleType, lengths: Tensor, makers: Mapping[str, Layer]) -> int | None:
    """j of int32(kv_len)[j : j + 1]; None for anything else."""
    cut = makers.get(lengths.name)
    if cut is None or _kind(cut) != "SLICE" or lengths.dtype != module.int32 or tuple(lengths.shape) != (1,):
        return None
    cast = makers.get(_input(cut, 0).name)
    if cast is None or _kind(cast) != "CAST" or _input(cast, 0).name != KV_LENGTHS:
        return None
    return int(_as(cut, module.ISliceLayer).start[0])


def _makers(network: Network) -> dict[str, Layer]:
    """Tensor -> the layer it comes out of."""
    return {layer.get_output(i).name: layer for layer in layers_of(network) for i in range(layer.num_outputs)}


def _feeds(layer: Layer) -> list[Tensor]:
    """Tensors that go into a layer; optional ones that are not given are left out."""
    return [tensor for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None]


def _input(layer: Layer, index: int) -> Tensor:
    """An input that every layer of its kind has."""
    tensor = layer.get_input(index)
    assert tensor is not None, f"{layer.name} has no input {index}"
    return tensor


def _kind(layer: Layer) -> str:
    return str(layer.type.name)


def _as(layer: Layer, kind: type) -> Any:
    """The layer as its own class: the bindings give all layers as the class they share."""
    layer.__class__ = kind
    return layer


def _error_text(error: ParserError) -> str:
    """A parser's error: the node, what it is, and why."""
    return f"node {error.node_name() or error.node()} ({error.node_operator() or 'no operator'}): {error.desc()}"
