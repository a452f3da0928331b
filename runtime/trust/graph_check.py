"""An ONNX graph of unknown origin, read before a runtime opens it.

A graph is data, but an operator may be code (a custom one), loop without end, or read any file of the machine. So every
operator is in the list of those that this package writes, weights lie within listed files of the bundle, and inputs and
outputs have the sizes that the manifest says: a runtime binds buffers to them by address.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from framefusion.errors import BundleError
from framefusion.runtime.backends.kv_cache import cache_names
from framefusion.runtime.format.bundle_files import place, read_small
from framefusion.runtime.format.manifest import FileRecord, Manifest, SegmentRecord
from framefusion.runtime.format.manifest_rules import WIDTH
from framefusion.runtime.trust.onnx_model import (
    CACHE_ATTENTION,
    QUANTIZED_PRODUCT,
    CacheAttention,
    OnnxModel,
    QuantizedProduct,
    Tensor,
    Value,
)
from framefusion.runtime.trust.onnx_wire import WireError, read_model

MOST_BYTES = 1 << 28  # of a graph without its weights

_STANDARD = (
    "Abs Add And ArgMax Attention Cast CastLike Ceil Clip Concat Constant ConstantOfShape Cos CumSum DequantizeLinear "
    "Div Einsum Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual "
    "HardSigmoid HardSwish Identity If IsNaN LayerNormalization Less LessOrEqual Log MatMul Max Min Mod Mul Neg Not "
    "Or Pad Pow QuantizeLinear Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape "
    "RMSNormalization RotaryEmbedding Round ScatterElements ScatterND Shape Sigmoid Sign Sin Size Slice Softmax Split "
    "Sqrt Squeeze Sub Sum Swish Tanh TensorScatter Tile TopK Transpose Trilu Unsqueeze Where Xor "
)
STANDARD = frozenset(_STANDARD.split())
CONTRIB = frozenset({"GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "QuickGelu"})
OPERATORS: Mapping[str, frozenset[str]] = {"": STANDARD, "com.microsoft": CONTRIB}
"""Operators by domain: what the dialects write, and the plain functions of tensors that torch's exporter may choose."""

_INT32 = (-(1 << 31), (1 << 31) - 1)
_RANGES: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(("num_heads", "q_num_heads", "kv_num_heads"), (0, WIDTH)),
    "batch_dims": (0, 16),
    **dict.fromkeys(("K", "N"), (1, 1 << 24)),
    "bits": (4, 8),
    "block_size": (16, 256),
    "accuracy_level": (1, 4),
    "kv_cache_bit_width": (8, 8),
}
"""Integers that attributes may be, by name; others have 32 bits. ONNX Runtime crashes at some that are beyond."""
_CONTRIB_ATTRIBUTES = frozenset(
    {"num_heads", "kv_num_heads", "alpha", "K", "N", "bits", "block_size", "accuracy_level"}
    | {"k_quant_type", "v_quant_type", "kv_cache_bit_width"}
)
"""Those of operators that are not standard: the others choose code that no build has run."""

_FLOATS = {"float32": 1, "float16": 10, "bfloat16": 16}  # onnx.TensorProto's numbers
_UINT8 = 2
_INT8 = 3
_BRANCHES = ["else_branch", "then_branch"]
_SCALES = 2  # place among the inputs of a quantized product
_INT64 = 7
_FLOAT8 = 17  # e4m3
_INT4 = 22
_BYTES: Mapping[int, float] = {
    1: 4,
    2: 1,
    3: 1,
    4: 2,
    5: 2,
    6: 4,
    7: 8,
    9: 1,
    10: 2,
    11: 8,
    12: 4,
    13: 8,
    16: 2,
    _FLOAT8: 1,
    _INT4: 0.5,
}
"""Type of a tensor -> bytes of a number."""

Sizes = tuple[int | None, ...]
"""A shape; None where any size will do."""


def check_graph(folder: Path, name: str, manifest: Manifest | None = None) -> OnnxModel:
    """Read a graph and refuse what no build of this package writes.

    Args:
        folder: the bundle.
        name: of the graph, within the folder.
        manifest: of the bundle; None compares with the files alone.

    Raises:
        BundleError: the graph is not listed, holds another operator, or does not fit its weights or the manifest.
    """
    files = None if manifest is None else manifest.files
    path = _listed(folder, name, files)
    try:
        model = read_model(read_small(path, MOST_BYTES))
        problem = next(_problems(folder, name, model, manifest), None)
    except (WireError, OSError) as error:
        problem = str(error)
    if problem is not None:
        raise BundleError(f"{path} is no graph that this package wrote ({problem}): rebuild the bundle")
    return model


def _listed(folder: Path, name: str, files: Mapping[str, FileRecord] | None) -> Path:
    if files is not None and name not in files:
        raise BundleError(f"{folder} uses {ascii(name)[:80]}, which its manifest does not list: rebuild the bundle")
    return place(folder, name)


