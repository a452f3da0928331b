"""`ff-export plan`: what a build will write, from headers alone, beside what one writes; disks that are too small."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from framefusion import errors
from framefusion.export.build import build
from framefusion.export.check import check
from framefusion.export.check.golden import LEFT_OUT, golden_of
from framefusion.export.check.verify import memory_of_check, memory_of_streamed
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.quantized.dequantized import dequantized_bytes
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.report.forecast import forecast, render
from framefusion.export.writing.staging import SPARE
from framefusion.runtime.bundle import Bundle
from tests import quantized_checkpoints
from tests.commands import assert_refused, export
from tools.bench.big_checkpoint import BIG_SHAPES, tensors_of, write_big_checkpoint

GB = 1e9
SHAPE = BIG_SHAPES["72b"]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names, types and shapes of a 72B, on a few hundred kilobytes of disk."""
    return write_big_checkpoint(SHAPE, tmp_path_factory.mktemp("big") / "72b", headers_only=True)


def test_headers_are_all_there_is(headers: Path) -> None:
    size = sum(path.stat().st_size for path in headers.iterdir())
    on_disk = sum(path.stat().st_blocks * 512 for path in headers.iterdir())
    assert size > 140 * GB
    assert on_disk < 2e6
    checkpoint = Checkpoint(headers)
    assert {key: checkpoint.shape(key) for key in checkpoint.files} == tensors_of(SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_72b_is_planned_in_a_moment(headers: Path, tmp_path: Path, dtype: Any) -> None:
    facts = forecast(BuildPlan(Checkpoint(headers), BuildOptions(dtype=dtype)), tmp_path / "bundle")
    llm, number = SHAPE.llm, {"float32": 4, "float16": 2}[dtype]
    layers = llm.num_layers * 3 * llm.hidden_size * llm.intermediate_size  # MLPs alone are more than half of it
    assert number * layers < facts["bytes"] < 1.3 * number * layers
    assert facts["kv_bytes_per_token"] == 2 * llm.num_layers * llm.num_kv_heads * 128 * number
    assert [segment["name"] for segment in facts["segments"]] == [f"layer{i:02}" for i in range(8)] + ["rest"]
    assert sum(facts["files"].values()) == facts["bytes"]
    assert facts["memory"]["run"]["worst"] > 4 * facts["bytes"] / number  # the CPU's kernels multiply in fp32
    assert facts["memory"]["build"] < 6 * GB
    assert facts["check"]["method"] in ("streamed", "truncated", "weights")
    assert "compared" in facts["check"]["transformers"]
    vocabulary = 4 * llm.vocab_size * llm.hidden_size  # the largest matrix, in fp32
    assert 2 * vocabulary < memory_of_streamed(BuildPlan(Checkpoint(headers), BuildOptions())) < 2.2 * vocabulary + GB
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_disk_too_small_is_refused_before_the_first_byte(headers: Path, tmp_path: Path) -> None:
    place = tmp_path / "no" / "such" / "folder"
    facts = json.loads(export("plan", headers, "-o", place, "--dtype", "float16", "--json").stdout)
    if facts["disk"]["fits"]:
        pytest.skip("this disk holds a 72B")
    result = export("build", headers, "-o", place / "bundle", "--dtype", "float16")
    needed = f"writes {facts['disk']['needed'] / GB:.2f} GB"
    assert_refused(result, errors.StorageError, needed, "GB are free", "make room or choose another place")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(depth=1, max_input_len=512),
        BuildOptions(dtype="float16", reduction="none", max_input_len=512),
        BuildOptions(reduction="fixed", merge_shares=(0.3,), prune_layer=1, cost=0.6, max_input_len=900),
    ],
)
@pytest.mark.usefixtures("instant_traces")
def test_files_are_as_large_as_was_said(checkpoint: Path, tmp_path: Path, options: BuildOptions) -> None:
    facts = forecast(BuildPlan(Checkpoint(checkpoint), options), tmp_path / "bundle", verify=False)
    folder = build(Checkpoint(checkpoint), tmp_path / "bundle", options, verify=False).folder
    for name, size in facts["files"].items():
        assert 0 <= size - (folder / name).stat().st_size < 4096  # the last tensor of a file is not followed by padding
    assert facts["check"] is None
    assert facts["disk"]["fits"]


