"""From an ONNX graph of the portable dialect to a TensorRT network whose attentions know their caches.

    1. the cache axes are made static in the loaded proto; the weights stay in their file beside the graph
    2. the parser makes a network, and two silent mistakes with it: it drops `nonpad_kv_seqlen` and takes
       `is_causal` as aligned to the upper left, so that a decode would see the whole cache, unwritten slots included
    3. each attention over a cache gets back the valid length, and its causal mask is aligned to the lower right

           past_key_j -> KV_CACHE_UPDATE -> (scale) -> ATTENTION_INPUT      key_value_lengths <- int32(kv_len)[j]

       of a graph that is free in its rows the lengths are [layers, rows], and those of j are a row of them;
       j is read from the cache that feeds the attention, never from the order of the layers
    4. where a reduction inside the graph takes rows of the rotary tables, it does so by GatherND: over their Gather
       TensorRT-RTX 1.7 crashes, or says that there are uses before defs, in many schedules; and INT8 in one block a
       row has its scales by rows, which it compiles
    5. where it takes several rows, a prompt's last token is taken twice: else the products behind it would be of one
       row in a prefill and of several in a batch, and have their weights twice, those of the head among them
    6. where a target is older than Ampere, products in fp32 become factors and a sum: the library has none for Turing
    7. everything is read back from the finished network and refused if it is not so (network_check.py)

The parser's factor on the keys is left: the compiler folds it (the same kernels with and without it). Knows no profile
and no bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx

from framefusion.errors import BackendError, BundleError
from framefusion.export.engines.builder import EngineSpec
from framefusion.export.engines.tensorrt.api import Builder, Network, Parser, ParserError, Tensor
from framefusion.export.engines.tensorrt.network_check import (
    KV_LENGTHS,
    attentions_of,
    check_network,
    input_of,
    inputs_of,
    kind_of,
    layer_kinds,
    layers_of,
    outputs_of,
    refuse_problems,
    unused_inputs,
)
from framefusion.export.engines.tensorrt.plain import rewrite_plain
from framefusion.export.engines.tensorrt.profiles import most_rows, one_row_axes, read_model
from framefusion.runtime.backends.kv_cache import rows_name
from framefusion.runtime.backends.tensorrt.library import AMPERE, Library, is_plain

LAST = "last"  # input: index of the last token
_SAME_INDICES = ("Reshape", "Squeeze", "Cast", "Identity")  # what an exporter puts between indices and a Gather
_SAME_ROWS = ("Unsqueeze", "Squeeze", "Reshape", "Cast", "Identity")  # what it puts between rows and their rotation
_LAST_AXIS = "rotary/last_axis"
CAPACITY = "capacity"  # begins the names of cache axes in the graphs, behind it the layer
SMALLEST_HEAD = 16  # channels for which there are fused attention kernels; below them it is taken apart
_LAYERS = {"ATTENTION_INPUT", "ATTENTION_OUTPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING"}  # no plain network has them


class Parsed(NamedTuple):
    """A network, and the parser that owns the memory of its weights: keep both until the engine is built."""

    network: Network
    parser: Parser


def parse_spec(library: Library, builder: Builder, spec: EngineSpec, targets: Sequence[str]) -> Parsed:
    """A network of a graph, complete and checked: see `parse_graph` and `parse_plain`."""
    one_row = most_rows(spec.profiles) == 1
    if not is_plain(spec.options):
        return parse_graph(library, builder, spec.graph, spec.capacities, targets, one_row=one_row)
    return parse_plain(library, builder, spec.graph, len(spec.capacities), spec.options["one_length"], one_row=one_row)


def parse_graph(
    library: Library,
    builder: Builder,
    graph: Path,
    capacities: Sequence[int],
    targets: Sequence[str] = (),
    *,
    one_row: bool = True,
) -> Parsed:
    """A network of a graph, complete and checked.

    Args:
        library: what builds.
        builder: of that library; it must outlive the network.
        graph: ONNX with external weights.
        capacities: slots of each layer's cache, in the graph's order.
        targets: compute capabilities that it is going to be built for.
        one_row: it takes one row alone; else as many as its profiles say.

    Raises:
        BundleError: the graph cannot be read, or its caches are not as many as the capacities.
        BackendError: the library refuses a node, or the network is not what the graph says.
    """
    network, parser = _parsed(library, builder, graph, static_caches(graph, capacities, one_row=one_row))
    mask_attentions(library, network)
    if any(float(target) < AMPERE for target in targets):
        spell_out_products(library, network)
    check_network(library, network, graph, len(capacities))
    return Parsed(network, parser)


def parse_plain(
    library: Library, builder: Builder, graph: Path, caches: int, one_length: bool, *, one_row: bool = True
) -> Parsed:
    """A network of a graph without the library's layers for attention, complete and checked.

    Args:
        library: what builds.
        builder: of that library; it must outlive the network.
        graph: ONNX with external weights.
        caches: how many it has.
        one_length: they are equally long.
        one_row: see `parse_graph`.

    Raises:
        BundleError: the graph cannot be read or rewritten, or has another number of caches.
        BackendError: the library refuses a node, or the network is not what the graph says.
    """
    model = read_model(graph)
    drop_unread(model)
    original = model.graph
    given = [value.name for value in original.input]
    expected = [rows_name(value.name) if _is_cache(value) else value.name for value in original.output]
    rewritten = plain_graph(graph, caches, one_length, one_row=one_row)
    network, parser = _parsed(library, builder, graph, rewritten)
    problems = [f"input {name} is unused" for name in unused_inputs(network)]
    for wanted, tensors in ((given, inputs_of(network)), (expected, outputs_of(network))):
        names = [tensor.name for tensor in tensors]
        problems += [] if names == wanted else [f"it has {', '.join(names)}, not {', '.join(wanted)}"]
    problems += [f"{kind} is no plain layer" for kind in sorted(_LAYERS & layer_kinds(network).keys())]
    refuse_problems(library, graph, problems)
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


def static_caches(graph: Path, capacities: Sequence[int], *, one_row: bool = True) -> bytes:
    """The graph's proto with the cache axes as numbers, and with one row those of rows; weights stay in their file."""
    model = read_model(graph)
    caches = sum(value.name.startswith("past_key_") for value in model.graph.input)
    if caches != len(capacities):
        raise BundleError(f"{graph} has {caches} caches, {len(capacities)} capacities are given: rebuild the bundle")
    _check_weights(graph, model)
    sizes = {f"{CAPACITY}_{j}": capacity for j, capacity in enumerate(capacities)}
    _fix_axes(model, sizes | (one_row_axes(caches) if one_row else {}))
    drop_unread(model)
    gather_rotary_apart(model)
    scale_whole_rows(model)
    if not one_row:
        take_last_twice(model)
    del model.graph.value_info[:]  # said with the symbols that are numbers now
    return bytes(model.SerializeToString())


