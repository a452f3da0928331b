"""The part of TensorRT's Python API that runs an engine, as types: what of it we call, and nothing more.

The library gives no types, and need not be installed. Names are the library's, without the I of an interface; what it
says of each member holds. The part that builds an engine is in export/engines/tensorrt/api.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, SupportsBytes


class Member(Protocol):
    """A member of one of its enums."""

    name: str


class Messages(Protocol):
    """A logger of ours, see `library`: what the library reported as an error since it was last cleared."""

    errors: list[str]

    def clear(self) -> None:
        """Forget them."""


class RuntimeCache(Protocol):
    """Kernels that TensorRT-RTX compiled on this GPU."""

    def serialize(self) -> SupportsBytes | None:
        """All of them."""

    def deserialize(self, content: bytes, /) -> object:
        """Take over what was serialized before; what another environment left is refused."""


class RuntimeConfig(Protocol):
    """How TensorRT-RTX creates an execution context."""

    dynamic_shapes_kernel_specialization_strategy: object

    def set_execution_context_allocation_strategy(self, strategy: object, /) -> object:
        """Whose memory activations lie in."""

    def create_runtime_cache(self) -> RuntimeCache:
        """An empty one."""

    def set_runtime_cache(self, cache: RuntimeCache, /) -> object:
        """Where compiled kernels are kept."""


class ExecutionContext(Protocol):
    """What runs an engine; calls return False where they refuse."""

    active_optimization_profile: int

    def set_device_memory(self, address: int, size: int, /) -> object:
        """Where activations lie, in bytes."""

    def set_optimization_profile_async(self, index: int, stream: int, /) -> bool:
        """Take another profile, in stream order."""

    def set_input_shape(self, name: str, shape: tuple[int, ...], /) -> bool:
        """The sizes of an input within the profile."""

    def set_tensor_address(self, name: str, address: int, /) -> bool:
        """Where an input or output lies on the GPU."""

    def get_max_output_size(self, name: str, /) -> int:
        """Bytes of an output for the shapes that are set."""

    def execute_async_v3(self, stream: int, /) -> bool:
        """Enqueue a run."""


class CudaEngine(Protocol):
    """A plan that the library has loaded."""

    num_io_tensors: int
    num_optimization_profiles: int
    device_memory_size_v2: int

    def get_tensor_name(self, index: int, /) -> str:
        """Name of an input or output."""

    def get_tensor_location(self, name: str, /) -> object:
        """On which side it has to lie."""

    def get_tensor_mode(self, name: str, /) -> object:
        """Whether it is an input."""

    def get_tensor_dtype(self, name: str, /) -> Member:
        """Its type."""

    def get_tensor_shape(self, name: str, /) -> Sequence[int]:
        """Its sizes, -1 where a profile decides."""

    def get_tensor_profile_shape(self, name: str, profile: int, /) -> Sequence[Sequence[int]]:
        """Its least, best and largest sizes in a profile."""

    def create_runtime_config(self) -> RuntimeConfig:
        """TensorRT-RTX alone has one."""

    def create_execution_context(self, settings: object, /) -> ExecutionContext | None:
        """A context by an allocation strategy or a `RuntimeConfig`; None where memory is short."""
