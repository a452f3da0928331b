"""GPU memory of a bundle's engines, from the manifest alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from framefusion.errors import BackendError
from framefusion.runtime.backends.tensorrt.memory import EngineMemory, engine_memory, require_room
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