def plain_graph(graph: Path, caches: int, one_length: bool, *, one_row: bool = True) -> bytes:
    """The graph's proto in the operators of older libraries, free in its caches; weights stay in their file."""
    model = read_model(graph)
    _check_weights(graph, model)
    found = sum(value.name.startswith("past_key_") for value in model.graph.input)
    if found != caches:
        raise BundleError(f"{graph} has {found} caches, {caches} capacities are given: rebuild the bundle")
    drop_unread(model)
    rewrite_plain(model, graph, one_length)
    scale_whole_rows(model)
    if one_row:
        _fix_axes(model, one_row_axes(caches))
    else:
        take_last_twice(model)
    del model.graph.value_info[:]
    return bytes(model.SerializeToString())


def drop_unread(model: onnx.ModelProto) -> None:
    """Drop inputs that no node reads, in place: a schedule that merges nothing reads no order of tokens.

    So an input that no layer of the network reads is one that the parser lost.
    """
    read = _read_names(model.graph) | {value.name for value in model.graph.output}
    inputs = [value for value in model.graph.input if value.name in read]
    del model.graph.input[:]
    model.graph.input.extend(inputs)


def _read_names(graph: onnx.GraphProto) -> set[str]:
    """Values that nodes read, those of branches and loops among them."""
    within = (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g"))
    return {name for node in graph.node for name in node.input}.union(*map(_read_names, within))


def take_last_twice(model: onnx.ModelProto) -> None:
    """Have the hidden states of a prompt's last token twice, of which the head's output is the first: [B, 2, D]."""
    makers = {name: node for node in model.graph.node for name in node.output}
    twice = onnx.helper.make_node("Concat", [LAST, LAST], [f"{LAST}/twice"], name=f"{LAST}/twice", axis=0)
    picks = [node for node in model.graph.node if node.op_type == "Gather" and _axis_of(node) == 1]
    picked = False
    for node in picks:
        place = 1
        while node.input[place] in makers and makers[node.input[place]].op_type in _SAME_INDICES:
            node = makers[node.input[place]]
            place = 0
        if node.input[place] == LAST:
            node.input[place] = twice.output[0]
            picked = True
    if picked:
        model.graph.node.insert(0, twice)


def gather_rotary_apart(model: onnx.ModelProto) -> None:
    """Have rows of the rotary tables, [S, hd/2] by [T], taken by GatherND: the same rows, which no attention fuses."""
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {name for name, node in makers.items() if node.op_type == "Constant"}
    # 1. back from the tables of each rotation to where they came from; a scalar constant picks the only prompt
    names = [name for node in graph.node if node.op_type == "RotaryEmbedding" for name in node.input[1:3]]
    gathers: dict[str, onnx.NodeProto] = {}
    while names:
        node = makers.get(names.pop())
        if node is None or node.op_type not in (*_SAME_ROWS, "Gather") or node.output[0] in gathers:
            continue
        names.append(node.input[0])
        if node.op_type == "Gather" and not _axis_of(node) and node.input[1] not in constants:
            gathers[node.output[0]] = node
    if not gathers:
        return
    # 2. an index of one number for each row, in place of the number
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1], np.int64), _LAST_AXIS))
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        name = node.output[0] if node.output else ""
        if name not in gathers:
            nodes.append(node)
            continue
        rows = f"{name}/rows"
        nodes.append(onnx.helper.make_node("Unsqueeze", [node.input[1], _LAST_AXIS], [rows], name=rows))
        nodes.append(onnx.helper.make_node("GatherND", [node.input[0], rows], [name], name=node.name))
    del graph.node[:]
    graph.node.extend(nodes)


