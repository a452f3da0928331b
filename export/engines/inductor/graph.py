"""The graphs of a bundle in plain torch: flat inputs, caches written to in place, no op of ours left.

The custom ops give way to their own kernels, and attention over a cache to a form of it whose shapes follow from the
inputs alone (attention.py): what is left can be compiled to code that calls no Python. Knows no compiler, no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from framefusion.export.eager.backend import call_by_name
from framefusion.export.engines.inductor.attention import cache_attention
from framefusion.export.graphs.graph_plan import EXAMPLE_LENGTH, GraphModule, Signature
from framefusion.ops import static_reduction
from framefusion.ops.kernels import KERNELS


def flattened(signature: Signature) -> Signature:
    """One argument for each tensor, with its dynamic shape or None, and no outputs for caches, written in place."""
    leaves = tree_leaves(signature.arguments)
    shapes = tree_leaves(signature.dynamic_shapes, is_leaf=lambda leaf: leaf is None or isinstance(leaf, dict))
    pairs = [(leaf, shape) for leaf, shape in zip(leaves, shapes, strict=True) if leaf is not None]
    return replace(
        signature,
        arguments=tuple(leaf for leaf, _ in pairs),
        dynamic_shapes=tuple(shape for _, shape in pairs),
        outputs=tuple(name for name in signature.outputs if not name.startswith("present_")),
    )


class Flat(nn.Module):
    """A graph with one argument for each tensor, whose caches are written to in place."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__()
        self.module = module
        self.nested = module.signature()
        self.signature = flattened(self.nested)

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """The outputs by name; keys and values of all tokens are in the caches."""
        tensors = dict(zip(self.signature.inputs, arguments, strict=True))
        results = call_by_name(self.module, self.nested, tensors)
        for name, cache in tensors.items():
            if name.startswith("past_"):
                cache.copy_(results[name.replace("past_", "present_")])
        return tuple(results[name] for name in self.signature.outputs)


PLAIN = KERNELS | static_reduction.DECOMPOSITIONS
"""The custom ops' own kernels, but for attention over a cache: see attention.py."""


def export(
    module: GraphModule,
    dtype: torch.dtype,
    device: str,
    attention: str = "masked",
    tokens: int = EXAMPLE_LENGTH,
    others: Mapping[Any, Any] = MappingProxyType({}),
) -> torch.export.ExportedProgram:
    """The graph in plain torch.

    Args:
        module: of the graph, with parameters of this type and on this device.
        dtype: of all inputs that are floats.
        device: as torch names it.
        attention: its form, of attention.FORMS.
        tokens: of the example, which the sizes that stay free are tuned for; a tower's are its own.
        others: further operators, and what is to stand in their place.
    """
    flat = Flat(module)
    signature = flat.signature
    # 1. example inputs that lie as those of a run will
    more = tokens - EXAMPLE_LENGTH if "hidden" in signature.inputs else 0
    rows = zip(signature.inputs, signature.arguments, signature.dynamic_shapes, strict=True)
    arguments = tuple(_example(name, _lengthened(argument, free, more), dtype, device) for name, argument, free in rows)
    # 2. the program, flat, with the sizes free that the signature says are
    shapes = (signature.dynamic_shapes,) if any(signature.dynamic_shapes) else None
    program = torch.export.export(flat, arguments, dynamic_shapes=shapes, strict=False)
    # 3. the custom ops give way to their own kernels, so that what is compiled calls no Python
    op = torch.ops.framefusion.cache_attention.default
    plain: torch.export.ExportedProgram = program.run_decompositions(
        PLAIN | {op: cache_attention(attention)} | dict(others)
    )
    return plain


def kinds_of(program: torch.export.ExportedProgram) -> dict[str, int]:
    """How often each operator occurs, and Python's over sizes: none is ours, or Python would have to run it."""
    counts: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            is_op = isinstance(node.target, torch._ops.OpOverload)
            name = str(node.target) if is_op else f"python.{getattr(node.target, '__name__', node.target)}"
            counts[name] = counts.get(name, 0) + 1
    ours = sorted(name for name in counts if name.startswith("framefusion"))
    assert not ours, f"{', '.join(ours)} has no kernel in plain torch"
    return dict(sorted(counts.items()))


def _lengthened(argument: Tensor, free: Any, more: int) -> Tensor:
    """An example with more tokens and slots: its free axes that are at least as long as an example's tokens."""
    axes = free or {}
    shape = [size + more * (axis in axes and size >= EXAMPLE_LENGTH) for axis, size in enumerate(argument.shape)]
    return argument.new_empty(shape)


def _example(name: str, argument: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """Zeros in the place of an example input; caches lie slot after slot, see runtime/backends/inductor/backend.py."""
    dtype = dtype if argument.is_floating_point() else argument.dtype
    if not name.startswith("past_"):
        return torch.zeros(argument.shape, dtype=dtype, device=device)
    return torch.zeros(argument.transpose(1, 2).shape, dtype=dtype, device=device).transpose(1, 2)
