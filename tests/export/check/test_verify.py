"""Which check a build gets when memory is short, and what the checks see that run no whole model."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import onnx_ir as ir
import pytest

from framefusion.errors import CheckFailedError
from framefusion.export.build import build, sizes_of
from framefusion.export.check import check
from framefusion.export.check.observation import SPARING
from framefusion.export.check.verify import (
    Scope,
    memory_of_check,
    memory_of_streamed,
    scope_of,
    truncated,
    weight_report,
)
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.machine import CHECKING_PROCESS
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.quantization.code_store import CodeStore
from framefusion.reduction.budget import cost_of_shares
from tests.bundles import COST
from tests.random_checkpoint import random_checkpoint

OPTIONS = BuildOptions(cost=COST, similarity_lower_bound=0.9, depth=1, max_input_len=512)  # of the fixture `bundle`


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("deep") / "checkpoint", layers=7, pixels=112 * 112)


def free_memory(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(check, "available_memory", lambda: int(size))


def planned_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers of each plan that is made from now on."""
    layers: list[int] = []
    plan = BuildPlan.__init__

    def counted(self: BuildPlan, checkpoint: Checkpoint, options: BuildOptions, *codes: CodeStore | None) -> None:
        plan(self, checkpoint, options, *codes)
        layers.append(self.config.num_layers)

    monkeypatch.setattr(BuildPlan, "__init__", counted)
    return layers


