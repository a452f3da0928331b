"""The segments in eager torch, behind the runtime's backend interface: the reference a compiled bundle is checked with.

Parameters are read from the checkpoint when a graph is first bound. Slow on purpose: no fusion, caches are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from framefusion.export.graphs.graph_plan import GraphModule, Signature
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.host import HostBackend, host_array
from framefusion.runtime.backends.kv_cache import SegmentCache

Load = Callable[[], GraphModule]


class EagerBackend(HostBackend):
    """Torch modules by the name of the graph they stand for.

    Args:
        loaders: graph -> function that returns its module with weights.
    """

    name = "eager"

    def __init__(self, loaders: Mapping[str, Load]) -> None:
        super().__init__()
        self._loaders = loaders
        self._modules: dict[str, GraphModule] = {}

    def open(self, graphs: Sequence[str]) -> None:
        """Nothing: a module is read when it is first bound."""

    def bind(
        self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], cache: SegmentCache | None
    ) -> EagerSegment:
        """A module with the arrays that it reads and writes; see `framefusion.runtime.backends.base.Backend.bind`."""
        if graph not in self._modules:
            self._modules[graph] = self._loaders[graph]()
        return EagerSegment(self._modules[graph], inputs, outputs, cache)


@dataclass
class EagerSegment:
    """A module and the arrays it reads and writes."""

    module: GraphModule
    inputs: Mapping[str, Buffer]
    outputs: Mapping[str, Buffer]
    cache: SegmentCache | None

    @cached_property
    def signature(self) -> Signature:
        """Of the module: its names in order."""
        return self.module.signature()

    @torch.inference_mode()
    def run(self) -> None:
        """Call the module and copy its results to where a compiled segment would have written them."""
        tensors = {name: torch.from_numpy(host_array(buffer)) for name, buffer in self.inputs.items()}
        past = {} if self.cache is None else self.cache.named("past")
        present = {} if self.cache is None else self.cache.named("present")
        tensors |= {name: torch.from_numpy(host_array(buffer)) for name, buffer in past.items()}
        results = call_by_name(self.module, self.signature, tensors)
        for name, buffer in {**self.outputs, **present}.items():
            torch.from_numpy(host_array(buffer)).copy_(results[name])


def call_by_name(module: GraphModule, signature: Signature, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Call a graph's module with named tensors.

    Args:
        module: of the graph.
        signature: of the module.
        tensors: its inputs by name, caches among them; names that it lacks are left alone.

    Returns:
        outputs by name, present caches among them.
    """
    names = iter(signature.inputs)
    arguments = tree_map(lambda leaf: None if leaf is None else tensors[next(names)], signature.arguments)
    results = module(*arguments)
    return dict(zip(signature.outputs, (results,) if isinstance(results, Tensor) else results, strict=True))
