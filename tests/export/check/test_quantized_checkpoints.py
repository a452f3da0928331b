"""Builds of quantized checkpoints against transformers: with its own quantizer where it has one, else dequantized."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from framefusion.export.build import build
from framefusion.export.check import check
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.quantized.dequantized import write_dequantized
from framefusion.export.families.reference import quantized as reference
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.report.card import card
from tests.export.check.test_agreement import agreement, failing
from tests.families import CASES
from tests.families.case import FamilyCase
from tests.quantized_checkpoints import FORMATS, quantized

DEQUANTIZED = BuildOptions(cost=0.5, weights="dequantized")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_agrees_with_transformers(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """FP8 by transformers' own quantizer, compressed-tensors too where that library is installed."""
    plan = BuildPlan(Checkpoint(quantized(checkpoint, tmp_path / name, name)), DEQUANTIZED)
    found = agreement(plan, tmp_path / "bundle")
    assert found.facts["compared"]
    assert failing(found) == []
    by_itself = name == "fp8" or (name in ("w4a16", "w8a8") and importlib.util.find_spec("compressed_tensors"))
    who = "transformers' own quantizer" if by_itself else "this package"
    assert found.facts["weights"].startswith(f"dequantized by {who} (")
    assert not list(tmp_path.glob(".check-*"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_every_family_reads_quantized_checkpoints(case: FamilyCase, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    case.write(plain, case.variants[0])
    plan = BuildPlan(Checkpoint(quantized(plain, tmp_path / "gptq", "gptq")), DEQUANTIZED)
    assert plan.checkpoint.quantization is not None
    assert plan.stored_weights.startswith("GPTQ: 4 bits")
    found = agreement(plan, tmp_path / "bundle")
    assert found.facts["compared"]
    assert failing(found) == []


def test_a_reading_of_ours_that_differs_shows(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reads codes and scales for itself: rows in the wrong blocks would not pass."""
    from framefusion.export.checkpoints.quantized.linear import FloatLinear

    rows = FloatLinear.rows
    monkeypatch.setattr(FloatLinear, "rows", lambda *given: (part * 1.01 for part in rows(*given)))
    plan = BuildPlan(Checkpoint(quantized(checkpoint, tmp_path / "fp8", "fp8")), DEQUANTIZED)
    assert "logits against transformers" in failing(agreement(plan, tmp_path / "bundle"))


def test_a_full_disk_is_said_and_no_failure(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = BuildPlan(Checkpoint(quantized(checkpoint, tmp_path / "awq", "awq")), DEQUANTIZED)
    monkeypatch.setattr(reference, "free_disk", lambda _: 1000)
    found = agreement(plan, tmp_path / "bundle")
    assert not found.facts["compared"]
    assert "dequantized they take" in found.facts["why"]


def test_dequantized_is_the_same_model_without_a_word_of_quantization(checkpoint: Path, tmp_path: Path) -> None:
    source = Checkpoint(quantized(checkpoint, tmp_path / "w4", "w4a16"))
    (tmp_path / "floats").mkdir()
    write_dequantized(source, tmp_path / "floats")
    floats = Checkpoint(tmp_path / "floats")
    assert floats.quantization is None
    assert "quantization_config" not in floats.config
    assert floats.files.keys() == source.files.keys()
    assert {floats.dtype(key) for key in floats.files} == {"F32"}  # bfloat16 products beside tensors in fp32
    for key, tensor in load_file(tmp_path / "floats" / "model.safetensors").items():
        assert torch.equal(tensor, source.tensor(key).float())


def test_codes_are_checked_as_they_run(checkpoint: Path, tmp_path: Path) -> None:
    source = Checkpoint(quantized(checkpoint, tmp_path / "awq", "awq"))
    options = BuildOptions(cost=0.5, similarity_lower_bound=0.9, depth=1, max_input_len=512)
    built = build(source, tmp_path / "bundle", options)
    report = built.manifest.check
    assert report["passed"]
    assert report["transformers"]["compared"]
    assert built.manifest.quantization is not None
    assert built.manifest.quantization.read
    assert built.manifest.source is not None
    assert str(built.manifest.source.quantization).endswith(
        "with zero points in 28 linear maps; taken as they are stored"
    )
    assert "with zero points in 28 linear maps" in card(built.manifest)
    assert check.reference_of(report["transformers"]) == "transformers Qwen2VLForConditionalGeneration"
    assert not list(tmp_path.glob(".check-*"))