def _problems(folder: Path, name: str, model: OnnxModel, manifest: Manifest | None) -> Iterator[str]:
    for domain, operator in sorted(model.operators):
        if operator not in OPERATORS.get(domain, ()):
            full_name = f"{domain}.{operator}" if domain else operator
            yield f"operator {ascii(full_name)[:80]} is none of those that builds write"
    for domain in model.opsets.keys() - OPERATORS.keys():
        yield f"it takes operators of {ascii(domain)[:80]}"
    for domain, operator, attribute, value in sorted(model.attributes, key=str):
        least, most = _RANGES.get(attribute, _INT32)
        if value is not None and not least <= value <= most:
            yield f"{ascii(attribute)[:60]} of {operator} is {value}, it may be {least} to {most}"
        if domain and attribute not in _CONTRIB_ATTRIBUTES:
            yield f"{operator} has {ascii(attribute)[:60]}, which no build writes"
    for choice in model.choices:
        if sorted(choice.branches) != _BRANCHES or len(set(choice.outputs)) > 1:
            yield f"If has the branches {ascii(choice.branches)[:80]} with {choice.outputs} outputs"
    sizes: dict[str, int] = {}
    for tensor in model.initializers:
        yield from _misplaced(folder, name, tensor, manifest, sizes)
    weights = {tensor.name: tensor for tensor in model.initializers}
    for product in model.products:
        yield from _misshapen(product, weights)
    for attention in model.attentions:
        yield from _misread(attention, model)
    if manifest is not None:
        yield from _misfits(model, *_expected(manifest, name))


def _misplaced(
    folder: Path, name: str, tensor: Tensor, manifest: Manifest | None, sizes: dict[str, int]
) -> Iterator[str]:
    """What is wrong with where a tensor's numbers lie; `sizes` remembers those of the files."""
    label = ascii(tensor.name)[:60]
    width = _BYTES.get(tensor.dtype)
    if width is None or any(size < 0 for size in tensor.shape) or len(tensor.shape) > 16:
        yield f"{label} has type {tensor.dtype} and shape {tensor.shape}"
        return
    needed = math.ceil(math.prod(tensor.shape) * width)
    external = tensor.external
    if external is None:
        if tensor.inline is not None and tensor.inline != needed:
            yield f"{label} has {tensor.inline} bytes, its shape takes {needed}"
        return
    location = external.get("location", "")
    offset = external.get("offset", "")
    length = external.get("length", "")
    if not external.keys() <= {"location", "offset", "length", "checksum"} or not location:
        yield f"{label} does not say where it lies"
        return
    if location not in sizes:
        beside = str(PurePosixPath(name).parent / location)
        sizes[location] = _listed(folder, beside, None if manifest is None else manifest.files).stat().st_size
    begin = _digits(offset)
    size = _digits(length)
    if begin is None or size != needed or begin + size > sizes[location]:
        yield (
            f"{label} is {ascii(length)[:30]} bytes at {ascii(offset)[:30]} of {ascii(location)[:60]}, which has "
            f"{sizes[location]}; its shape takes {needed}"
        )