def test_a_check_plans_the_bundle_that_stands_for_another_one_once(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = BuildPlan(Checkpoint(deep), BuildOptions(dtype="bfloat16", max_input_len=512))
    free_memory(monkeypatch, memory_of_check(plan) - 1)
    planned = planned_layers(monkeypatch)
    scope = scope_of(plan)
    assert sizes_of(plan, scope)["check"] > 0
    assert planned == [4]


def test_memory_of_a_check_is_that_of_fp32_weights(deep: Path) -> None:
    checkpoint = Checkpoint(deep)
    plan = BuildPlan(checkpoint, BuildOptions(dtype="float16"))
    stored = [checkpoint.nbytes(key) for key in checkpoint.files]  # fp32; the table is also the head
    assert memory_of_check(plan) - CHECKING_PROCESS == pytest.approx(sum(stored) + max(stored), rel=0.02)
    fixed = BuildOptions(reduction="fixed", merge_shares=(0.3,), prune_layer=1, cost=0.6, max_input_len=900)
    assert memory_of_check(BuildPlan(checkpoint, fixed)) > memory_of_check(plan)


def test_what_fits_is_checked_whole(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = BuildPlan(Checkpoint(deep), BuildOptions())
    free_memory(monkeypatch, memory_of_check(plan))
    assert scope_of(plan) == Scope("full", memory=memory_of_check(plan))
    free_memory(monkeypatch, memory_of_check(plan) - 1)
    assert scope_of(plan) == Scope("streamed", effort=SPARING, memory=memory_of_streamed(plan))


def test_what_cannot_be_run_in_parts_is_checked_by_its_first_layers(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A static graph computes its whole length, and no CPU computes bfloat16; transformers is compared all the same."""
    plan = BuildPlan(Checkpoint(deep), BuildOptions(dtype="bfloat16"))
    free_memory(monkeypatch, memory_of_check(plan) - 1)
    scope = scope_of(plan)
    assert (scope.method, scope.uncompared, scope.effort.streamed) == ("truncated", "", True)
    assert scope.why.startswith("truncated to 4 of 7 layers: the full check needs 0.9 GB, 0.9 GB are free; ")
    assert scope.substitute is not None
    assert scope.substitute.options == dataclasses.replace(plan.options, num_decoder_layer=4, depth=2, dtype="float32")
    static = BuildOptions(reduction="fixed", merge_shares=(0.3,), prune_layer=1, cost=0.6, max_input_len=900)
    plan = BuildPlan(Checkpoint(deep), static)
    free_memory(monkeypatch, memory_of_check(plan) - 1)
    assert (scope_of(plan).method, scope_of(plan).uncompared) == ("truncated", "")
    free_memory(monkeypatch, 1e6)
    scope = scope_of(plan)
    assert scope.method == "weights"
    assert scope.uncompared == "it needs 0.9 GB of memory, 0.0 GB are free"


def test_a_schedule_keeps_its_layers_and_shares_in_a_smaller_model(deep: Path) -> None:
    options = BuildOptions(reduction="fixed", merge_shares=(0.3, 0.1), prune_layer=3, cost=0.5, max_input_len=900)
    plan = BuildPlan(Checkpoint(deep), options)
    smaller = truncated(plan, options)
    assert smaller is not None
    assert smaller.num_decoder_layer == 5
    schedule, other = plan.reduction.schedule, BuildPlan(Checkpoint(deep), smaller).reduction.schedule
    assert schedule is not None
    assert other is not None
    assert other.prune_share == pytest.approx(schedule.prune_share)
    assert smaller.cost == pytest.approx(cost_of_shares(schedule.shares, 5))


def test_a_small_cost_needs_layers_to_be_reached_in(deep: Path) -> None:
    plan = BuildPlan(Checkpoint(deep), BuildOptions(cost=0.16))
    assert truncated(plan, plan.options) is None  # seven are as few as can be
    plan = BuildPlan(Checkpoint(deep), BuildOptions(cost=0.21))
    smaller = truncated(plan, plan.options)
    assert smaller is not None
    assert smaller.num_decoder_layer == 5


def test_written_weights_are_those_of_the_checkpoint(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    plan, folder = BuildPlan(Checkpoint(checkpoint), OPTIONS), tmp_path / "bundle"
    report = weight_report(bundle, plan)
    assert report["differing"] == []
    assert report["tensors"] > 20
    shutil.copytree(bundle, folder)
    initializers = ir.load(folder / "segments/rest/graph.onnx").graph.initializers
    tensor = initializers["head.lm_head.weight"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    with (folder / "segments/rest/weights.bin").open("r+b") as file:
        file.seek((tensor.offset or 0) + tensor.nbytes - 1)  # the last byte of the last tensor
        last = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([last[0] ^ 1]))
    assert weight_report(folder, plan)["differing"] == ["segments/rest/graph.onnx: head.lm_head.weight"]


def test_weights_of_another_checkpoint_are_seen(bundle: Path, tmp_path: Path) -> None:
    other = random_checkpoint(tmp_path / "other", seed=1, pixels=112 * 112)
    report = weight_report(bundle, BuildPlan(Checkpoint(other), OPTIONS))
    assert len(report["differing"]) > report["tensors"] / 2  # norms are ones in both


@pytest.mark.slow
def test_a_build_that_does_not_fit_is_checked_by_its_first_layers(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BuildOptions(dtype="bfloat16", max_input_len=512)
    free_memory(monkeypatch, memory_of_check(BuildPlan(Checkpoint(deep), options)) - 1)
    told: list[str] = []
    progress = lambda step: told.append(f"{step.part} {step.doing}")  # noqa: E731
    planned = planned_layers(monkeypatch)
    built = build(Checkpoint(deep), tmp_path / "bundle", options, progress=progress)
    assert planned == [7, 4]  # each of the two bundles is planned once
    report = built.manifest.check
    assert report["passed"]
    assert report["method"] == "truncated"
    assert report["why"].startswith("truncated to 4 of 7 layers: the full check needs")
    line = {"what": "tensors written that are not the checkpoint's", "value": 0, "limit": 0.0}
    assert line in report["lines"]
    assert report["lines"][-1]["what"] == "decoded logits against transformers"
    assert (report["transformers"]["layers"], report["transformers"]["of_layers"]) == (7, 7)
    assert any("were read back" in note for note in report["notes"])
    assert "check segments/rest weights.bin" in told
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (built.manifest.model.dtype, built.manifest.model.num_layers) == ("bfloat16", 7)


@pytest.mark.slow
def test_a_truncated_check_that_fails_publishes_nothing(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BuildOptions(dtype="bfloat16", max_input_len=512)
    free_memory(monkeypatch, memory_of_check(BuildPlan(Checkpoint(deep), options)) - 1)
    with pytest.raises(CheckFailedError, match="does not reproduce"):
        build(Checkpoint(deep), tmp_path / "bundle", options, tolerance=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.partial"]
