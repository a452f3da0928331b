"""The graphs of a bundle in plain torch: flat inputs, caches written to in place, no op of ours left.

The custom ops give way to their own kernels, and attention over a cache to a masked one whose shapes follow from the
inputs alone: what is left can be compiled to code that calls no Python. Knows no compiler and no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from framefusion.export.eager.backend import call_by_name
from framefusion.export.graphs.tracing.graph_sources import GraphSource, graph_sources
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.ops import static_reduction
from framefusion.ops.kernels import KERNELS, split_heads


@dataclass(frozen=True, eq=False)
class Traceable:
    """A graph of a bundle as torch sees it.

    Attributes:
        module: on the meta device.
        arguments: example inputs on the meta device, flat.
        axes: of each, as torch.export takes them; None where all are fixed.
        inputs: their names.
        outputs: names, the caches left out.
    """

    module: nn.Module
    arguments: tuple[Tensor, ...]
    axes: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def traceables(plan: BuildPlan) -> dict[str, Callable[[], Traceable]]:
    """Graph of the bundle -> what makes what it is compiled from."""
    return {graph: partial(_traceable, make) for graph, make in graph_sources(plan).items()}


class Flat(nn.Module):
    """A graph with one argument for each tensor, whose caches are written to in place."""

    def __init__(self, module: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.names = tuple(inputs)
        self.wanted = tuple(outputs)
        self.layers = sum(name.startswith("past_key_") for name in inputs)

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """The outputs by name; keys and values of all tokens are in the caches."""
        given = dict(zip(self.names, arguments, strict=True))
        past = [(given[f"past_key_{j}"], given[f"past_value_{j}"]) for j in range(self.layers)]
        results = call_by_name(self.module, given, past)
        for j, (keys, values) in enumerate(past):
            keys.copy_(results[f"present_key_{j}"])
            values.copy_(results[f"present_value_{j}"])
        return tuple(results[name] for name in self.wanted)


def cache_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    kv_len: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """ops.cache_attention with shapes that no value decides: all slots are looked at, what is not to be seen is masked.

    Writing to the caches becomes an update in place, because nothing reads what they held before.
    """

    length = query.shape[1]
    slots = past_key.shape[2]
    places = kv_len - length + torch.arange(length, device=query.device)
    keys = past_key.index_copy(2, places, split_heads(key, num_kv_heads))
    values = past_value.index_copy(2, places, split_heads(value, num_kv_heads))
    visible = torch.arange(slots, device=query.device)[None] <= places[:, None]  # [S, C]
    out = nn.functional.scaled_dot_product_attention(
        split_heads(query, num_heads), keys, values, attn_mask=visible, enable_gqa=num_heads > num_kv_heads
    )
    return out.transpose(1, 2).reshape(query.shape), keys, values


PLAIN = KERNELS | static_reduction.DECOMPOSITIONS | {torch.ops.framefusion.cache_attention.default: cache_attention}


def export(source: Traceable, dtype: torch.dtype, device: str) -> torch.export.ExportedProgram:
    """The graph in plain torch; the module's parameters are of this type and on this device."""
    arguments = tuple(
        _example(name, argument, dtype, device) for name, argument in zip(source.inputs, source.arguments, strict=True)
    )
    axes = (source.axes,) if any(source.axes) else None
    flat = Flat(source.module, source.inputs, source.outputs)
    program = torch.export.export(flat, arguments, dynamic_shapes=axes, strict=False)
    plain: torch.export.ExportedProgram = program.run_decompositions(dict(PLAIN))
    return plain


def kinds_of(program: torch.export.ExportedProgram) -> dict[str, int]:
    """How often each operator occurs: none is ours, or Python would have to run it."""
    found: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            name = str(node.target)
            found[name] = found.get(name, 0) + 1
    ours = sorted(name for name in found if name.startswith("framefusion"))
    assert not ours, f"{', '.join(ours)} has no kernel in plain torch"
    return dict(sorted(found.items()))


def _example(name: str, argument: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """Zeros in the place of an example input; caches lie slot after slot, see runtime/backends/inductor/backend.py."""
    dtype = dtype if argument.is_floating_point() else argument.dtype
    if not name.startswith("past_"):
        return torch.zeros(argument.shape, dtype=dtype, device=device)
    return torch.zeros(argument.transpose(1, 2).shape, dtype=dtype, device=device).transpose(1, 2)


def _traceable(make: Callable[[], GraphSource]) -> Traceable:
    """A graph's arguments flattened, and those left out that are None."""
    source = make()
    leaves = tree_leaves(source.told.arguments)
    ends = tree_leaves(source.told.dynamic_shapes, is_leaf=lambda leaf: leaf is None or isinstance(leaf, dict))
    pairs = [(leaf, axes) for leaf, axes in zip(leaves, ends, strict=True) if leaf is not None]
    outputs = tuple(name for name in source.told.outputs if not name.startswith("present_"))
    arguments, axes = (tuple(column) for column in zip(*pairs, strict=True))
    return Traceable(source.module, arguments, axes, source.told.inputs, outputs)
