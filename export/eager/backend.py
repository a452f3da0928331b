"""The segments in eager torch, behind the runtime's backend interface: the reference a compiled bundle is checked with.

Parameters are read from the checkpoint when a graph is first bound. Slow on purpose: no fusion, caches are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from framefusion.export.graphs.decoder import Segment
from framefusion.export.graphs.fixed import FixedPrefill
from framefusion.export.graphs.tower import Tower
from framefusion.export.graphs.tracing.signatures import cache_names
from framefusion.runtime.backends.base import Array
from framefusion.runtime.backends.host import HostBackend
from framefusion.runtime.backends.kv_cache import SegmentCache

Load = Callable[[], nn.Module]


class EagerBackend(HostBackend):
    """Torch modules by the name of the graph they stand for.

    Args:
        loaders: graph -> function that returns its module with weights.
    """

    name = "eager"

    def __init__(self, loaders: Mapping[str, Load]) -> None:
        super().__init__()
        self._loaders = loaders
        self._modules: dict[str, nn.Module] = {}

    def open(self, graphs: Sequence[str]) -> None:
        """Nothing: a module is read when it is first bound."""

    def bind(
        self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array], cache: SegmentCache | None
    ) -> EagerSegment:
        """See `framefusion.runtime.backends.Backend.bind`."""
        if graph not in self._modules:
            self._modules[graph] = self._loaders[graph]()
        return EagerSegment(self._modules[graph], inputs, outputs, cache)


@dataclass
class EagerSegment:
    """A module and the arrays it reads and writes."""

    module: nn.Module
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    cache: SegmentCache | None

    @torch.inference_mode()
    def run(self) -> None:
        """Call the module and copy its results to where a compiled segment would have written them."""
        tensors = {name: torch.from_numpy(array) for name, array in self.inputs.items()}
        buffers = [] if self.cache is None else list(zip(self.cache.keys, self.cache.values, strict=True))
        past = [(torch.from_numpy(key), torch.from_numpy(value)) for key, value in buffers]
        results = call_by_name(self.module, tensors, past)
        for name, array in self.outputs.items():
            torch.from_numpy(array).copy_(results[name])
        for j, pair in enumerate(past):
            for part, buffer in zip(("key", "value"), pair, strict=True):
                buffer.copy_(results[f"present_{part}_{j}"])


def call_by_name(
    module: nn.Module, tensors: Mapping[str, Tensor], past: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Call a segment, a fixed prefill or a tower with named inputs, and name its outputs as the graphs do."""
    rows = [tensors.get(name) for name in ("hidden", "cos", "sin", "kv_len")]
    presents = cache_names("present", len(past))
    if isinstance(module, FixedPrefill):
        inside = (tensors[name] for name in ("last", "label", "order", "drops"))
        results = module(*rows, *inside, past, tensors.get("deepstack"))
        return dict(zip(["logits", "origin", *presents], results, strict=True))
    if isinstance(module, Segment):
        previous = tensors.get("previous") if module.scores else None
        results = module(*rows, previous, tensors["last"], past, tensors.get("deepstack"))
        first = ["logits"] if module.head else ["hidden_out"] + ["similarity", "importance"] * module.scores
        return dict(zip([*first, *presents], results, strict=True))
    if isinstance(module, Tower):
        told = module.signature()
        results = module(*(tensors[name] for name in told.inputs))
        return dict(zip(told.outputs, (results,) if isinstance(results, Tensor) else results, strict=True))
    raise TypeError(f"{type(module).__name__} is no graph of a bundle")
