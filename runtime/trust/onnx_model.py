"""What is read of an ONNX file, as records: operators, weights, inputs, and what a kernel takes from attributes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

QUANTIZED_PRODUCT = "MatMulNBits"
CACHE_ATTENTION = "GroupQueryAttention"


class Tensor(NamedTuple):
    """An initializer: its type as onnx.TensorProto numbers it, its shape and where its numbers are."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    inline: int | None  # bytes in the file itself, where they are stored as such
    external: dict[str, str] | None  # location, offset and length as they are written


class Value(NamedTuple):
    """An input or output: its type as onnx.TensorProto numbers it; -1 where a size is free."""

    dtype: int
    shape: tuple[int, ...]


class Attribute(NamedTuple):
    """An attribute of some node; one for each of its integers, with None where it has none."""

    domain: str
    operator: str
    name: str
    value: int | None


class CacheAttention(NamedTuple):
    """A node that reads caches, whose kernel takes their type from its attributes."""

    past: tuple[str, ...]  # of keys and of values
    numbers: dict[str, int]  # attribute -> its integer
    texts: dict[str, str]  # attribute -> its text


class Choice(NamedTuple):
    """A node that runs one of two subgraphs, whose nodes are among the model's."""

    branches: tuple[str, ...]  # attributes that are subgraphs
    outputs: tuple[int, ...]  # of each of them


class QuantizedProduct(NamedTuple):
    """A node that multiplies by packed codes, whose kernel takes their number from its attributes."""

    inputs: tuple[str, ...]  # activations, codes, scales, zero points; "" where it lacks one
    numbers: dict[str, int]  # attribute -> its integer


@dataclass
class OnnxModel:
    """The parts of a model that are read."""

    opsets: dict[str, int] = field(default_factory=dict)  # domain -> version
    operators: set[tuple[str, str]] = field(default_factory=set)  # domain, type
    attributes: set[Attribute] = field(default_factory=set)  # of all nodes but constants
    initializers: list[Tensor] = field(default_factory=list)
    inputs: dict[str, Value] = field(default_factory=dict)
    outputs: dict[str, Value] = field(default_factory=dict)
    products: list[QuantizedProduct] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    attentions: list[CacheAttention] = field(default_factory=list)
    producers: dict[str, set[str]] = field(default_factory=dict)  # value -> operators that give one of that name
    nodes: int = 0
