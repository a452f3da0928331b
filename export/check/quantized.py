"""What is particular in the check of a bundle whose weights are in 4 or 8 bits.

    1. torch graphs in floats      against transformers' class: the checkpoint is read as it is meant (agreement.py)
    2. torch graphs, quantized     against 1: what quantization costs. Measured and recorded; no limit says what is much
    3. the bundle, exact           against 2: its graphs with activations in floats, so the limit is that of floats
    4. the bundle as it runs       against 2: kernels round activations to 8 bits a block, and the limit says so

Graphs with floats of 8 bits round activations themselves where `Float8Format.rounds` says so: then it is the same four
steps, 3 without what rounds and 4 with what such a rounding comes to.

MatMulNBits rounds the activations of a block to 127 steps of its largest one, half a step is 2^-8 of it: as if it was a
type of that precision, so the limit is worked out as for half precision (check.py). Two ways of rounding agree to 1e-6
in one product, and no further than the rounding itself behind many layers: a number near the middle of two steps goes
either way, and the next layers round that difference in turn. Therefore 3, which has no such numbers.

How far such kernels may be off the golden is measured at the build (golden.py): its request through torch graphs whose
quantized linear maps round activations as kernels that are known do (`ROUNDINGS`), on any machine alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from framefusion.export.check.observation import EagerRun
from framefusion.export.eager.backend import Load
from framefusion.export.families.reference.transformers_call import relative_error
from framefusion.export.graphs.graph_plan import GraphModule
from framefusion.export.graphs.layers import Float8Linear, QuantizedLinear
from framefusion.export.graphs.tracing.dialects import DIALECTS
from framefusion.export.quantization.blocks import BlockFormat
from framefusion.export.quantization.float8 import Float8Format
from framefusion.ops.quantized import rounded_to_float8
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.format.manifest import QuantizationRecord

ROUNDED = 2.0**-8
"""Half a step of an activation in 8 bits, as a share of the largest of its block."""
ROUNDED_FLOAT8 = 2.0**-6
"""What rounding activations to floats of 8 bits comes to, as a share of the largest number. Half a step is 2^-4 of a
number at most and 2^-5.3 in the mean square, four products of a layer round, and a number is a third of the largest."""
CODED = 2.0**-8
"""Half a step of a code in a KV cache, as a share of the largest of its channel: the limit of errors where caches are
codes. A number near the middle of two steps goes either way, and where much of the attention is on that key all that
follows changes: in a tiny model up to 4e-4 of the largest logit came of sums in another order."""
EXACT = "activations in floats: "
EXACT_TOKENS = 3  # of an answer: without whole numbers a token takes a hundred times as long
_IN_FLOATS = 1  # accuracy_level: fp32
_LAST_BITS = 2.0**-19
"""A relative change of activations as another order of sums makes it: numbers near the middle of two steps turn."""

RoundActivations = Callable[[Tensor, Any], Tensor]
"""Activations [..., in] as a kernel for weights of a format rounds them."""


class ExactBackend(OnnxRuntimeBackend):
    """The graphs of a bundle, whose products with quantized weights take activations as they are."""

    def _model(self, path: Path, options: Any) -> bytes:
        model = onnx.load(path, load_external_data=False)
        _drop_rounding(model.graph)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = _IN_FLOATS
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        content: bytes = model.SerializeToString()
        return content


def _drop_rounding(graph: onnx.GraphProto) -> None:
    """Let products read activations before they are rounded to floats of 8 bits."""
    before = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    unrounded = {
        node.output[0]: before[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in before
    }
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = unrounded.get(name, name)


def rounded_by_block(activations: Tensor, form: BlockFormat) -> Tensor:
    """127 steps to the largest of a block: ONNX Runtime's MLAS on x86 and most Arm, OpenVINO.  [..., in]"""
    inputs = activations.shape[-1]
    count = form.blocks(inputs)
    missing = count * form.block - inputs
    padded = nn.functional.pad(activations, (0, missing))
    blocked = padded.reshape(*activations.shape[:-1], count, form.block)
    steps = blocked.abs().amax(-1, keepdim=True) / 127
    codes = (blocked / torch.where(steps == 0, 1, steps)).round()
    return (codes * steps).flatten(-2)[..., :inputs]


def rounded_in_last_bits(activations: Tensor, form: BlockFormat) -> Tensor:
    """The same behind sums in another order: other instructions, another number of rows at a time.  [..., in]"""
    channels = torch.arange(activations.shape[-1], dtype=torch.float32)
    return rounded_by_block(activations * (1 + _LAST_BITS * torch.sin(channels)), form)


def rounded_by_row(activations: Tensor, form: BlockFormat) -> Tensor:
    """255 steps from a row's smallest to its largest: KleidiAI's kernels on Arm.  [..., in]"""
    low = activations.amin(-1, keepdim=True).clamp(max=0)
    steps = (activations.amax(-1, keepdim=True).clamp(min=0) - low) / 255
    steps = torch.where(steps == 0, 1, steps)
    zero = (-low / steps).round()
    return ((activations / steps + zero).round().clamp(0, 255) - zero) * steps


