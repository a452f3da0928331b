"""Bundles in float16 and bfloat16: the weights written, the graphs run, and what is compared with what.

The limit of a whole model is check.py's, argued there. One op: inputs, output and each product round to half a unit of
2^-10, so 2e-3 of the largest value; scores are summed in fp32 from fp16 inputs, which the reference gets rounded too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from framefusion.errors import BackendError, CheckpointError
from framefusion.export.build import build
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.hashed_file import HashedFile
from framefusion.export.checkpoints.tensors.weights import Source, blocks_of, check_range
from framefusion.export.graphs.tracing.dialects import DIALECTS
from framefusion.export.graphs.tracing.trace import trace
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.runtime.backends.choice import choose
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest_file import read_manifest, write_manifest
from framefusion.runtime.memory import memory_plan
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual
from tests.export.graphs.tracing.test_dialects import CASES, Call
from tests.export.test_build import MODES
from tests.films import write_film

TOLERANCE = 2e-3
TURNS = [Turn("user", (Visual.VIDEO, "What happens?"))]


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["as it is", "turned", "vector", "cube"])
def test_blocks_are_the_tensor(
    stored: torch.dtype, wanted: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framefusion.export.checkpoints.tensors.weights._BLOCK", 100)  # a few rows each
    tensor = torch.randn(13, 20, generator=torch.Generator().manual_seed(0)).to(stored)
    shapes = {"as it is": tensor, "turned": tensor.T, "vector": tensor[0], "cube": tensor.reshape(13, 4, 5)}
    blocks = list(blocks_of(shapes[layout], wanted))
    assert len(blocks) > 1 or layout == "vector"
    assert all(block.is_contiguous() for block in blocks)
    found = torch.cat([block.reshape(-1) for block in blocks])
    assert torch.equal(found, shapes[layout].to(wanted).reshape(-1))


def test_numbers_that_a_type_cannot_hold_are_refused() -> None:
    source = Source("model.layers.3.mlp.down_proj.weight")
    large = torch.tensor([[1.0, -7e4]])
    with pytest.raises(CheckpointError, match=r"down_proj.weight holds numbers up to 70000, float16 ends at 65504"):
        check_range(large, torch.float16, source)
    for tensor, dtype in ((large, torch.bfloat16), (large, torch.float32), (large / 2, torch.float16)):
        check_range(tensor, dtype, source)


def test_a_file_is_hashed_as_it_is_written(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "file") as file:
        file.write(b"some")
        assert file.align(16) == 16
        file.write(np.arange(5, dtype=np.uint8).data)
    content = (tmp_path / "file").read_bytes()
    assert content == b"some" + bytes(12) + bytes(range(5))
    assert (file.record.size, file.record.sha256) == (21, hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.usefixtures("instant_traces")
def test_weights_are_written_in_the_type_asked(checkpoint: Path, tmp_path: Path, dtype: Any) -> None:
    options = BuildOptions(dtype=dtype, depth=1)
    manifest = build(Checkpoint(checkpoint), tmp_path / "bundle", options, verify=False).manifest
    assert manifest.model.dtype == dtype
    assert manifest.embedding.dtype == "float32"  # the table stays as it is stored
    key = "model.layers.0.self_attn.q_proj.weight"
    written = (tmp_path / "bundle/segments/layer00/weights.bin").read_bytes()
    expected = Checkpoint(checkpoint).tensor(key).T.to(getattr(torch, dtype)).contiguous()
    assert expected.view(torch.uint8).numpy().tobytes() in written
    plan32 = BuildPlan(Checkpoint(checkpoint), BuildOptions(depth=1))
    assert manifest.segments[-1].weight_bytes <= plan32.segment_records[-1].weight_bytes


# --- Graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", CASES)
def test_each_op_in_float16(dialect: str, name: str) -> None:
    function, operands = CASES[name]
    module = Call(function, operands)
    names = module.signature().inputs
    model = trace(module, DIALECTS[dialect], torch.float16).model
    halves = [operand.half() if operand.is_floating_point() else operand for operand in operands]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    feeds = {name: half.numpy() for name, half in zip(names, halves, strict=True)}
    (found,) = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
    reference = function(*(half.float() if half.is_floating_point() else half for half in halves)).numpy()
    scores = name.startswith(("similarity", "importance"))
    assert found.dtype == (np.float32 if scores else np.float16)
    assert np.abs(found - reference).max() <= TOLERANCE * np.abs(reference).max()


@pytest.mark.slow
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_every_dialect_in_float16(
    checkpoint: Path, tmp_path: Path, mode: Any, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BuildOptions(reduction=mode, dialect=dialect, dtype="float16", **MODES[mode])
    built = build(Checkpoint(checkpoint), tmp_path / "bundle", options)
    check = built.manifest.check
    assert check["passed"]
    assert check["method"] == "full"
    assert check["tolerance"] == pytest.approx(4 * 2**-11 * math.sqrt(10 / 3 * 4))
    compared = {line["what"] for line in check["lines"]}
    assert {"vision features", "dense logits", "dense decoded logits", "dense logits against transformers"} <= compared
    assert ("reduced similarity" in compared) == (mode == "adaptive")
    assert ("reduced share of swapped tokens" in compared) == (mode == "fixed")

    pipeline = Pipeline(Bundle(built.folder), threads=1)
    prompt, rows = pipeline.read(TURNS, [write_film(tmp_path / "film.mp4")])
    before = np.array(rows.hidden)
    whole = pipeline.prefill(prompt, rows, Request(4), Stopwatch())
    assert {buffer.dtype for cache in whole.caches for buffer in (*cache.keys, *cache.values)} == {np.dtype(np.float16)}
    assert whole.logits.dtype == np.float32
    monkeypatch.setattr(pipeline.backend, "chunk", 24)
    chunks = pipeline.prefill(prompt, rows, Request(4), Stopwatch())
    assert np.abs(whole.logits - chunks.logits).max() < check["tolerance"] * np.abs(whole.logits).max()
    np.testing.assert_array_equal(rows.hidden, before)
    assert len(pipeline.answer(prompt, rows, Request(4)).token_ids) > 0


@pytest.mark.slow
def test_bfloat16_is_built_checked_in_float32_and_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions(dtype="bfloat16", depth=1, max_input_len=512)
    manifest = build(Checkpoint(checkpoint), tmp_path / "bundle", options).manifest
    assert manifest.check["passed"]
    assert manifest.check["method"] == "in float32"
    assert "do not compute bfloat16" in manifest.check["why"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    elements = {value.dtype for value in ir.load(tmp_path / "bundle/segments/rest/graph.onnx").graph.inputs}
    assert elements == {ir.DataType.BFLOAT16, ir.DataType.INT64}


def test_the_runtime_refuses_bfloat16(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    manifest = read_manifest(folder)
    model = dataclasses.replace(manifest.model, dtype="bfloat16")
    write_manifest(folder, dataclasses.replace(manifest, model=model))
    with pytest.raises(BackendError, match=r"bfloat16, the CPU runtime runs float32 and float16 \(.* --dtype float16"):
        choose(Bundle(folder), "onnxruntime")  # by name: OpenVINO runs bfloat16


def test_half_the_bytes_in_caches_and_all_of_them_in_weights(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    segments = tuple(dataclasses.replace(s, weight_bytes=s.weight_bytes // 2) for s in manifest.segments)
    vision = dataclasses.replace(manifest.vision, weight_bytes=manifest.vision.weight_bytes // 2)
    model = dataclasses.replace(manifest.model, dtype="float16")
    half = dataclasses.replace(manifest, model=model, segments=segments, vision=vision)
    whole_plan, half_plan = memory_plan(manifest, 300, 200, 20), memory_plan(half, 300, 200, 20)
    assert half_plan.caches == whole_plan.caches // 2
    assert half_plan.weights == pytest.approx(whole_plan.weights, abs=16)  # the CPU's kernels multiply in fp32
