"""Quantized linear maps against the matrices that the formats' own libraries make of them: bit by bit.

tests/goldens/quantized holds maps that AutoAWQ, GPTQModel, compressed-tensors and bitsandbytes wrote, each with the
matrix that the same library reads out of it. transformers' FP8 is installed with transformers and writes here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from framefusion.export.checkpoints.checkpoint import Checkpoint

GOLDENS = Path(__file__).parents[3] / "goldens" / "quantized"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "group_size": 32, "desc_act": False}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
BNB4 = {"quant_method": "bitsandbytes", "load_in_8bit": False, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def written(folder: Path, tensors: Mapping[str, torch.Tensor], setting: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint of these tensors."""
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": setting}))
    return Checkpoint(folder)


def recorded(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that a library wrote, and the matrix that it reads out of them."""
    tensors = load_file(GOLDENS / f"{name}.safetensors")
    return tensors, tensors.pop("weight")


def agrees(checkpoint: Checkpoint, expected: torch.Tensor) -> None:
    """The matrix, whole and in rows, is the library's in every bit."""
    assert list(checkpoint.files) == ["m.weight"]
    assert checkpoint.shape("m.weight") == tuple(expected.shape)
    matrix = checkpoint.tensor("m.weight")
    assert matrix.dtype == expected.dtype
    assert checkpoint.nbytes("m.weight") == matrix.nbytes
    assert torch.equal(matrix, expected)
    assert torch.equal(checkpoint.tensor("m.weight", slice(13, 38)), expected[13:38])
    codes = checkpoint.quantized("m.weight")
    if codes is not None:  # what a graph gets is the same matrix, before its one rounding
        assert codes.format == checkpoint.quantized_format("m.weight")
        ulps = 0.0 if expected.dtype != torch.float32 else 3e-7  # bitsandbytes multiplies in another order
        assert torch.allclose(codes.dequantize(expected.dtype), expected, rtol=ulps, atol=0)


def test_awq(tmp_path: Path) -> None:
    tensors, expected = recorded("awq")
    agrees(written(tmp_path, tensors, AWQ), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["sym", "asym"])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptq(tmp_path: Path, bits: int, kind: str, form: str) -> None:
    tensors, expected = recorded(f"gptq_{bits}_{kind}")
    less_one = tensors.pop("m.qzeros_v1")
    if form == "gptq":
        tensors["m.qzeros"] = less_one
    setting = GPTQ | {"bits": bits, "sym": kind == "sym", "checkpoint_format": form}
    agrees(written(tmp_path, tensors, setting), expected)


@pytest.mark.parametrize(
    "name",
    [
        "ct_w4_group_sym", "ct_w4_group_asym", "ct_w4_channel_sym", "ct_w8_channel_asym", "ct_w8a8", "ct_w8a8_asym",
        "ct_fp8_tensor_static", "ct_fp8_channel_dynamic", "ct_fp8_block",
    ],
)  # fmt: skip
def test_compressed_tensors(tmp_path: Path, name: str) -> None:
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        setting = json.loads(file.metadata()["config"])
    tensors, expected = recorded(name)
    checkpoint = written(tmp_path, tensors, setting)
    agrees(checkpoint, expected)
    assert checkpoint.quantization is not None
    assert bool(checkpoint.quantization.activations) == ("a8" in name or "fp8" in name)


@pytest.mark.parametrize(("name", "setting"), [("bnb_int8", BNB8), ("bnb_nf4", BNB4), ("bnb_nf4_nested", BNB4)])
def test_bitsandbytes(tmp_path: Path, name: str, setting: Mapping[str, Any]) -> None:
    tensors, expected = recorded(name)
    agrees(written(tmp_path, tensors, setting), expected)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(256, 384), (128, 128)])
def test_fp8_in_blocks(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Written and read by transformers' own quantizer of this format."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
    from transformers.utils.quantization_config import FineGrainedFP8Config

    quantizer: Any = FineGrainedFP8HfQuantizer(FineGrainedFP8Config())
    write: Any = Fp8Quantize
    read: Any = Fp8Dequantize
    torch.manual_seed(3)
    parts = write(quantizer).convert({"m.weight": torch.randn(shape).mul(0.05)})
    tensors = {key: value.contiguous() for key, value in parts.items()}
    assert tensors["m.weight"].dtype == torch.float8_e4m3fn
    expected = read(quantizer).convert(
        {"weight": tensors["m.weight"], "weight_scale_inv": tensors["m.weight_scale_inv"].float()}
    )["weight"]
    setting = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    agrees(written(tmp_path, tensors, setting), expected)


def test_fp8_in_blocks_that_are_not_full(tmp_path: Path) -> None:
    """By the definition: transformers reads full blocks alone."""
    torch.manual_seed(4)
    values = torch.randn(200, 136).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2) + 0.5
    expected = values.float() * scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :136]
    setting = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    agrees(written(tmp_path, {"m.weight": values, "m.weight_scale_inv": scales}, setting), expected)


def test_fp8_with_one_scale_of_a_matrix(tmp_path: Path) -> None:
    """As AutoFP8 wrote it, by the definition."""
    torch.manual_seed(5)
    values = torch.randn(48, 32).to(torch.float8_e4m3fn)
    tensors = {"m.weight": values, "m.weight_scale": torch.tensor(0.25), "m.input_scale": torch.tensor(0.5)}
    agrees(written(tmp_path, tensors, {"quant_method": "fp8", "activation_scheme": "static"}), values.float() * 0.25)
