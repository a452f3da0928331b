"""A graph of a bundle before there is one: its name, what it is run for, where its weights are, how it is traced.

    GraphModule   a torch module that says itself how it is traced: its `Signature`
    GraphPlan     one of them in a bundle: a name, a role, the parameters' places in the checkpoint

Knows no decoder, no tower, no checkpoint and no ONNX.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from framefusion.export.checkpoints.tensors.weights import AnySource, aligned_bytes, stored_type

FREE = torch.export.Dim.DYNAMIC
FLOAT = 4  # bytes of fp32
EXAMPLE_LENGTH = 9  # example sizes: distinct, and none of them 1, so that no axis looks fixed or equal to another
EXAMPLE_CAPACITY = 17
EXAMPLE_BATCH = 3

Role = Literal["prefill", "decode", "both", "vision"]
"""What a pipeline runs a graph for; "both" is a segment that takes a prompt as well as single tokens."""


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An example input: shape and type without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


@dataclass(frozen=True, eq=False)
class Signature:
    """Example inputs of a graph and all its names, in order.

    Attributes:
        arguments: of the module's `forward`, nested as it takes them, on the meta device; only shapes and types count;
            None stands for one that the graph lacks.
        dynamic_shapes: as torch.export takes them, one for each argument.
        inputs: names of the tensors among the arguments, flattened.
        outputs: names.
        axes: input or output -> axis -> its name, for whoever opens the graph; a fixed axis stays a number.
    """

    arguments: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ("tokens",)
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


class GraphModule(nn.Module):
    """A torch module that becomes a graph.

    Attributes:
        decompositions: custom ops that are inlined as plain torch before the graph is said in a dialect.
    """

    decompositions: ClassVar[Mapping[Any, Callable[..., Any]]] = {}

    @abstractmethod
    def signature(self) -> Signature:
        """Example inputs, free sizes and names, as `forward` takes and returns them."""

    def batched(self) -> GraphModule:
        """The same weights over a free number of rows at once; the module itself where it takes one at a time."""
        return self


@dataclass(frozen=True, eq=False)
class GraphPlan:
    """One graph of a bundle.

    Attributes:
        name: its path in the bundle, "segments/NAME/graph.onnx".
        role: what it is run for.
        module: makes its torch module on the meta device, a new one each time.
        sources: parameter -> where in the checkpoint; may name parameters that the module lacks.
        dtype: of weights, activations and caches in the bundle.
        structure: graphs of equal structure differ in their weights alone, so one trace serves them all.
    """

    name: str
    role: Role
    module: Callable[[], GraphModule]
    sources: Mapping[str, AnySource]
    dtype: torch.dtype
    structure: Hashable

    @property
    def folder(self) -> str:
        """Where it lies in the bundle; graphs of one folder share one file of weights."""
        return str(PurePosixPath(self.name).parent)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Parameter -> shape, in the order in which they are written."""
        return {name: tuple(parameter.shape) for name, parameter in self.module().named_parameters()}

    @cached_property
    def types(self) -> Mapping[str, torch.dtype]:
        """Parameter -> its type in the bundle: whole numbers, as codes are, keep theirs."""
        return {name: stored_type(parameter, self.dtype) for name, parameter in self.module().named_parameters()}

    @property
    def eager_bytes(self) -> list[int]:
        """Bytes of each parameter while the graph runs in fp32, in the order of `shapes`."""
        return [
            math.prod(shape) * (FLOAT if self.types[name].is_floating_point else self.types[name].itemsize)
            for name, shape in self.shapes.items()
        ]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the file of weights, its alignment included."""
        return sum(aligned_bytes(math.prod(shape) * self.types[name].itemsize) for name, shape in self.shapes.items())