@pytest.mark.parametrize(
    ("whole", "verify", "streamed", "missing"),
    [(True, True, False, ""), (True, False, False, ""), (False, True, True, ""), (False, False, True, LEFT_OUT)],
)
def test_the_golden_is_what_was_said(
    bundle: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: bool,
    verify: bool,
    streamed: bool,
    missing: str,
) -> None:
    plan = BuildPlan(Checkpoint(checkpoint), BuildOptions(depth=1, max_input_len=512))
    needed = memory_of_check(plan) if whole else memory_of_streamed(plan)
    monkeypatch.setattr(check, "available_memory", lambda: needed)
    facts = forecast(plan, tmp_path / "bundle", verify=verify)
    assert facts["golden"] == {"streamed": streamed, "missing": missing}
    assert facts["memory"]["golden"] == (None if missing else needed)
    (line,) = (line for line in render(facts).splitlines() if line.startswith("golden: "))
    assert missing in line
    assert ("read from the disk" in line) == (streamed and not missing)
    if missing:  # what makes it agrees
        assert golden_of(Bundle(bundle), plan, may_stream=False).missing == missing


def test_the_command_says_it_in_tables(checkpoint: Path, tmp_path: Path) -> None:
    text = export("plan", checkpoint, "-o", tmp_path / "bundle", "--cost", 0.5, "--depth", 1).stdout
    for word in ("keeps 50 %, drops 50 %", "segments/rest/weights.bin", "KV cache", "check: full", "it fits", "total"):
        assert word in text
    assert not list(tmp_path.iterdir())


def test_a_plan_for_a_gpu_says_what_lies_on_it(checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions.chosen(backend="tensorrt-rtx")
    facts = forecast(BuildPlan(Checkpoint(checkpoint), options), tmp_path / "out", verify=False)
    gpu = facts["memory"]["gpu"]
    assert gpu["total"] == gpu["weights"] + gpu["caches"] + gpu["embedding"]
    assert gpu["embedding"] == facts["model"]["vocab_size"] * facts["model"]["hidden_size"] * 2
    assert "of it on a GPU: " in render(facts)
    on_cpu = forecast(BuildPlan(Checkpoint(checkpoint), BuildOptions()), tmp_path / "out", verify=False)
    assert on_cpu["memory"]["gpu"] is None
    assert "GPU" not in render(on_cpu)


def test_what_a_build_refuses_the_plan_refuses(checkpoint: Path) -> None:
    assert_refused(export("plan", checkpoint, "--cost", 3), errors.BudgetError, "3")
    assert_refused(export("plan", checkpoint / "no"), errors.CheckpointError, "no")


@pytest.mark.slow
def test_a_quantized_checkpoint_is_planned_as_it_is_stored_and_with_its_floats_on_the_disk(
    checkpoint: Path, tmp_path: Path
) -> None:
    """GPTQ, which transformers dequantizes on no CPU: what the check writes for it is part of the disk."""
    quantized_checkpoints.written(checkpoint, tmp_path / "gptq", partial(quantized_checkpoints.gptq, group=32), GPTQ)
    plan = BuildPlan(Checkpoint(tmp_path / "gptq"), BuildOptions(cost=0.4))
    facts = forecast(plan, tmp_path)
    choices = facts["weights"]["choices"]
    assert list(choices)[:4] == ["float32", "float16", "stored", "int8"]
    assert choices["stored"] == sum(record.weight_bytes for record in plan.segment_records)
    size = facts["check"]["dequantized_bytes"]
    assert size == dequantized_bytes(plan.checkpoint) > 0
    assert facts["disk"]["needed"] == facts["bytes"] + size + SPARE
    assert "of floats that lie on the disk meanwhile" in render(facts)
    # 2. floats of 8 bits are among the choices where graphs can have them, with a scale a row
    portable = BuildPlan(Checkpoint(checkpoint), BuildOptions(cost=0.4, dialect="portable", weights="fp8+activations"))
    with_float8 = forecast(portable, tmp_path, verify=False)
    assert with_float8["weights"]["choices"]["fp8"] == sum(record.weight_bytes for record in portable.segment_records)
    assert with_float8["memory"]["run"]["worst"] > 0
    assert "in fp8, a scale a row, activations in fp8 too, a scale a token" in render(with_float8)
    assert "fp8" not in choices
    # 3. without the check nothing is written for it, and floats need none
    assert forecast(plan, tmp_path, verify=False)["disk"]["needed"] == facts["bytes"] + SPARE
    floats = forecast(BuildPlan(Checkpoint(checkpoint), BuildOptions(cost=0.4)), tmp_path)
    assert "stored" not in floats["weights"]["choices"]
    assert floats["check"]["dequantized_bytes"] == 0
