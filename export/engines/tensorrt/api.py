"""The part of TensorRT's Python API that builds an engine, as types: what of it we call, and nothing more.

The library gives no types, and need not be installed. Names are the library's, without the I of an interface; what it
says of each member holds. The part that runs an engine is in runtime/backends/tensorrt/api.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, SupportsBytes

from numpy.typing import NDArray

from framefusion.runtime.backends.tensorrt.api import Member


class Tensor(Protocol):
    """A value of a network."""

    name: str
    dtype: Member

    @property
    def shape(self) -> Sequence[int]:
        """Its sizes, -1 where free."""


class Layer(Protocol):
    """A node of a network."""

    name: str
    type: Member
    num_inputs: int
    num_outputs: int

    def get_input(self, index: int, /) -> Tensor | None:
        """An input; None where an optional one is not given."""

    def get_output(self, index: int, /) -> Tensor:
        """An output."""

    def set_input(self, index: int, tensor: Tensor, /) -> object:
        """Feed another value."""


class Shuffle(Layer, Protocol):
    """A layer that reshapes."""

    reshape_dims: tuple[int, ...]


class Attention(Protocol):
    """A fused attention; its inputs are queries, keys, values and a mask."""

    decomposable: bool
    causal_kind: Member
    key_value_lengths: Tensor | None
    mask: Tensor | None

    def get_input(self, index: int, /) -> Tensor:
        """One of them."""

    def set_input(self, index: int, tensor: Tensor, /) -> object:
        """Feed another value."""


class Network(Protocol):
    """A network definition; what is added is a layer behind the tensors that it takes."""

    num_inputs: int
    num_outputs: int
    num_layers: int

    def get_input(self, index: int, /) -> Tensor:
        """An input of the whole."""

    def get_output(self, index: int, /) -> Tensor:
        """An output of the whole."""

    def get_layer(self, index: int, /) -> Layer:
        """A layer, as the class that all have in common."""

    def add_cast(self, tensor: Tensor, dtype: object, /) -> Layer:
        """In another type."""

    def add_constant(self, shape: tuple[int, ...], values: NDArray[Any], /) -> Layer:
        """Values that are known now."""

    def add_elementwise(self, left: Tensor, right: Tensor, operation: object, /) -> Layer:
        """Two tensors, broadcast."""

    def add_gather(self, tensor: Tensor, indices: Tensor, axis: int, /) -> Layer:
        """What indices say of an axis."""

    def add_reduce(self, tensor: Tensor, operation: object, axes: int, keep: bool, /) -> Layer:
        """Over the axes whose bits are set."""

    def add_shuffle(self, tensor: Tensor, /) -> Shuffle:
        """In another shape."""

    def add_slice(
        self, tensor: Tensor, start: tuple[int, ...], shape: tuple[int, ...], stride: tuple[int, ...], /
    ) -> Layer:
        """A part."""

    def add_unsqueeze(self, tensor: Tensor, axes: Tensor, /) -> Layer:
        """With axes of one more."""


class Parser(Protocol):
    """What makes a network of an ONNX proto; it owns the memory of the weights."""

    num_errors: int

    def parse(self, proto: bytes, path: str, /) -> bool:
        """Add a graph to the network; weights are looked for beside the path."""

    def get_error(self, index: int, /) -> ParserError:
        """Why it refused."""


class ParserError(Protocol):
    """One reason, and its place in the graph."""

    def node(self) -> int:
        """Index of the node."""

    def node_name(self) -> str:
        """Its name."""

    def node_operator(self) -> str:
        """Its operator."""

    def desc(self) -> str:
        """The reason."""


class OptimizationProfile(Protocol):
    """Sizes that an engine is built for."""

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> object:
        """Least, best and largest sizes of an input."""


class TimingCache(Protocol):
    """What a build has measured."""

    def serialize(self) -> SupportsBytes:
        """All of it."""


class BuilderConfig(Protocol):
    """How an engine is built."""

    num_compute_capabilities: int
    builder_optimization_level: int
    progress_monitor: object

    def set_compute_capability(self, capability: object, index: int, /) -> object:
        """A target."""

    def set_flag(self, flag: object, /) -> object:
        """Turn something on."""

    def clear_flag(self, flag: object, /) -> object:
        """Turn something off."""

    def add_optimization_profile(self, profile: OptimizationProfile, /) -> int:
        """A profile more; its index."""

    def create_timing_cache(self, content: bytes, /) -> TimingCache | None:
        """A cache of what was serialized before, b"" for an empty one; None where it is no such content."""

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool, /) -> bool:
        """Read and extend a cache; False where another GPU or version has filled it."""


class Builder(Protocol):
    """What compiles a network."""

    def create_network(self, flags: int, /) -> Network:
        """An empty one."""

    def create_builder_config(self) -> BuilderConfig:
        """The settings as they are without ours."""

    def create_optimization_profile(self) -> OptimizationProfile:
        """An empty one."""

    def build_serialized_network(self, network: Network, config: BuilderConfig, /) -> bytes | None:
        """Compile; the plan as a buffer of the library, which takes no copy, or None where it fails."""

    def build_serialized_network_to_stream(self, network: Network, config: BuilderConfig, writer: object, /) -> bool:
        """Compile, and give the plan to a stream writer."""


class KeepsError(Protocol):
    """An object of ours that the library calls: an exception must not cross the library, so it is kept."""

    error: BaseException | None
