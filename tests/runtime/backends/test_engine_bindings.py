"""Real engines, built without a GPU, beside what the runtime binds: names, types, shapes, a profile for each call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.runtime.backends.host import HOST
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeSegment
from framefusion.runtime.backends.tensorrt.backend import cache_buffers, capacities
from framefusion.runtime.backends.tensorrt.cache_pool import CachePool
from framefusion.runtime.backends.tensorrt.library import LibraryKind
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.text.prompt import Turn, Visual
from tests.bundles import COST
from tests.runtime.generation.test_wide_decode import StaticBackend

KIND: LibraryKind = "tensorrt-rtx"


class Witness(StaticBackend):
    """Runs graphs in ONNX Runtime, with caches as long as the engines', and notes the profile that each call takes."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self._bundle, self.taken = bundle, set[tuple[str, str]]()
        self.pool = CachePool(HOST, capacities(bundle, KIND))

    def bind(
        self, graph: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], cache: SegmentCache | None
    ) -> OnnxRuntimeSegment:
        engine = self._bundle.engine(graph, KIND)
        assert engine is not None
        given = {**inputs, **outputs}
        given |= cache_buffers("past", cache) | cache_buffers("present", cache)
        bound = [tensor for tensor in engine.tensors if tensor.name in given]
        unbound = {tensor.name for tensor in engine.tensors} - set(given)
        assert unbound <= {"similarity", "importance"}, unbound  # nothing reads those of a decode step
        for tensor in bound:
            buffer = given[tensor.name]
            assert str(buffer.dtype) == tensor.dtype, tensor
            assert all(a in (-1, b) for a, b in zip(tensor.shape, buffer.shape, strict=True)), tensor
        names = [tensor.name for tensor in engine.tensors if tensor.mode == "input"]
        fitting = [
            profile.name
            for profile in engine.profiles
            if all(_within(given[name].shape, profile.shapes[name]) for name in names)
        ]
        assert fitting, (graph, {name: given[name].shape for name in names})
        self.taken.add((graph, fitting[0]))
        return super().bind(graph, inputs, outputs, cache)


def _within(shape: tuple[int, ...], limits: tuple[tuple[int, ...], ...]) -> bool:
    return all(a <= n <= b for a, n, b in zip(limits[0], shape, limits[-1], strict=True))


@pytest.mark.slow
def test_what_is_bound_is_what_engines_take(checkpoint: Path, film: Path, picture: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from framefusion.export.build import build
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.engines.compile import compile_bundle
    from framefusion.export.options import BuildOptions, EngineOptions, Resources

    options = BuildOptions(
        cost=COST, similarity_lower_bound=0.9, depth=1, dialect="portable", dtype="float16", max_input_len=192,
        buckets=(64, 128, 192),
    )  # fmt: skip
    build(Checkpoint(checkpoint), tmp_path / "bundle", options, verify=False)
    compile_bundle(tmp_path / "bundle", EngineOptions(KIND, ("8.9",)), Resources(cache=tmp_path / "cache"))
    bundle = Bundle(tmp_path / "bundle")
    witness = Witness(bundle)
    pipeline = Pipeline(bundle, witness)
    for shown, file in ((Visual.VIDEO, film), (Visual.IMAGE, picture)):
        answer = pipeline.generate([Turn("user", (shown, "What happens?"))], [file], Request(3))
        assert np.all(np.array(answer.token_ids) >= 0)
    taken = {profile for graph, profile in witness.taken if graph != bundle.manifest.vision.graph}
    assert {"decode", "prefill 64", "prefill 128"} <= taken
