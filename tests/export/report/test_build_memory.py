"""Memory of writing a bundle: what a plan says, and that a process peaks there."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.machine import TRACING_PROCESS
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.quantization.recipes import WEIGHTS_AT_ONCE
from framefusion.export.report.build_memory import READ, build_memory
from tests.patience import PATIENCE
from tools.bench.big_checkpoint import BigShape, write_big_checkpoint
from tools.bench.setting import SHAPES, Shape

BUILT = """
import json, sys
from pathlib import Path
from framefusion.export.build import build_planned
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
options = BuildOptions(dtype="float16", weights=sys.argv[3])
plan = BuildPlan(Checkpoint(Path(sys.argv[1])), options)
build_planned(plan, Path(sys.argv[2]), verify=False, golden=False)
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(json.dumps(int(status["VmHWM"].split()[0]) * 1024))
"""
WIDE = BigShape(Shape(512, 512, 8, 4, 2, 300_000, False), 1, 64, 2)  # a head beside which all else is small


def test_a_7b_is_quantized_within_2_gb(tmp_path: Path) -> None:
    checkpoint = write_big_checkpoint(BigShape(SHAPES["qwen2-7b"]), tmp_path / "headers", headers_only=True)
    assert build_memory(BuildPlan(Checkpoint(checkpoint), BuildOptions(weights="int4+head"))) < 1.25e9
    floats = build_memory(BuildPlan(Checkpoint(checkpoint), BuildOptions(weights="int4")))
    head = 2 * math.prod(Checkpoint(checkpoint).shape("lm_head.weight"))  # as it is stored, in bfloat16
    assert floats == TRACING_PROCESS + head < 2e9


def test_a_search_adds_what_it_packs_and_the_rows_at_hand(tmp_path: Path) -> None:
    checkpoint = write_big_checkpoint(WIDE, tmp_path / "headers", headers_only=True)
    weights = 512 * 300_000
    packed = weights + 4 * weights // 128
    plan = BuildPlan(Checkpoint(checkpoint), BuildOptions(weights="int8+head"))
    assert build_memory(plan) == TRACING_PROCESS + packed + READ * WEIGHTS_AT_ONCE


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_build_peaks_where_the_plan_says(tmp_path: Path) -> None:
    checkpoint = write_big_checkpoint(WIDE, tmp_path / "checkpoint")
    plan = BuildPlan(Checkpoint(checkpoint), BuildOptions(dtype="float16", weights="int8+head"))
    command = [sys.executable, "-c", BUILT, str(checkpoint), str(tmp_path / "bundle"), "int8+head"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    # never more; the process without a tensor grows with what is traced: 8 layers take 0.2 GB less than 28
    assert build_memory(plan) - 0.25e9 < json.loads(done.stdout) < build_memory(plan)
