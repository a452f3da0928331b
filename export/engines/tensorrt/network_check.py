"""What is read back from a finished TensorRT network, and the refusal of one that is not what its graph says.

Each attention is found with the cache that its keys come from; makers and feeds are followed backwards from there.
Knows no file, no profile and no parser.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from framefusion.errors import BackendError
from framefusion.export.engines.tensorrt.api import Attention, Layer, Network, Tensor
from framefusion.runtime.backends.tensorrt.library import Library

KV_LENGTHS = "kv_len"
_CACHE = re.compile(r"past_(key|value)_(\d+)")
_TRANSPARENT = ("ELEMENTWISE", "CAST", "IDENTITY", "SHUFFLE")  # what the parser puts between a cache and its attention


class CachedAttention(NamedTuple):
    """An attention and the layer whose cache it reads; None where it reads none."""

    attention: Attention
    name: str
    cache: int | None


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
    problems += [f"input {name} is unused" for name in unused_inputs(network)]
    refuse_problems(library, graph, problems)


def refuse_problems(library: Library, graph: Path, problems: Sequence[str]) -> None:
    """Raise a BackendError that says what is wrong with a network, where anything is."""
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
    return dict(sorted(Counter(kind_of(layer) for layer in layers_of(network)).items()))


def attentions_of(module: ModuleType, network: Network) -> Iterator[CachedAttention]:
    """All attentions, each with the index of the cache that its keys come from."""
    makers = _makers(network)
    for layer in layers_of(network):
        if kind_of(layer) == "ATTENTION_INPUT":
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
        if kind_of(layer) != "KV_CACHE_UPDATE":
            continue
        before = input_of(layer, 0)
        after = layer.get_output(0)
        if (
            before.name not in input_names
            or after.name not in output_names
            or after.name != before.name.replace("past", "present")
        ):
            yield f"cache update {layer.name} writes {before.name} to {after.name}, not in place"
        if before.dtype != after.dtype or tuple(before.shape) != tuple(after.shape) or -1 in before.shape[1:]:
            yield f"cache update {layer.name} changes type or shape of {before.name}, or is free in more than its rows"
        updated.append(before.name)
    expected = sorted(f"past_{part}_{j}" for j in range(caches) for part in ("key", "value"))
    if sorted(updated) != expected:
        yield f"the caches that are updated are {sorted(updated)}, not {expected}"


def unused_inputs(network: Network) -> list[str]:
    """Inputs that no layer reads."""
    used = {tensor.name for layer in layers_of(network) for tensor in _feeds(layer)}
    return [tensor.name for tensor in inputs_of(network) if tensor.name not in used]


def _cache_of(tensor: Tensor, makers: Mapping[str, Layer], part: str) -> int | None:
    """Index of the cache that a tensor is, up to a factor; None where it comes from elsewhere."""
    maker = makers.get(tensor.name)
    if maker is None:
        return None
    if kind_of(maker) == "KV_CACHE_UPDATE":
        match = _CACHE.fullmatch(input_of(maker, 0).name)
        return int(match[2]) if match and match[1] == part else None
    if kind_of(maker) not in _TRANSPARENT:
        return None
    caches = (_cache_of(feed, makers, part) for feed in _feeds(maker))
    return next((cache for cache in caches if cache is not None), None)


def _length_index(module: ModuleType, lengths: Tensor, makers: Mapping[str, Layer]) -> int | None:
    """j of int32(kv_len)[j : j + 1], or of int32(kv_len) as [layers, B] at j; None for anything else."""
    cut = makers.get(lengths.name)
    if cut is None or kind_of(cut) not in ("SLICE", "GATHER") or lengths.dtype != module.int32:
        return None
    cast = makers.get(input_of(cut, 0).name)
    if cast is not None and kind_of(cut) == "GATHER":
        cast = makers.get(input_of(cast, 0).name) if kind_of(cast) == "SHUFFLE" else None
    if cast is None or kind_of(cast) != "CAST" or input_of(cast, 0).name != KV_LENGTHS:
        return None
    if kind_of(cut) == "SLICE":
        return int(_as(cut, module.ISliceLayer).start[0]) if tuple(lengths.shape) == (1,) else None
    index = makers.get(input_of(cut, 1).name)
    return int(_as(index, module.IConstantLayer).weights[0]) if index and kind_of(index) == "CONSTANT" else None


def _makers(network: Network) -> dict[str, Layer]:
    """Tensor -> the layer it comes out of."""
    return {layer.get_output(i).name: layer for layer in layers_of(network) for i in range(layer.num_outputs)}


def _feeds(layer: Layer) -> list[Tensor]:
    """Tensors that go into a layer; optional ones that are not given are left out."""
    return [tensor for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None]


def input_of(layer: Layer, index: int) -> Tensor:
    """An input that every layer of its kind has."""
    tensor = layer.get_input(index)
    assert tensor is not None, f"{layer.name} has no input {index}"
    return tensor


def kind_of(layer: Layer) -> str:
    """The library's name of its kind: SLICE, MATRIX_MULTIPLY, ..."""
    return str(layer.type.name)


def _as(layer: Layer, kind: type) -> Any:
    """The layer as its own class: the bindings give all layers as the class they share."""
    layer.__class__ = kind
    return layer
