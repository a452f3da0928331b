"""The memory plan: what it counts, and that a real process peaks where it says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import PromptError
from framefusion.runtime.format.manifest import KvCacheRecord, Manifest, QuantizationRecord, WeightFormatRecord
from framefusion.runtime.format.manifest_file import read_manifest
from framefusion.runtime.memory import expected_lengths, gpu_plan, memory_plan, table_bytes
from tests.films import write_film
from tests.patience import PATIENCE
from tests.random_checkpoint import random_checkpoint
from tests.versions import needs_torch

PEAK = """
import json, sys
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.text.prompt import Turn, Visual
turn = Turn("user", (Visual.VIDEO, "What happens?"))
answer = Pipeline(Bundle(sys.argv[1])).generate([turn], [sys.argv[2]], Request(32, cost=json.loads(sys.argv[3])))
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
peak = int(status["VmHWM"].split()[0]) * 1024
print(json.dumps([peak, answer.prompt_tokens, answer.visual_tokens, answer.kv_lengths]))
"""

OPENED = """
import json, re, sys
from pathlib import Path
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
import onnxruntime
bundle = Bundle(sys.argv[1])
backend = OnnxRuntimeBackend(bundle.folder, 1, manifest=bundle.manifest)
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
before = anonymous()
backend.open(list(bundle.manifest.graphs))
opened = anonymous() - before
mapped = re.findall(r"weights.bin\\nSize:.*\\n(?:.*\\n){0,2}?Rss: +(\\d+) kB", Path("/proc/self/smaps").read_text())
print(json.dumps([opened, sum(map(int, mapped)) * 1024, len(mapped)]))
"""


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


def test_caches_are_those_of_the_slots(manifest: Manifest) -> None:
    plan = memory_plan(manifest, 300, 200, 20)
    slot = 2 * manifest.model.num_kv_heads * manifest.model.head_dim * 4
    assert plan.lengths == (300, 300, 300)
    assert plan.caches == manifest.model.num_layers * 320 * slot


def test_caches_in_int8_take_a_byte_a_number(manifest: Manifest) -> None:
    codes = replace(manifest, kv_cache=KvCacheRecord("int8", 100, 0.0))
    plan = memory_plan(codes, 300, 200, 20)
    floats = memory_plan(manifest, 300, 200, 20)
    assert 4 * plan.caches == floats.caches
    assert replace(plan, caches=floats.caches, caches_by_segment=floats.caches_by_segment) == floats
    assert 4 * gpu_plan(codes, 300, 20).caches == gpu_plan(manifest, 300, 20).caches


@pytest.mark.parametrize("block", [128, 0])
def test_codes_are_counted_once_and_floats_as_before(manifest: Manifest, block: int) -> None:
    """Also where a scale serves a whole row."""
    linears = 7 * manifest.model.num_layers
    formats = (WeightFormatRecord(8, block, True, linears),)
    coded = replace(manifest, quantization=QuantizationRecord("search", False, formats, 1))
    model = manifest.model
    layer = 2 * model.hidden_size * model.head_dim * (model.num_heads + model.num_kv_heads)
    layer += 3 * model.hidden_size * model.intermediate_size
    sums = memory_plan(coded, 300).weights - memory_plan(manifest, 300).weights  # the file has a scale a block already
    assert sums == pytest.approx(4 * model.num_layers * layer / (block or model.hidden_size), rel=1e-6)


def test_what_is_dropped_is_saved(manifest: Manifest) -> None:
    lengths = expected_lengths(manifest, 300, 200, 0.5)
    assert lengths == (300, 300, 200)
    worst, expected = memory_plan(manifest, 300, 200), memory_plan(manifest, 300, 200, lengths=lengths)
    assert expected.caches < worst.caches
    assert expected.weights == worst.weights


def test_a_gpu_may_hold_the_embedding_table(manifest: Manifest) -> None:
    """As many bytes as the device is given for it, in the bundle's type."""
    plan = gpu_plan(manifest, 300, 20)
    rows = manifest.embedding.rows * manifest.model.hidden_size
    assert plan.embedding == table_bytes(manifest) == 4 * rows
    assert table_bytes(replace(manifest, model=replace(manifest.model, dtype="float16"))) == 2 * rows
    assert plan.weights == sum(manifest.graphs.values())
    assert plan.caches == memory_plan(manifest, 300, 200, 20).caches
    assert (plan.least, plan.total) == (plan.weights + plan.caches, plan.weights + plan.caches + plan.embedding)


