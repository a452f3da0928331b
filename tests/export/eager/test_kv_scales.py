"""Scales of caches in int8: what a build measures, keeps, takes over again, and refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framefusion.errors import BackendError, BudgetError, BundleError
from framefusion.export.build import build, check_again
from framefusion.export.check.quantized import CODED
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager import kv_scales
from framefusion.export.engines.compile import compile_bundle
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan, replan
from framefusion.export.plan.kv_cache import KEY, VALUE, KvScales
from framefusion.export.report.forecast import forecast, render
from framefusion.runtime.backends.choice import choose
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.machine.machine import Machine
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.proof.golden import require_golden
from framefusion.runtime.proof.prove import prove
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual
from tests.films import write_film
from tests.versions import needs_int8_caches

TRAINED = Path(__file__).parents[2] / "models" / "tiny_qwen2_vl"
INT8 = BuildOptions(kv_cache_dtype="int8", num_decoder_layer=4, depth=2, cost=0.5)
pytestmark = needs_int8_caches


@pytest.fixture(scope="module")
def plan() -> BuildPlan:
    return BuildPlan(Checkpoint(TRAINED), INT8)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(Checkpoint(TRAINED), tmp_path_factory.mktemp("int8") / "bundle", INT8).folder


def test_a_share_of_clipped_numbers_is_counted(plan: BuildPlan) -> None:
    scales = KvScales(plan.config, torch.float32)
    shape = (plan.config.num_kv_heads, 10, plan.config.head_dim)
    scales.put(0, KEY, torch.full((shape[0], shape[2]), 0.5))
    held = np.full(shape, 63.7, np.float32)  # within half a step of the last code
    held[0, :3, 0] = (63.8, -70.0, 1e9)
    assert kv_scales.clipped_share(scales, {(0, KEY): held}) == pytest.approx(3 / held.size)


def test_scales_are_none_before_they_are_measured_and_never_zero(plan: BuildPlan) -> None:
    scales = KvScales(plan.config, torch.float16)
    assert scales.scale(0, VALUE).is_meta
    scales.put(0, VALUE, torch.zeros(plan.config.num_kv_heads, plan.config.head_dim))
    assert scales.scale(0, VALUE).dtype == torch.float16
    assert (scales.scale(0, VALUE) > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dialect": "portable"}, "build with --dialect gqa"),
        ({"backend": "inductor"}, "leave --backend out"),
        ({"reduction": "fixed", "merge_shares": (0.3,), "prune_layer": 1}, "--reduction adaptive"),
        ({"dtype": "bfloat16"}, "build with --dtype float32 or float16"),
    ],
)
def test_what_cannot_run_such_caches_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError) as refused:
        BuildPlan(Checkpoint(TRAINED), replace(INT8, **changes))
    assert "--kv-cache-dtype int8" in str(refused.value)
    assert message in str(refused.value)


def test_a_plan_says_the_bytes(plan: BuildPlan, tmp_path: Path) -> None:
    facts = forecast(plan, tmp_path)
    model = plan.config
    assert facts["kv_bytes_per_token"] == 2 * model.num_kv_heads * model.head_dim * model.num_layers
    assert "int8" in render(facts)


@pytest.mark.slow
def test_a_bundle_is_checked_with_its_codes_and_runs(built: Path, film: Path) -> None:
    bundle = Bundle(built)
    record = bundle.manifest.kv_cache
    # 1. the manifest says what the scales were measured on, the check what codes cost
    assert record is not None
    assert record.tokens > 200
    assert record.clipped < kv_scales.MOST_CLIPPED
    cost = bundle.manifest.check["quantization"]
    assert cost["of"] == "KV caches in int8 against floats"
    assert 1e-5 < max(cost["errors_by_layer"]) < 0.05
    lines = {line["what"]: line for line in bundle.manifest.check["lines"]}
    assert lines["dense logits"]["value"] <= lines["dense logits"]["limit"] == CODED
    assert lines["logits against transformers"]["value"] < 1e-4
    # 2. the golden has limits of its own, and the tower that of floats; the device is right
    golden = require_golden(bundle)
    assert golden.limits.numbers == CODED
    assert golden.limits.measured is not None
    assert golden.limits.measured.tower == 1e-4
    assert prove(bundle, OnnxRuntimeBackend(built, 1, manifest=bundle.manifest), golden).right
    # 3. caches take a byte a number
    pipeline = Pipeline(bundle, threads=1)
    prompt, rows = pipeline.read([Turn("user", (Visual.VIDEO, "What happens?"))], [film])
    request = Request(4, cost=1.0)
    prefilled = pipeline.prefill(prompt, rows, request, Stopwatch())
    assert {buffer.dtype.name for cache in prefilled.caches for buffer in (*cache.keys, *cache.values)} == {"int8"}


@pytest.mark.slow
def test_a_published_bundle_is_checked_with_the_scales_that_it_holds(built: Path) -> None:
    manifest = Bundle(built).manifest
    again = replan(built, manifest, Checkpoint(TRAINED))
    assert again.kv_scales is not None
    assert again.kv_scales.record == manifest.kv_cache
    assert not any(again.kv_scales.scale(layer, part).is_meta for layer in range(4) for part in (KEY, VALUE))
    assert check_again(built, Checkpoint(TRAINED))["passed"]


@pytest.mark.slow
def test_scales_that_a_further_film_exceeds_end_a_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kv_scales, "ROOM", 0.5)
    plan = BuildPlan(Checkpoint(TRAINED), INT8)
    with pytest.raises(BudgetError, match="lie beyond the scales"):
        kv_scales.measure_scales(plan, tmp_path)


@pytest.mark.slow
def test_films_of_the_user_are_measured_beside_drawn_ones(built: Path, tmp_path: Path, film: Path) -> None:
    drawn = replan(built, Bundle(built).manifest, Checkpoint(TRAINED))
    shown = BuildPlan(Checkpoint(TRAINED), INT8)
    kv_scales.measure_scales(shown, tmp_path, [film, write_film(tmp_path / "other.mp4", seed=1)])
    assert drawn.kv_scales is not None
    assert shown.kv_scales is not None
    assert shown.kv_scales.record.tokens > drawn.kv_scales.record.tokens
    for layer in range(4):
        assert (shown.kv_scales.scale(layer, KEY) >= drawn.kv_scales.scale(layer, KEY)).all()
    assert list(tmp_path.glob(".scales-*")) == []


@pytest.fixture(scope="module")
def machines() -> dict[str, Machine]:
    return {
        "old": Machine(None, ("CPUExecutionProvider",), "1.26.0", bindings=False),
        "new": Machine(None, ("CPUExecutionProvider",), "1.27.0", bindings=False, openvino="2026.4.1"),
    }


@pytest.mark.slow
def test_other_backends_decline_by_name(built: Path, machines: dict[str, Machine]) -> None:
    bundle = Bundle(built)
    for machine, backend, message in (
        ("old", "onnxruntime", r"onnxruntime 1.26.0 have no KV caches in int8 .*onnxruntime>=1.27"),
        ("new", "openvino", "KV caches are in int8, which OpenVINO is not shown to run"),
        ("new", "inductor", "inductor takes floats: build another bundle without --kv-cache-dtype"),
    ):
        with pytest.raises(BackendError, match=message):
            choose(bundle, backend, "cpu", machine=machines[machine])
    options = BuildOptions(backend="inductor").engines
    assert options is not None
    with pytest.raises(BundleError, match="build another bundle without --kv-cache-dtype"):
        compile_bundle(built, options)