def rounded_by_token(activations: Tensor, form: Float8Format) -> Tensor:
    """Floats of 8 bits to the largest of a token, where the format says so.  [..., in]"""
    return rounded_to_float8(activations) if form.rounds else activations


def rounded_by_token_in_last_bits(activations: Tensor, form: Float8Format) -> Tensor:
    """The same behind sums in another order.  [..., in]"""
    channels = torch.arange(activations.shape[-1], dtype=torch.float32)
    return rounded_by_token(activations * (1 + _LAST_BITS * torch.sin(channels)), form)


ROUNDINGS: Mapping[float, tuple[RoundActivations, ...]] = {
    ROUNDED: (rounded_by_block, rounded_in_last_bits, rounded_by_row),
    ROUNDED_FLOAT8: (rounded_by_token, rounded_by_token_in_last_bits),
}
"""Half a step of an activation -> how kernels that are known round activations."""


def rounding_of(quantization: QuantizationRecord | None, dialect: str) -> float:
    """Half a step of the activations that enter products with quantized weights, as a share; 0 where none are rounded.

    Args:
        quantization: the manifest's part on the weights.
        dialect: of the graphs.
    """
    if quantization is None:
        return 0.0
    if any(form.rounds for form in quantization.formats):
        return ROUNDED_FLOAT8
    return ROUNDED if DIALECTS[dialect].rounds_activations else 0.0


class Rounder:
    """Rounds what enters quantized linear maps of torch graphs while `rounding` is set.

    Args:
        dtype: of the bundle, which what enters and leaves them is rounded to as well.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.rounding: RoundActivations | None = None
        self._dtype = dtype

    def watched(self, loaders: Mapping[str, Load]) -> Mapping[str, Load]:
        """The same loaders, of modules with this object's hooks."""
        return {graph: partial(self._watched, loader) for graph, loader in loaders.items()}

    def _watched(self, loader: Load) -> GraphModule:
        module = loader()
        for part in module.modules():
            if isinstance(part, QuantizedLinear | Float8Linear):
                part.register_forward_pre_hook(self._enter)
                part.register_forward_hook(self._leave)
        return module

    def _enter(self, linear: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        assert isinstance(linear, QuantizedLinear | Float8Linear)
        if self.rounding is None:
            return None
        (activations,) = arguments
        return (self.rounding(activations.to(self._dtype).float(), linear.form),)

    def _leave(self, _linear: nn.Module, _arguments: tuple[Tensor, ...], result: Tensor) -> Tensor | None:
        return None if self.rounding is None else result.to(self._dtype).float()


def half_unit(dtype: torch.dtype, *, rounded: float) -> float:
    """The rounding of an activation on its way through a layer, as a share of it; 0 in fp32.

    Args:
        dtype: of activations.
        rounded: see `rounding_of`.
    """
    half = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return max(half, rounded)


def cost_of_quantization(ours: EagerRun, floats: EagerRun, what: str) -> dict[str, Any]:
    """How far quantized weights or caches are from floats, over the same prompt, as plain values.

    Args:
        ours: the torch graphs with codes.
        floats: those with the checkpoint's weights and caches of floats, which decoded the same tokens.
        what: is in codes, for people.

    Returns:
        errors relative to the largest magnitude: of what enters each layer, of logits behind the prompt, at worst
        behind a decoded token; the same tokens that are likeliest; tokens that only one of the two keeps.
    """
    decoded = list(zip(ours.dense.decoded, floats.dense.decoded, strict=True))
    steps = [(ours.dense.logits, floats.dense.logits), *decoded]
    facts: dict[str, Any] = {
        "of": what,
        "errors_by_layer": [relative_error(*pair) for pair in zip(ours.states, floats.states, strict=True)],
        "logits": relative_error(ours.dense.logits, floats.dense.logits),
        "decoded_logits": max(relative_error(*pair) for pair in decoded),
        "same_tokens": sum(int(mine.argmax()) == int(theirs.argmax()) for mine, theirs in steps),
        "tokens": len(steps),
    }
    if ours.reduced is not None and floats.reduced is not None:
        pairs = list(zip(ours.reduced.kept, floats.reduced.kept, strict=True))
        facts["kept_otherwise"] = sum(len(set(mine.tolist()) ^ set(theirs.tolist())) for mine, theirs in pairs)
        facts["kept"] = sum(len(theirs) for _, theirs in pairs)
    return facts


def cost_note(facts: dict[str, Any]) -> str:
    """The same in a line."""
    kept = f", {facts['kept_otherwise']} of {facts['kept']} tokens kept otherwise" if "kept" in facts else ""
    worst = max(facts["errors_by_layer"])
    return (
        f"{facts['of']}: what enters a layer is off by at most {worst:.2g}, logits by "
        f"{facts['logits']:.2g}, behind an answer's tokens by {facts['decoded_logits']:.2g}; the likeliest token is "
        f"the same {facts['same_tokens']} of {facts['tokens']} times{kept}"
    )