def scale_whole_rows(model: onnx.ModelProto) -> None:
    """Have the scales of INT8 matrices in one block a row, [out, 1], as those of rows, [out]: the same numbers."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or not all(name in tensors for name in node.input[:2]):
            continue
        codes = tensors[node.input[0]]
        scales = tensors[node.input[1]]
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if codes.data_type != onnx.TensorProto.INT8 or "block_size" not in attributes or list(scales.dims[1:]) != [1]:
            continue
        del scales.dims[1:]
        node.attribute.remove(attributes["block_size"])
        attributes["axis"].i = 0


def _axis_of(node: onnx.NodeProto) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 0)


def _fix_axes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Make free axes numbers, by their names."""
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in sizes:
                axis.dim_value = sizes[axis.dim_param]  # clears dim_param, which is of the same oneof


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
    given = {tensor.name: tensor for tensor in inputs_of(network)}
    lengths = given.get(KV_LENGTHS)
    layers = sum(name.startswith("past_key_") for name in given)
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
            if lengths.shape[0] == -1:
                by_layer = network.add_shuffle(in_32_bits)
                by_layer.reshape_dims = (layers, -1)
                in_32_bits = by_layer.get_output(0)
        attention.key_value_lengths = _lengths_of(network, in_32_bits, cache)
        attention.causal_kind = module.CausalMaskKind.LOWER_RIGHT


def _lengths_of(network: Network, lengths: Tensor, cache: int) -> Tensor:
    """Those of one cache, a number a row of the batch: [layers] -> [1], [layers, B] -> [B]."""
    if len(lengths.shape) == 1:
        return network.add_slice(lengths, (cache,), (1,), (1,)).get_output(0)
    index = network.add_constant((), np.array(cache, np.int32)).get_output(0)
    return network.add_gather(lengths, index, 0).get_output(0)


def spell_out_products(library: Library, network: Network) -> None:
    """[..., m, k] x [..., k, n] in fp32 as a sum over k of [..., m, k, 1] * [..., 1, k, n]; the compiler fuses the two.

    Only the few query rows of the importance are multiplied in fp32.
    """
    module = library.module
    for layer in layers_of(network):
        out = layer.get_output(0)
        if kind_of(layer) != "MATRIX_MULTIPLY" or out.dtype != module.float32:
            continue
        left = input_of(layer, 0)
        right = input_of(layer, 1)
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


def _error_text(error: ParserError) -> str:
    """A parser's error: the node, what it is, and why."""
    return f"node {error.node_name() or error.node()} ({error.node_operator() or 'no operator'}): {error.desc()}"
