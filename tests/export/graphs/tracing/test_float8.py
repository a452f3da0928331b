"""Products with weights in floats of 8 bits: what graphs compute against definitions that nobody here wrote.

onnx's reference evaluator runs the graph by the standard's text, ONNX Runtime by its kernels, and compressed-tensors
says what a checkpoint in this format means.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from framefusion.export.graphs.graph_plan import GraphModule, Signature
from framefusion.export.graphs.layers import Float8Linear
from framefusion.export.graphs.tracing.dialects import DIALECTS
from framefusion.export.graphs.tracing.trace import trace
from framefusion.export.quantization.float8 import Float8Format, Float8Quantized, search_float8
from tests.versions import needs_portable

INPUTS = 64
OUTPUTS = 48
ROWS = Float8Format()
ROUNDED = Float8Format(rounds=True)
BLOCKS = Float8Format(32)
FORMATS = (ROWS, ROUNDED, BLOCKS)


class Product(GraphModule):
    """A linear map alone."""

    def __init__(self, form: Float8Format) -> None:
        super().__init__()
        self.linear = Float8Linear(INPUTS, OUTPUTS, True, form).to("meta")

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.linear(x)
        return product

    def signature(self) -> Signature:
        tokens = torch.export.Dim("tokens")
        return Signature((torch.empty(1, 7, INPUTS, device="meta"),), ({1: tokens},), ("x",), ("y",))


def matrix(form: Float8Format, dtype: torch.dtype = torch.float32) -> tuple[Float8Quantized, Tensor]:
    """Weights with an outlier, and a bias."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn((OUTPUTS, INPUTS), generator=random) * 0.05
    weight[3, 5] = 2.0
    return search_float8(weight, form, dtype), torch.randn(OUTPUTS, generator=random)


def activations() -> Tensor:
    """Tokens of sizes far apart, one of zeros alone, with channels that are far larger than the others."""
    x = torch.randn((1, 9, INPUTS), generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-3, 3, 9)[None, :, None]
    x[..., 7] *= 50
    x[0, 4] = 0
    return x


def graph_of(form: Float8Format, dtype: torch.dtype = torch.float32) -> onnx.ModelProto:
    """The graph with its weights inside."""
    (quantized, bias) = matrix(form, dtype)
    model = trace(Product(form), DIALECTS["portable"], dtype).model
    (codes, scales, _) = quantized.packed()
    values: dict[str, Any] = {"linear.packed": codes, "linear.scales": scales.to(dtype), "linear.bias": bias.to(dtype)}
    for name, value in model.graph.initializers.items():
        if name in values:
            array = values[name].numpy()
            array = array.view(ml_dtypes.float8_e4m3fn) if array.dtype == np.uint8 else array
            assert value.shape is not None
            value.const_value = ir.Tensor(array.reshape(value.shape.numpy()), name=name)
    return ir.to_proto(model)


def expected(form: Float8Format) -> Any:
    """By compressed-tensors' own functions, in fp32."""
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="it is not installed")
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils")
    (quantized, bias) = matrix(form)
    values = quantized.codes.view(torch.float8_e4m3fn)
    strategy = {"strategy": "channel"} if form.block is None else {"strategy": "group", "group_size": form.block}
    arguments = quantization.QuantizationArgs(num_bits=8, type="float", symmetric=True, **strategy)
    weight = lifecycle.dequantize(values, quantized.scales, args=arguments)
    x = activations()
    if form.rounds:
        tokens = quantization.QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="token", dynamic=True)
        (scale, zero) = helpers.compute_dynamic_scales_and_zp(x, tokens, torch.nn.Linear(1, 1))
        x = lifecycle.fake_quantize(x, scale, zero, tokens)
    return (x @ weight.float().T + bias).numpy()


def worst(found: Any, wanted: Any) -> float:
    """Relative to the largest number of each token."""
    largest = np.abs(wanted).max(-1, keepdims=True)
    return float((np.abs(found.astype(np.float64) - wanted) / largest).max())


@needs_portable
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_graphs_compute_what_the_format_means(form: Float8Format) -> None:
    model = graph_of(form)
    onnx.checker.check_model(model, full_check=True)
    x = activations().numpy()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = expected(form)
    by_standard: Any = ReferenceEvaluator(model).run(None, {"x": x})
    for found in (session.run(None, {"x": x})[0], by_standard[0]):
        assert worst(found, wanted) < 2e-6
