"""The layers that decoder and towers are made of: linear maps stored as the compiled graph wants them, and norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import framefusion.ops.quantized  # noqa: F401  (registers the op)
from framefusion.export.quantization.blocks import BlockFormat
from framefusion.export.quantization.float8 import Float8Format, WeightFormat


def weight(*shape: int) -> nn.Parameter:
    """A parameter without a value: graphs are traced on the meta device and weights go to disk by another way."""
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class Linear(nn.Module):
    """x @ weight + bias with the weight as [in, out]: a plain MatMul, no transpose left for the compiled graph."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = weight(in_features, out_features)
        self.bias = weight(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


class QuantizedLinear(nn.Module):
    """The same with weights in 4 or 8 bits by blocks of inputs: see `framefusion.export.quantization.blocks`."""

    def __init__(self, in_features: int, out_features: int, bias: bool, form: BlockFormat) -> None:
        super().__init__()
        self.in_features = in_features
        self.form = form
        shapes = form.shapes(out_features, in_features)
        self.packed = nn.Parameter(torch.empty(shapes["packed"], dtype=torch.uint8), requires_grad=False)
        self.scales = weight(*shapes["scales"])
        self.zero_points: nn.Parameter | None = None
        if "zero_points" in shapes:
            zero_points = torch.empty(shapes["zero_points"], dtype=torch.uint8)
            self.zero_points = nn.Parameter(zero_points, requires_grad=False)
        self.bias = weight(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        form = self.form
        product: Tensor = torch.ops.framefusion.matmul_nbits(
            x, self.packed, self.scales, self.zero_points, form.bits, form.block, self.in_features, form.signed
        )
        return product if self.bias is None else product + self.bias


class Float8Linear(nn.Module):
    """The same with weights in floats of 8 bits: see `framefusion.export.quantization.float8`."""

    def __init__(self, in_features: int, out_features: int, bias: bool, form: Float8Format) -> None:
        super().__init__()
        self.form = form
        shapes = form.shapes(out_features, in_features)
        self.packed = nn.Parameter(torch.empty(shapes["packed"], dtype=torch.uint8), requires_grad=False)
        self.scales = weight(*shapes["scales"])
        self.bias = weight(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        product: Tensor = torch.ops.framefusion.matmul_float8(x, self.packed, self.scales, self.form.rounds)
        return product if self.bias is None else product + self.bias


AnyLinear = Linear | QuantizedLinear | Float8Linear


def linear(in_features: int, out_features: int, bias: bool, form: WeightFormat | None = None) -> AnyLinear:
    """A linear map whose weights are floats, or in a format."""
    if form is None:
        return Linear(in_features, out_features, bias)
    if isinstance(form, Float8Format):
        return Float8Linear(in_features, out_features, bias, form)
    return QuantizedLinear(in_features, out_features, bias, form)


class JoinedLinear(nn.Module):
    """Several linear maps of one input as one product: their weights side by side.

    Args:
        linears: with biases all or none.
    """

    def __init__(self, linears: Sequence[Linear]) -> None:
        super().__init__()
        self.widths = [linear.weight.shape[1] for linear in linears]
        self.weight = weight(linears[0].weight.shape[0], sum(self.widths))
        self.bias = weight(sum(self.widths)) if linears[0].bias is not None else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., in] -> [..., out] of each map."""
        product = x @ self.weight
        return torch.split(product if self.bias is None else product + self.bias, self.widths, -1)


class RMSNorm(nn.Module):
    """Root mean square norm with a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = weight(width)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, width] -> the same shape."""
        return torch.ops.framefusion.rms_norm(x, self.weight, self.eps)  # type: ignore[no-any-return]


class LayerNorm(nn.Module):
    """Mean and variance norm with weight and bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = weight(width)
        self.bias = weight(width)
        self.width = width
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        return nn.functional.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)
