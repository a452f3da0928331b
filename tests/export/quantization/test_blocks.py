"""Packed codes beside ONNX Runtime's own quantizer, and what no quantized matrix may be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime.capi import _pybind_state as native

from framefusion.errors import CheckpointError
from framefusion.export.quantization.blocks import BlockFormat, BlockQuantized, Packed, unpack
from framefusion.export.quantization.rounding import round_to_nearest

QUANTIZERS = {4: native.quantize_matmul_4bits, 8: native.quantize_matmul_8bits}  # what matmul_nbits_quantizer calls


def quantized_by_onnxruntime(weight: torch.Tensor, form: BlockFormat) -> Packed:
    outputs, inputs = weight.shape
    shapes = BlockFormat(form.bits, form.block, symmetric=False).shapes(outputs, inputs)
    packed = np.zeros(shapes["packed"], np.uint8)
    scales = np.zeros(shapes["scales"], np.float32)
    zeros = np.zeros(shapes["zero_points"], np.uint8)
    missing = form.blocks(inputs) * form.block - inputs
    padded = np.ascontiguousarray(np.pad(weight.numpy().T, ((0, missing), (0, 0))))
    QUANTIZERS[form.bits](packed, padded, scales, zeros, form.block, outputs, inputs, form.symmetric)
    return Packed(torch.tensor(packed), torch.tensor(scales), None if form.symmetric else torch.tensor(zeros))


@pytest.mark.parametrize("inputs", [96, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_that_of_onnxruntimes_quantizer(bits: int, symmetric: bool, inputs: int) -> None:
    weight = torch.randn(7, inputs, generator=torch.Generator().manual_seed(bits))
    form = BlockFormat(bits, 32, symmetric)
    theirs = quantized_by_onnxruntime(weight, form)
    read = unpack(theirs, form, inputs)
    # 1. their bytes mean what they mean there: each weight is within a step of the original, the clipped extreme too
    steps = read.scales.abs().repeat_interleave(32, 1)[:, :inputs]
    assert ((read.dequantize() - weight).abs() <= 1.01 * steps).all()
    # 2. and packing gives their bytes again
    again = read.pack()
    assert torch.equal(again.packed, theirs.packed)
    if again.zero_points is not None and theirs.zero_points is not None:
        assert torch.equal(again.zero_points, theirs.zero_points)
    # 3. rounding to the nearest chooses their scales and codes
    ours = round_to_nearest(weight, form)
    assert torch.allclose(ours.scales, read.scales, rtol=1e-6)
    assert (ours.codes.int() - read.codes.int()).abs().max() <= 1


@pytest.mark.parametrize("inputs", [100, 130])
def test_a_row_that_ends_within_a_block_comes_back(inputs: int) -> None:
    weight = torch.randn(5, inputs, generator=torch.Generator().manual_seed(1))
    for bits in (4, 8):
        form = BlockFormat(bits, 64, symmetric=True)
        made = round_to_nearest(weight, form)
        packed = made.pack()
        assert {name: tuple(getattr(packed, name).shape) for name in form.shapes(5, inputs)} == form.shapes(5, inputs)
        assert torch.equal(unpack(packed, form, inputs).codes, made.codes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(2, 32, dtype=torch.int8)}, "codes are torch.int8"),
        ({"codes": torch.full((2, 32), 16, dtype=torch.uint8)}, "a code is 16, of 4 bits 15 is the end"),
        ({"scales": torch.ones(2, 2)}, r"scales are torch.float32 \(2, 2\)"),
        ({"scales": torch.tensor([[1.0], [float("nan")]])}, "not finite"),
        ({"zero_points": torch.zeros(2, 1, dtype=torch.int32)}, "zero points are torch.int32"),
        ({"zero_points": torch.full((2, 1), 16, dtype=torch.uint8)}, "a zero point is 16"),
        ({"bits": 5}, "weights of 5 bits"),
        ({"block": 48}, "blocks of 48 weights"),
    ],
)
def test_what_is_no_quantized_matrix_is_refused(changes: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"codes": torch.zeros(2, 32, dtype=torch.uint8), "scales": torch.ones(2, 1)}
    fields |= {"zero_points": None}
    with pytest.raises(CheckpointError, match=message):
        BlockQuantized(**({"bits": 4, "block": 32} | fields | changes))
