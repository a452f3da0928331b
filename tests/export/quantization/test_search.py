"""The error of the search beside rounding to the nearest and beside ONNX Runtime's k-quant, over trained weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu
from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.quantization.blocks import BlockFormat, unpack
from framefusion.export.quantization.rounding import round_to_nearest
from framefusion.export.quantization.search import search

TRAINED = Path(__file__).parents[2] / "models" / "tiny_qwen2_vl"
KEYS = ("model.layers.3.self_attn.v_proj.weight", "model.layers.9.mlp.down_proj.weight")


def error(ours: Tensor, weight: Tensor) -> float:
    return float((ours - weight).norm() / weight.norm())


@pytest.fixture(scope="module", params=KEYS)
def weight(request: pytest.FixtureRequest) -> Tensor:
    return Checkpoint(TRAINED).tensor(request.param, slice(64)).float()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block", "gain"), [(4, 32, 0.04), (4, 128, 0.04), (8, 128, 0.01)])
def test_the_search_errs_less_than_rounding(
    weight: Tensor, bits: int, block: int, gain: float, symmetric: bool
) -> None:
    form = BlockFormat(bits, block, symmetric)
    rounded = error(round_to_nearest(weight, form).dequantize(), weight)
    found = search(weight, form).dequantize()
    assert error(found, weight) < (1 - gain) * rounded
    # k-quant has zero points always, and knows no scales of a type
    if not symmetric:
        codes, scales, zeros = quant_tensor_k_quant_cpu(weight.numpy(), bits, block)
        theirs = torch.tensor((codes - zeros) * scales).reshape(weight.shape).float()
        assert error(found, weight) <= error(theirs, weight)


def test_scales_are_of_the_type_that_they_are_written_in(weight: Tensor) -> None:
    form = BlockFormat(4, 32)
    for dtype in (torch.float16, torch.bfloat16):
        found = search(weight, form, dtype)
        assert torch.equal(found.scales, found.scales.to(dtype).float())
        assert error(found.dequantize(), weight) < error(round_to_nearest(weight, form, dtype).dequantize(), weight)


def test_what_an_input_counts_decides_where_errors_go(weight: Tensor) -> None:
    form = BlockFormat(4, 128)
    importance = torch.where(torch.arange(weight.shape[1]) % 4 == 0, 100.0, 1.0)
    alike = search(weight, form).dequantize() - weight
    weighed = search(weight, form, importance=importance).dequantize() - weight
    assert (weighed.square() * importance).sum() < 0.95 * (alike.square() * importance).sum()


def test_blocks_of_zeros_and_short_rows_are_exact_zeros() -> None:
    weight = torch.zeros(3, 40)
    weight[1, :32] = torch.linspace(-1, 1, 32)
    for symmetric in (True, False):
        for chosen in (search(weight, BlockFormat(4, 32, symmetric)), round_to_nearest(weight, BlockFormat(4, 32))):
            assert torch.equal(chosen.dequantize()[[0, 2]], torch.zeros(2, 40))
            assert torch.isfinite(chosen.dequantize()).all()


def test_signed_codes_of_8_bits_have_scales_above_zero(weight: Tensor) -> None:
    """TensorRT refuses others, but of INT4 (test_tensorrt_quantized.py)."""
    zeros = torch.cat([weight, torch.zeros_like(weight[:3])])
    for bits in (4, 8):
        form = BlockFormat(bits, 32, signed=True)
        found = search(zeros, form)
        packed = found.pack(signed=True)
        assert (packed.scales != 0).all()
        assert bits == 4 or (packed.scales > 0).all()
        assert torch.equal(unpack(packed, form, zeros.shape[1]).dequantize(), found.dequantize())
        unsigned = error(search(weight, BlockFormat(bits, 32)).dequantize(), weight)
        assert error(found.dequantize()[:-3], weight) < 1.05 * unsigned
    with pytest.raises(CheckpointError, match="a scale of INT8 is below 0"):
        replace(found, scales=-found.scales).pack(signed=True)
