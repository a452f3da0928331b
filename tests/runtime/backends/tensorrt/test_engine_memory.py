"""GPU memory of a bundle's engines, from the manifest alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from framefusion.console.messages import in_bytes
from framefusion.errors import BackendError
from framefusion.runtime.backends.tensorrt.memory import (
    EngineMemory,
    common_batch_sizes,
    engine_memory,
    require_room,
)
from framefusion.runtime.format.engine_record import EngineRecord, ProfileRecord
from framefusion.runtime.format.manifest import FileRecord, Manifest
from framefusion.runtime.format.manifest_file import read_manifest

SLOTS, TOKENS, SIZE = 64, 48, 1000


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    """The tiny bundle in fp16 with an engine for each graph."""
    plain = read_manifest(bundle)
    layers = {segment.graph: len(segment.attention_layers) for segment in plain.segments} | {plain.vision.graph: 0}
    engines, files = [], dict(plain.files)
    for graph, count in layers.items():
        profiles = tuple(ProfileRecord(f"prefill {n}", n, {}) for n in (TOKENS, 16)) if count else ()
        engines.append(
            EngineRecord(
                "tensorrt-rtx", graph, f"{graph}.engine", "numpy", "1", ("8.9",), "float16", "", profiles, (),
                (SLOTS,) * count, 1,
            )
        )  # fmt: skip
        files[f"{graph}.engine"] = FileRecord(SIZE, "")
    return replace(plain, engines=tuple(engines), files=files, model=replace(plain.model, dtype="float16"))


def test_weights_are_files_and_caches_are_static(manifest: Manifest) -> None:
    model, plan = manifest.model, engine_memory(manifest, "tensorrt-rtx")
    assert plan.weights == SIZE * len(manifest.engines)
    assert plan.caches == model.num_layers * SLOTS * 2 * model.num_kv_heads * model.head_dim * 2
    assert plan.total == plan.weights + plan.caches + plan.activations + plan.rows


def test_activations_and_rows_are_those_of_the_largest_profile(manifest: Manifest) -> None:
    model, plan = manifest.model, engine_memory(manifest, "tensorrt-rtx")
    assert plan.activations == TOKENS * (3 * model.intermediate_size + 6 * model.hidden_size) * 2
    assert plan.rows == TOKENS * (4 * model.hidden_size + 2 * model.head_dim) * 2


def test_requests_that_are_decoded_together_have_caches_of_as_many_rows(manifest: Manifest) -> None:
    """Counted in what is needed in all, and not in what a single request needs."""
    steps = {rows: ProfileRecord(f"decode {rows} rows", 1, {"hidden": ((rows, 1, 8),)}) for rows in (2, 4, 8)}

    def batched(sizes: dict[str, tuple[int, ...]]) -> Manifest:
        engines = [
            replace(engine, profiles=(*engine.profiles, *(steps[rows] for rows in sizes.get(engine.graph, ()))))
            for engine in manifest.engines
        ]
        return replace(manifest, engines=tuple(engines))

    graphs = [segment.graph for segment in manifest.segments]
    plan = engine_memory(manifest, "tensorrt-rtx")
    both = batched(dict.fromkeys(graphs, (2, 4, 8)))
    together = engine_memory(both, "tensorrt-rtx")
    assert common_batch_sizes(both, "tensorrt-rtx") == (2, 4, 8)
    assert together.slabs == 8 * plan.caches
    assert together.one_request == plan
    assert str(together).endswith(f"slabs {in_bytes(together.slabs)}")
    unequal = batched(dict.fromkeys(graphs, (2, 4)) | {graphs[0]: (2,)})
    assert common_batch_sizes(unequal, "tensorrt-rtx") == (2,)
    assert common_batch_sizes(batched({graphs[0]: (2,)}), "tensorrt-rtx") == ()


def test_engines_of_another_kind_do_not_count(manifest: Manifest) -> None:
    assert engine_memory(manifest, "tensorrt").total == 0


def test_a_gpu_with_too_little_is_refused_with_both_figures(manifest: Manifest) -> None:
    plan = EngineMemory(15_300_000_000, 800_000_000, 900_000_000, 200_000_000)
    require_room(plan, plan.total, "GPU", manifest)
    with pytest.raises(BackendError) as refused:
        require_room(plan, 11_100_000_000, "NVIDIA RTX 4070", manifest)
    assert str(refused.value).startswith(
        "the engines need 17.2 GB of GPU memory (weights 15.3 GB, caches 800 MB, activations 900 MB, rows 200 MB), "
        "NVIDIA RTX 4070 has 11.1 GB free: "
    )
    assert f"--max-kv-cache-capacity (now {manifest.limits.max_kv_cache_capacity})" in str(refused.value)