def _misshapen(product: QuantizedProduct, weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Packed codes of another size than the attributes say: a kernel that packs them anew reads by the attributes."""
    inputs, outputs, bits, block = (product.numbers.get(name, 0) for name in ("K", "N", "bits", "block_size"))
    if bits not in (4, 8) or block < 16 or block & (block - 1):
        yield f"{QUANTIZED_PRODUCT} has codes of {bits} bits in blocks of {block}"
        return
    blocks = -(-inputs // block)
    expected = {1: (outputs, blocks, block * bits // 8), 2: (outputs, blocks), 3: (outputs, -(-blocks * bits // 8))}
    if len(product.inputs) not in (3, 4):
        yield f"{QUANTIZED_PRODUCT} has {len(product.inputs)} inputs"
        return
    for index, name in enumerate(product.inputs[1:], 1):
        tensor = weights.get(name)
        if tensor is None:
            yield f"{QUANTIZED_PRODUCT} takes {ascii(name)[:60]}, which is no weight"
        elif tensor.shape != expected[index] or (tensor.dtype == _UINT8) != (index != _SCALES):
            yield (
                f"{ascii(name)[:60]} has type {tensor.dtype} and shape {tensor.shape}, a product of {inputs} with "
                f"{outputs} in {bits} bits needs {expected[index]}"
            )


def _misread(attention: CacheAttention, model: OnnxModel) -> Iterator[str]:
    """Caches of another type than the attributes say: the kernel reads their memory by the attributes, and beyond it.

    Caches are inputs of the graph, or products, which no kernel gives in whole numbers of 8 bits.
    """
    codes = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    stated = {name: attention.texts.get(name) for name in codes}
    is_quantized = stated == codes and attention.numbers.get("kv_cache_bit_width") == 8
    if not is_quantized and (any(stated.values()) or "kv_cache_bit_width" in attention.numbers):
        yield f"{CACHE_ATTENTION} has caches that are {ascii(stated)[:80]}"
    for name in filter(None, attention.past):
        if name in model.inputs:
            if (model.inputs[name].dtype == _INT8) != is_quantized:
                yield f"{CACHE_ATTENTION} reads {ascii(name)[:60]}, of type {model.inputs[name].dtype}, as another one"
        elif is_quantized or model.producers.get(name) != {"Mul"}:
            yield f"{CACHE_ATTENTION} takes {ascii(name)[:60]}, which is no cache"


def _digits(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def _expected(manifest: Manifest, name: str) -> tuple[dict[str, Value | None], dict[str, Value | None]]:
    """Inputs and outputs that a graph of the manifest may have; None where only the name is known."""
    if name == manifest.vision.graph:
        return _tower(manifest)
    for segment in manifest.segments:
        if name in segment.graphs:
            return _segment(manifest, segment, is_fixed=manifest.fixed is not None and name == segment.prefill)
    return {}, {}


def _tower(manifest: Manifest) -> tuple[dict[str, Value | None], dict[str, Value | None]]:
    vision = manifest.vision
    model = manifest.model
    kind = _FLOATS[model.dtype]
    free = -1
    inputs: dict[str, Value | None] = dict.fromkeys(vision.settings.inputs)
    if "cos" in inputs:
        inputs |= dict.fromkeys(("cos", "sin"), Value(kind, (free, free, vision.head_dim // 2)))
    outputs: dict[str, Value | None] = {"tokens": Value(kind, (free, model.hidden_size))}
    if vision.deepstack:
        outputs["deepstack"] = Value(kind, (vision.deepstack, free, model.hidden_size))
    patches = Value(_UINT8 if vision.input == "uint8" else kind, (free, free, vision.patch_width))
    return inputs | {"patches": patches}, outputs


def _segment(
    manifest: Manifest, segment: SegmentRecord, *, is_fixed: bool
) -> tuple[dict[str, Value | None], dict[str, Value | None]]:
    model = manifest.model
    layers = len(segment.attention_layers)
    kind = _FLOATS[model.dtype]
    free = -1
    half = model.head_dim // 2
    rows = Value(kind, (1, free, model.hidden_size))
    inputs: dict[str, Value | None] = {"hidden": rows, "kv_len": Value(_INT64, (layers,))}
    inputs |= dict.fromkeys(("cos", "sin"), Value(kind, (1, free, half)))
    cached = kind if manifest.kv_cache is None else _INT8
    cache = Value(cached, (1, model.num_kv_heads, free, model.head_dim))
    inputs |= dict.fromkeys(cache_names("past", layers), cache)
    outputs: dict[str, Value | None] = dict.fromkeys(cache_names("present", layers), cache)
    vector = Value(_INT64, (free,))
    if segment.deepstack:
        inputs["deepstack"] = Value(kind, (segment.deepstack, free, model.hidden_size))
    if segment.scores:
        inputs["previous"] = vector
        outputs |= dict.fromkeys(("similarity", "importance"), Value(_FLOATS["float32"], (free,)))
    if segment.scores or segment.head:
        inputs["last"] = Value(_INT64, (1,))
    if is_fixed:
        inputs |= dict.fromkeys(("label", "order", "drops"), vector)
        outputs["origin"] = vector
    if segment.head:
        outputs["logits"] = Value(_FLOATS["float32"], (1, model.vocab_size))
    else:
        outputs["hidden_out"] = rows
    return inputs, outputs


def _misfits(
    model: OnnxModel, inputs: Mapping[str, Value | None], outputs: Mapping[str, Value | None]
) -> Iterator[str]:
    """Inputs and outputs that are not those which the manifest speaks of; a graph may lack inputs it has no use for."""
    for what, declared, expected in (("input", model.inputs, inputs), ("output", model.outputs, outputs)):
        for name, value in declared.items():
            wanted = expected.get(name)
            if name not in expected:
                yield f"it has an {what} {ascii(name)[:60]} that the manifest does not speak of"
            elif wanted is not None and not _fits(value, wanted):
                yield f"{what} {name} has type {value.dtype} and shape {value.shape}, the manifest says {wanted}"
    for name in outputs.keys() - model.outputs.keys():
        yield f"it has no output {name}"


def _fits(value: Value, wanted: Value) -> bool:
    alike = zip(value.shape, wanted.shape, strict=False)
    return (
        value.dtype == wanted.dtype
        and len(value.shape) == len(wanted.shape)
        and all(-1 in pair or pair[0] == pair[1] for pair in alike)
    )
