"""Weights that no model should have: each becomes codes that are as near as they can be, or is refused by its name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.export.quantization.blocks import BlockFormat, BlockQuantized
from framefusion.export.quantization.float8 import Float8Format, Float8Quantized, Quantized, WeightFormat
from framefusion.export.quantization.recipes import Made, Stored
from framefusion.export.quantization.rounding import round_to_nearest
from framefusion.export.quantization.search import search

INPUTS = (7, 33, 128)  # below a block of 16, not a multiple of any, whole blocks
FORMATS = tuple(BlockFormat(*form) for form in product((4, 8), (16, 128), (True, False)))
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def extremes(inputs: int) -> dict[str, Tensor]:
    """Matrices [5, inputs] by what is odd about them."""
    plain = torch.randn((5, inputs), generator=torch.Generator().manual_seed(0)) * 0.05
    outliers = plain.clone()
    outliers[:, 3] = 1e4
    zeros = plain.clone()
    zeros[0] = 0
    zeros[:, :6] = 0
    alone = torch.zeros_like(plain)
    alone[0, 0] = 1e-3
    return {
        "an outlier a row": outliers, "rows and blocks of zeros": zeros, "zeros": torch.zeros_like(plain),
        "one weight": alone, "a constant": torch.full_like(plain, 0.37), "minus a constant": 0 * plain - 0.37,
        "all above zero": plain.abs(), "all below zero": -plain.abs(), "subnormal": plain * 1e-40, "large": plain * 1e6,
    }  # fmt: skip


def in_blocks(rows: Tensor, form: BlockFormat) -> Tensor:
    """[n, in] -> [n, blocks, block], filled up with zeros."""
    missing = form.blocks(rows.shape[1]) * form.block - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, missing)).reshape(len(rows), -1, form.block)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("inputs", INPUTS)
def test_codes_err_by_a_step_of_their_block_at_most(inputs: int, dtype: torch.dtype) -> None:
    """And those of the search, a block as a whole, never by more than rounding to the nearest."""
    weight = torch.cat(list(extremes(inputs).values()))
    rounding = torch.finfo(dtype)
    for form in FORMATS:
        blocks = in_blocks(weight, form)
        nearest = in_blocks(round_to_nearest(weight, form, dtype).dequantize(), form)
        searched = in_blocks(search(weight, form, dtype).dequantize(), form)
        # 1. a step is the block's range in codes; its scale is rounded, and nothing where the type has no number for it
        span = blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0)
        reach = span / (form.middle - 1) + form.largest * span * rounding.eps + form.largest * rounding.smallest_normal
        assert bool(((nearest - blocks).abs().amax(-1) <= reach).all()), form
        # 2. errors of the search, in the norm that it minimises
        errors = [(found - blocks).double().norm(dim=-1) for found in (nearest, searched)]
        assert bool((errors[1] <= errors[0] * (1 + 1e-5) + 1e-6 * span).all()), form


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_onnx_runtime_multiplies_by_the_same_numbers(form: BlockFormat) -> None:
    """With activations in floats; outliers and zeros among the blocks."""
    for inputs in INPUTS:
        weight = torch.cat([rows for name, rows in extremes(inputs).items() if name not in ("subnormal", "large")])
        blocks = search(weight, form)
        rows = np.random.default_rng(0).standard_normal((3, inputs)).astype(np.float32)
        expected = rows.astype(np.float64) @ blocks.dequantize().double().numpy().T
        found = multiplied(rows, blocks)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def multiplied(rows: Any, blocks: BlockQuantized) -> Any:
    """MatMulNBits of rows [n, in] in ONNX Runtime."""
    packed = blocks.pack()
    tensors = {"weights": packed.packed, "scales": packed.scales}
    if packed.zero_points is not None:
        tensors["zeros"] = packed.zero_points
    outputs, inputs = blocks.codes.shape
    node = helper.make_node(
        "MatMulNBits", ["rows", *tensors], ["out"], domain="com.microsoft",
        K=inputs, N=outputs, bits=blocks.bits, block_size=blocks.block, accuracy_level=1,
    )  # fmt: skip
    initializers = []
    for name, tensor in tensors.items():
        kind = TensorProto.FLOAT if tensor.is_floating_point() else TensorProto.UINT8
        content = tensor.contiguous().numpy()
        initializers.append(helper.make_tensor(name, kind, content.shape, content.tobytes(), raw=True))
    floats = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    graph = helper.make_graph(
        [node], "product", [floats("rows", shape=[None, inputs])], [floats("out", shape=[None, outputs])], initializers
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"rows": rows})[0]


@dataclass(frozen=True)
class Weight:
    """A source of one matrix."""

    matrix: Tensor
    keys: tuple[str, ...] = ("layers.0.mlp.up_proj.weight",)

    def make(self, _: object) -> Tensor:
        return self.matrix.T


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), torch.float32, "up_proj.weight has a weight that is infinite or no number"),
        (float("-inf"), torch.float32, "up_proj.weight has a weight that is infinite or no number"),
        (-1e6, torch.float16, r"weights up to 1e\+06, whose scales float16 cannot hold: build with --dtype float32"),
    ],
)
def test_what_has_no_codes_is_refused_by_name(value: float, dtype: torch.dtype, message: str) -> None:
    weight = torch.ones(4, 32)
    weight[1, 2] = value
    source: Any = Weight(weight)
    checkpoint: Any = None
    with pytest.raises(CheckpointError, match=message):
        Made(source, BlockFormat(4, 32), dtype, partial(search, dtype=dtype)).blocks(checkpoint)


@dataclass(frozen=True)
class Codes:
    """A checkpoint of one matrix in codes."""

    found: Quantized

    def quantized_keys(self, key: str) -> tuple[str, ...]:
        return (key,)

    def quantized_shape(self, key: str) -> tuple[int, int]:
        outputs, inputs = self.found.codes.shape
        return outputs, inputs

    def quantized(self, key: str) -> Quantized | None:
        return self.found


@pytest.mark.parametrize(
    ("form", "scale", "dtype", "message"),
    [
        (Float8Format(), 3e38, torch.float32, r"up to 1.34e\+41, and float32 ends at 3.4e\+38: the file is damaged"),
        (Float8Format(), 3e38, torch.bfloat16, "the file is damaged"),
        (Float8Format(), 150.0, torch.float16, "and float16 ends at 6.55e.04: build with --dtype bfloat16 or float32"),
        (
            Float8Format(),
            146.2,
            torch.float16,
            "a scale of 146, by which a code stands for up to 6.55e.04, and float16",
        ),
        (BlockFormat(4, 16), 3e38, torch.float16, "and float16 ends at 6.55e.04: the file is damaged"),
        (BlockFormat(8, 16), 600.0, torch.float16, "a code stands for up to 7.68e.04, and float16 ends"),
        (BlockFormat(4, 16, symmetric=False), 5e37, torch.float32, "up to 7.5e.38, and float32 ends"),
    ],
)
def test_a_stored_scale_by_which_a_code_would_be_infinite(
    form: WeightFormat, scale: float, dtype: torch.dtype, message: str
) -> None:
    """Graphs multiply code and scale in their type: the scale itself may well be finite there."""
    codes = torch.full((2, 16), 1, dtype=torch.uint8)
    scales = torch.tensor([[0.5], [scale]])
    found: Quantized
    if isinstance(form, Float8Format):
        found = Float8Quantized(codes, scales, form)
    else:
        found = BlockQuantized(codes, scales, None if form.symmetric else codes[:, :1], form.bits, form.block)
    checkpoint: Any = Codes(found)
    stored = Stored("layers.0.mlp.up_proj.weight", checkpoint, form, dtype)
    with pytest.raises(CheckpointError, match=message):
        list(stored.parts(checkpoint))
    found.scales[1] = 0.5
    assert list(stored.parts(checkpoint)) == [found]
