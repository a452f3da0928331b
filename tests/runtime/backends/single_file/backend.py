"""A backend that exists for the tests alone: engines are ONNX graphs with their weights inside, run by ONNX Runtime."""

from __future__ import annotations

from typing import Any

from framefusion.runtime.backends.fit import require_fit
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.trust.engines import require_vouched


def open_backend(bundle: Bundle, name: str, device: str, threads: int) -> SingleFileBackend:
    """The engines of a bundle on the CPU."""
    require_vouched(bundle, name)
    require_fit(bundle.folder, bundle.manifest, name)
    return SingleFileBackend(bundle, name, threads)


class SingleFileBackend(OnnxRuntimeBackend):
    """A session of each engine in place of one of each graph."""

    def __init__(self, bundle: Bundle, name: str, threads: int) -> None:
        super().__init__(bundle.folder, threads, manifest=bundle.manifest)
        self.name = name
        self.bundle = bundle

    def session(self, graph: str) -> Any:
        """The session of a graph's engine."""
        if graph not in self._sessions:
            engine = self.bundle.engine(graph, self.name)
            assert engine is not None
            self._sessions[graph] = self._open(self.bundle.folder / engine.file)
        return self._sessions[graph]
