"""Products with weights in floats of 8 bits in standard operators, as TensorRT fuses them. Knows no other operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript.values import Opset

from framefusion.export.graphs.tracing.operators import declare_op
from framefusion.ops.quantized import FLOAT8_LARGEST

Symbol = Any  # a symbolic tensor of the exporter

_op = Opset("", 24)
_INT = onnx.defs.OpSchema.AttrType.INT
FLOAT8 = int(onnx.TensorProto.FLOAT8E4M3FN)
DEQUANTIZE_ROWS = declare_op(_op, "DequantizeLinear", {"x": "Q", "x_scale": "T"}, ("y",), {"axis": _INT})
DEQUANTIZE_BLOCKS = declare_op(
    _op, "DequantizeLinear", {"x": "Q", "x_scale": "T"}, ("y",), {"axis": _INT, "block_size": _INT}
)
_QUANTIZE = declare_op(_op, "QuantizeLinear", {"x": "T", "y_scale": "T"}, ("y",), {"output_dtype": _INT})
_DEQUANTIZE = declare_op(_op, "DequantizeLinear", {"x": "Q", "x_scale": "T"}, ("y",), {})
LEAST_ROW = 2.0**-14
"""What a row of zeros is divided by: the smallest normal number of float16."""


def _number(value: float, like: Symbol) -> Symbol:
    """A constant of a tensor's type: a scale that is cast is none to TensorRT."""
    return _op.Constant(value=ir.tensor(np.array(value, like.dtype.numpy())))


def portable_matmul_float8(x: Symbol, packed: Symbol, scales: Symbol, rounds: bool) -> Symbol:
    """Weights in floats of 8 bits, whose scales lie along the axis that they are of: see `retype_codes`.

    TensorRT's kernels take scales of activations that are constants. So a row is divided by its largest number, rounded
    by one scale for all, and multiplied by that number behind the product.
    """
    blocks = scales.shape[1]
    inputs = packed.shape[1]
    if blocks == 1:
        weight = DEQUANTIZE_ROWS(packed, scales, axis=0)
    else:
        weight = DEQUANTIZE_BLOCKS(packed, scales, axis=1, block_size=inputs // blocks)
    weight = _op.Transpose(weight, perm=[1, 0])
    if not rounds:
        return _op.MatMul(x, weight)
    largest = _op.ReduceMax(_op.Abs(x), _op.Constant(value_ints=[-1]), keepdims=1)
    largest = _op.Max(largest, _number(LEAST_ROW, x))
    unit = _number(1 / FLOAT8_LARGEST, x)
    codes = _QUANTIZE(_op.Div(x, largest), unit, output_dtype=FLOAT8)
    return _op.Mul(_op.MatMul(_DEQUANTIZE(codes, unit), weight), largest)