def test_text_alone_runs_no_tower(manifest: Manifest) -> None:
    text, video = memory_plan(manifest, 100, 0), memory_plan(manifest, 100, 100)
    assert text.activations < video.activations
    assert (text.vision_peak, text.weights) == (0, video.weights)


def test_lengths_and_segments_must_pair(manifest: Manifest) -> None:
    with pytest.raises(PromptError, match="2 lengths for 3 segments"):
        memory_plan(manifest, 100, 0, lengths=(100, 100))


@needs_torch
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("options", "cost"),
    [
        ({"reduction": "none"}, None),
        ({"cost": 0.3}, 0.3),
        ({"cost": 0.3}, 1.0),
        ({"reduction": "fixed", "merge_shares": (0.4, 0.1), "prune_layer": 2, "max_text_len": 200}, None),
        ({"reduction": "none", "dtype": "float16"}, None),
        ({"cost": 0.3, "dtype": "float16"}, 1.0),
    ],
)
def test_a_process_peaks_where_the_plan_says(tmp_path: Path, options: dict[str, Any], cost: float | None) -> None:
    from framefusion.export.build import build
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.options import BuildOptions

    sizes: dict[str, Any] = {"layers": 8, "hidden": 512, "intermediate": 1536, "heads": 8, "vision": (4, 384, 6)}
    checkpoint = random_checkpoint(tmp_path / "checkpoint", pixels=448 * 448, **sizes)
    manifest = build(Checkpoint(checkpoint), tmp_path / "bundle", BuildOptions(**options), verify=False).manifest
    film = write_film(tmp_path / "film.mp4", frames=32, fps=4, size=448)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "bundle"), str(film), json.dumps(cost)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    peak, tokens, visual, kv_lengths = json.loads(done.stdout)
    lengths = [kv_lengths[segment.attention_layers[0]] for segment in manifest.segments if segment.attention_layers]
    plan = memory_plan(manifest, tokens, visual, 32, lengths=lengths)
    assert plan.total == pytest.approx(peak, rel=0.15)


@needs_torch
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "weights"), [("float32", "int4+head"), ("float16", "int8:32")])
def test_codes_are_packed_in_the_bytes_that_the_plan_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, weights: str
) -> None:
    """And nothing of their file stays in memory beside them."""
    from framefusion.export.build import build_planned
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.options import BuildOptions
    from framefusion.export.plan import weight_plan
    from framefusion.export.plan.build_plan import BuildPlan
    from framefusion.export.quantization.rounding import round_to_nearest

    monkeypatch.setattr(weight_plan, "search", round_to_nearest)  # the same bytes in a moment
    sizes: dict[str, Any] = {"layers": 2, "hidden": 1024, "intermediate": 8192, "heads": 8}
    checkpoint = random_checkpoint(tmp_path / "checkpoint", dtype="bfloat16", **sizes)
    plan = BuildPlan(Checkpoint(checkpoint), BuildOptions(reduction="none", dtype=dtype, weights=weights))
    manifest = build_planned(plan, tmp_path / "bundle", verify=False, golden=False).manifest
    command = [sys.executable, "-c", OPENED, str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    opened, mapped, mappings = json.loads(done.stdout)
    assert memory_plan(manifest, 300).weights == pytest.approx(opened, rel=0.15)
    assert mappings > 10  # each with the scales of a matrix, which were read
    assert mapped < 2e6
