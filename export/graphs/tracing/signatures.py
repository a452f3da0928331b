"""The kinds of graph a bundle holds: example arguments, names and dynamic axes of each. Traces, writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from framefusion.export.graphs.decoder import DecoderConfig, Segment
from framefusion.export.graphs.fixed import FixedPrefill
from framefusion.export.graphs.segments import SegmentPlan
from framefusion.export.graphs.tower import FREE, Tower, meta
from framefusion.export.graphs.tracing.dialects import Dialect
from framefusion.export.graphs.tracing.trace import trace
from framefusion.ops import static_reduction

# Example sizes: distinct, and none of them 1, so that no axis looks fixed or equal to another.
_LENGTH = 9
_CAPACITY = 17


def segment_module(config: DecoderConfig, plan: SegmentPlan) -> Segment:
    """The torch module of a segment, on the meta device."""
    with torch.device("meta"):
        return Segment(config, plan.blocks, scores=plan.scores, head=plan.head)


def cache_names(prefix: str, count: int) -> list[str]:
    """Names of the caches of `count` attention blocks: past_key_0, past_value_0, ..."""
    return [f"{prefix}_{part}_{j}" for j in range(count) for part in ("key", "value")]


@dataclass(frozen=True, eq=False)
class Signature:
    """Example inputs of a decoder's graph and all its names, in order.

    Attributes:
        arguments: on the meta device; only shapes and types count; None stands for an argument the graph lacks.
        dynamic_shapes: as torch.export takes them, one for each argument.
        inputs: names of the arguments that are tensors, caches flattened.
        outputs: names.
    """

    arguments: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def segment_signature(config: DecoderConfig, plan: SegmentPlan) -> Signature:
    """A segment with any number of tokens and cache slots."""
    half = config.head_dim // 2
    layers = len(plan.attention_layers)
    arguments: tuple[Any, ...] = (
        meta(1, _LENGTH, config.hidden_size),
        meta(1, _LENGTH, half),
        meta(1, _LENGTH, half),
        _int(layers),
        _int(_LENGTH) if plan.scores else None,
        _int(1) if plan.scores or plan.head else None,
        [_cache(config, _CAPACITY + j) for j in range(layers)],
    )
    axes: tuple[Any, ...] = (
        {1: FREE}, {1: FREE}, {1: FREE}, None, {0: FREE} if plan.scores else None, None, _cache_axes(layers)
    )  # fmt: skip
    if plan.deepstack:
        arguments = (*arguments, meta(plan.deepstack, _LENGTH, config.hidden_size))
        axes = (*axes, {1: FREE})
    inputs = ["hidden", "cos", "sin", "kv_len"]
    inputs += ["previous"] * plan.scores + ["last"] * (plan.scores or plan.head) + cache_names("past", layers)
    inputs += ["deepstack"] * (plan.deepstack > 0)
    outputs = ["logits" if plan.head else "hidden_out"] + ["similarity", "importance"] * plan.scores
    return Signature(arguments, axes, tuple(inputs), (*outputs, *cache_names("present", layers)))


def trace_segment(
    config: DecoderConfig, plan: SegmentPlan, dialect: Dialect, dtype: torch.dtype = torch.float32
) -> ir.Model:
    """See `segment_signature`."""
    told = segment_signature(config, plan)
    model = trace(
        segment_module(config, plan), told.arguments, told.dynamic_shapes, dialect, told.inputs, told.outputs,
        dtype=dtype,
    )  # fmt: skip
    return _name_axes(model, len(plan.attention_layers))


def trace_tower(tower: Tower, dialect: Dialect, dtype: torch.dtype = torch.float32) -> ir.Model:
    """A vision tower, with the sizes free that it says are."""
    told = tower.signature()
    model = trace(tower, told.arguments, told.dynamic_shapes, dialect, told.inputs, told.outputs, dtype=dtype)
    for name, axes in told.axes.items():
        for axis, word in axes.items():
            _set_axis(model, name, axis, word)
    return model


def fixed_signature(module: FixedPrefill) -> Signature:
    """The static prefill of the fixed mode; only the cache capacities are free."""
    config = module.config
    record = module.record
    half = config.head_dim // 2
    layers = config.num_layers
    size = record.max_text + record.max_visual
    arguments: tuple[Any, ...] = (
        meta(1, size, config.hidden_size),
        meta(1, size, half),
        meta(1, size, half),
        _int(layers),
        _int(1),
        _int(size),
        _int(size),
        _int(len(record.drops)),
        [_cache(config, size + _CAPACITY + j) for j in range(layers)],
    )
    axes: tuple[Any, ...] = (*[None] * 8, _cache_axes(layers))
    inputs = ["hidden", "cos", "sin", "kv_len", "last", "label", "order", "drops", *cache_names("past", layers)]
    if module.deepstack:
        arguments = (*arguments, meta(module.deepstack, size, config.hidden_size))
        axes = (*axes, None)
        inputs.append("deepstack")
    return Signature(arguments, axes, tuple(inputs), ("logits", "origin", *cache_names("present", layers)))


def trace_fixed_prefill(module: FixedPrefill, dialect: Dialect, dtype: torch.dtype = torch.float32) -> ir.Model:
    """See `fixed_signature`."""
    told = fixed_signature(module)
    model = trace(
        module, told.arguments, told.dynamic_shapes, dialect, told.inputs, told.outputs,
        static_reduction.DECOMPOSITIONS, dtype,
    )  # fmt: skip
    return _name_axes(model, module.config.num_layers)


def _int(length: int) -> Tensor:
    return meta(length, dtype=torch.int64)


def _cache(config: DecoderConfig, capacity: int) -> tuple[Tensor, Tensor]:
    shape = (1, config.num_kv_heads, capacity, config.head_dim)
    return meta(*shape), meta(*shape)


def _cache_axes(layers: int) -> list[Any]:
    return [({2: FREE}, {2: FREE})] * layers


def _name_axes(model: ir.Model, layers: int) -> ir.Model:
    """Say `tokens` and `capacity_j` where the exporter numbered its symbols, for whoever opens the graph."""
    names = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    for name, axis in (("hidden", 1), ("cos", 1), ("sin", 1), ("deepstack", 1), ("hidden_out", 1), *_vectors()):
        if name in names:
            _set_axis(model, name, axis, "tokens")
    for prefix in ("past", "present"):
        for j, name in enumerate(cache_names(prefix, layers)):
            _set_axis(model, name, 2, f"capacity_{j // 2}")
    return model


def _vectors() -> Sequence[tuple[str, int]]:
    return [(name, 0) for name in ("previous", "similarity", "importance")]


def _set_axis(model: ir.Model, name: str, axis: int, symbol: str) -> None:
    """Name an axis that is free; one that is fixed stays a number."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name == name and value.shape is not None and not isinstance(value.shape[axis], int):
            dims: list[Any] = list(value.shape)
            dims[axis] = symbol
            value.shape = ir.Shape(dims)
