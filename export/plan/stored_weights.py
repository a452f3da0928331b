"""What a build makes of a quantized checkpoint's weights, and what it does not do unless an option says so.

Codes that kernels multiply by go to the graphs as they are stored. Where they cannot (another kind of code, graphs or
engines without such weights), or where the format rounds activations and graphs do not (they do where FP8 weights have
a scale a row and activations a scale a token), the bundle would compute something else than the checkpoint: which of
the ways out is taken is the user's to say. Reads no weight.
"""

from __future__ import annotations

from collections.abc import Collection

from framefusion.errors import BudgetError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.quantized.linear import FloatLinear, GroupedLinear
from framefusion.export.checkpoints.quantized.quantization import Quantization
from framefusion.export.graphs.tracing.dialects import Dialect
from framefusion.export.options import AS_STORED, DEQUANTIZED, BuildOptions
from framefusion.runtime.backends.table import engine_traits


def check_stored(
    checkpoint: Checkpoint, options: BuildOptions, dialect: Dialect, coded: Collection[str], floats: Collection[str]
) -> str:
    """Refuse to build something else than the checkpoint holds without an option that says so.

    Args:
        checkpoint: quantized or not.
        options: of the build; `weights` decides.
        dialect: of the graphs.
        coded: keys of the decoder's matrices whose codes the graphs are to have.
        floats: keys of its quantized matrices that would be floats.

    Returns:
        how the weights are quantized, and what is made of them, for people; "" where nothing is quantized.

    Raises:
        BudgetError: naming the flags among which to choose.
    """
    quantization = checkpoint.quantization
    if quantization is None:
        if options.weights in (AS_STORED, DEQUANTIZED):
            raise BudgetError(f"{checkpoint.folder} holds floats: --weights {options.weights} is for quantized weights")
        return ""
    if options.weights not in (None, AS_STORED):
        floats_of = f"made floats in {options.dtype}"
        return (
            f"{quantization}; {floats_of if options.weights == DEQUANTIZED else f'quantized again, {options.weights}'}"
        )
    rounding = options.weights is None and dialect.float8 and _round_by_token(quantization, coded)
    reason = _reason(quantization, options, dialect, floats, rounding=rounding)
    if reason:
        raise BudgetError(
            f"{checkpoint.folder} is quantized ({quantization}), and {reason}: "
            f"build with {_ways(quantization, options, dialect, floats)}"
        )
    left = len(quantization.linears) - len(set(coded))
    beside = f", {left} outside of the LLM's layers as floats in {options.dtype}" if left else ""
    rounded = f", activations {'rounded likewise' if rounding else 'not rounded'}" if quantization.activations else ""
    return f"{quantization}; taken as they are stored{beside}{rounded}"


def eager_options(checkpoint: Checkpoint) -> BuildOptions:
    """Options of a checkpoint that runs in eager torch, where nothing is built: quantized weights as floats."""
    return BuildOptions(weights=None if checkpoint.quantization is None else DEQUANTIZED)


def _round_by_token(quantization: Quantization, coded: Collection[str]) -> bool:
    """Whether all of these matrices have products that round activations as graphs can: see `Float8Format.rounds`."""
    linears = [quantization.linears[key] for key in coded]
    forms = [linear.form for linear in linears if isinstance(linear, FloatLinear)]
    return len(forms) == len(linears) > 0 and all(form is not None and form.rounds for form in forms)


def _reason(
    quantization: Quantization, options: BuildOptions, dialect: Dialect, floats: Collection[str], *, rounding: bool
) -> str:
    """Why the weights cannot be taken as they are; "" where they can."""
    if options.backend is not None and not engine_traits(options.backend).quantized:
        return f"{options.backend} engines are not compiled of such weights"
    if floats:
        linear = quantization.linears[min(floats)]
        if dialect.signed_codes and isinstance(linear, GroupedLinear) and not linear.symmetric:
            return f"graphs of the dialect {dialect.name} have no zero points, as TensorRT has none"
        if isinstance(linear, FloatLinear) and linear.form is not None and not dialect.float8:
            return f"graphs of the dialect {dialect.name} have no floats of 8 bits ({linear.module})"
        return f"{linear.module} ({linear.description}) has no form of equal numbers in a graph"
    if quantization.activations and options.weights is None and not rounding:
        return "its format rounds activations as well, which no graph here does"
    return ""


def _ways(quantization: Quantization, options: BuildOptions, dialect: Dialect, floats: Collection[str]) -> str:
    """The flags that such a checkpoint can be built with."""
    linears = [quantization.linears[key] for key in floats]
    float8 = [linear for linear in linears if isinstance(linear, FloatLinear) and linear.form is not None]
    ways = [f"--weights {DEQUANTIZED} (floats of --dtype)"]
    if options.backend is None or engine_traits(options.backend).quantized:
        if not floats and quantization.activations:
            ways.append(f"--weights {AS_STORED} (its codes as they are, activations not rounded)")
        if float8 and len(float8) == len(linears) and not dialect.float8:
            ways.append(f"--dialect portable --weights {AS_STORED} (its floats of 8 bits, for TensorRT-RTX)")
        ways.append("--weights int8 or int4 (quantized again; the check measures what that costs)")
        if dialect.float8:
            ways.append("--weights fp8 (quantized again, a scale a row)")
    return ", or ".join(ways)
