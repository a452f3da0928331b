"""Dialects: how each custom op of the graph is said to a target. One table a target; nothing else differs between them.

`gqa` speaks to ONNX Runtime in its contrib operators: the cache is updated in place and every shape is dynamic.
`portable` uses standard operators of opset 24 only (TensorScatter, then Attention), which TensorRT reads too and ONNX
Runtime's CPU kernels can verify.

The functions below are called by torch's exporter with symbolic tensors and emit nodes as they run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnxscript.values import Opset

from framefusion.export.graphs.tracing import kv_cache
from framefusion.export.graphs.tracing.float8 import DEQUANTIZE_BLOCKS, portable_matmul_float8
from framefusion.export.graphs.tracing.operators import declare_op
from framefusion.reduction.tracks import DISSIMILAR

Symbol = Any  # a symbolic tensor of the exporter
Translation = Callable[..., Any]

_op = Opset("", 23)
_op24 = Opset("", 24)
_contrib = Opset("com.microsoft", 1)
_Schema = onnx.defs.OpSchema
_INT = _Schema.AttrType.INT
_FLOAT = _Schema.AttrType.FLOAT
_GRAPH = _Schema.AttrType.GRAPH
INT32 = int(onnx.TensorProto.INT32)
INT64 = int(onnx.TensorProto.INT64)
FLOAT32 = int(onnx.TensorProto.FLOAT)


_GQA = declare_op(
    _contrib,
    "GroupQueryAttention",
    dict.fromkeys(("query", "key", "value", "past_key", "past_value"), "T")
    | dict.fromkeys(("seqlens_k", "total_sequence_length"), "M"),
    ("output", "present_key", "present_value"),
    {"num_heads": _INT, "kv_num_heads": _INT},
)
_IF = declare_op(
    _op, "If", {"cond": "B"}, ("output", "present_key", "present_value"),
    {"then_branch": _GRAPH, "else_branch": _GRAPH},
)  # fmt: skip
_MULTI_HEAD = declare_op(
    _contrib, "MultiHeadAttention", dict.fromkeys(("query", "key", "value"), "T"), ("output",), {"num_heads": _INT}
)
_MASKED_MULTI_HEAD = declare_op(
    _contrib,
    "MultiHeadAttention",
    dict.fromkeys(("query", "key", "value", "bias"), "T") | {"key_padding_mask": "M"} | {"attention_bias": "T"},
    ("output",),
    {"num_heads": _INT},
)
_MASKED_ATTENTION = declare_op(
    _op,
    "Attention",
    dict.fromkeys(("Q", "K", "V", "attn_mask"), "T"),
    ("Y",),
    {"q_num_heads": _INT, "kv_num_heads": _INT},
)
_ATTENTION = declare_op(
    _op, "Attention", dict.fromkeys(("Q", "K", "V"), "T"), ("Y",), {"q_num_heads": _INT, "kv_num_heads": _INT}
)
_CACHE_ATTENTION = declare_op(
    _op24,
    "Attention",
    dict.fromkeys(("Q", "K", "V", "attn_mask", "past_key", "past_value"), "T") | {"nonpad_kv_seqlen": "N"},
    ("Y",),
    {"is_causal": _INT},
)
_NBITS = dict.fromkeys(("K", "N", "bits", "block_size", "accuracy_level"), _INT)
_MATMUL_NBITS = declare_op(_contrib, "MatMulNBits", {"A": "T", "B": "Q", "scales": "T"}, ("Y",), _NBITS)
_MATMUL_NBITS_ZEROS = declare_op(
    _contrib, "MatMulNBits", {"A": "T", "B": "Q", "scales": "T", "zero_points": "Q"}, ("Y",), _NBITS
)
_QUICK_GELU = declare_op(_contrib, "QuickGelu", {"X": "T"}, ("Y",), {"alpha": _FLOAT})


INT8_COMPUTE = 4
"""accuracy_level of MatMulNBits: activations are rounded to 8 bits a block, and products are of whole numbers. Without
it ONNX Runtime's CPU kernels multiply 8-bit weights a hundred times slower, and 4-bit ones no faster than floats."""


def _ints(*values: int) -> Symbol:
    return _op.Constant(value_ints=list(values))


def _float(value: float) -> Symbol:
    return _op.Constant(value_float=value)


def rms_norm(x: Symbol, weight: Symbol, eps: float) -> Symbol:
    """Standard in opset 23."""
    return _op.RMSNormalization(x, weight, axis=-1, epsilon=eps)


def rotary(x: Symbol, cos: Symbol, sin: Symbol, num_heads: int) -> Symbol:
    """Standard in opset 23; without position ids the tables are per token, which is how M-RoPE fits in."""
    return _op.RotaryEmbedding(x, cos, sin, num_heads=num_heads)


def gqa_cache_attention(
    query: Symbol, key: Symbol, value: Symbol, past_key: Symbol, past_value: Symbol, kv_len: Symbol, heads: int, kv: int
) -> Symbol:
    """`seqlens_k` is each row's valid length - 1; `total_sequence_length`, the longest one, has the past of a lone row
    beyond the query."""
    before = _op.Cast(_op.Sub(kv_len, _ints(1)), to=INT32)
    total = _op.Cast(_op.ReduceMax(kv_len, keepdims=1), to=INT32)
    return _GQA(query, key, value, past_key, past_value, before, total, num_heads=heads, kv_num_heads=kv)


def gqa_quantized_cache_attention(
    query: Symbol,
    key: Symbol,
    value: Symbol,
    past_key: Symbol,
    past_value: Symbol,
    key_scale: Symbol,
    value_scale: Symbol,
    kv_len: Symbol,
    heads: int,
    kv: int,
) -> Symbol:
    """As above over caches in int8: a branch for one token, another for a prompt (kv_cache.py)."""
    before = _op.Cast(_op.Sub(kv_len, _ints(1)), to=INT32)
    total = _op.Cast(_op.ReduceMax(kv_len, keepdims=1), to=INT32)
    scales = tuple(_op.Cast(scale, to=FLOAT32) for scale in (key_scale, value_scale))
    arguments = ((query, key, value), (past_key, past_value), scales, (before, total), heads, kv)
    is_one = _op.Equal(_op.Shape(query, start=1, end=2), _ints(1))
    return _IF(
        is_one,
        then_branch=kv_cache.one_token("one_token", *arguments),
        else_branch=kv_cache.many_tokens("many_tokens", *arguments),
    )


def portable_cache_attention(
    query: Symbol, key: Symbol, value: Symbol, past_key: Symbol, past_value: Symbol, kv_len: Symbol, heads: int, kv: int
) -> Symbol:
    """Scatter the new rows into the cache at kv_len - S, then attend to the first kv_len of it, lower right causal.

    Each row of a batch has a length of its own, and so a place in its cache.
    """
    length = _op.Shape(query, start=1, end=2)
    start = _op.Sub(kv_len, length)

    def split(x: Symbol, count: int) -> Symbol:  # [B, S, n*hd] -> [B, n, S, hd]
        return _op.Transpose(_op.Reshape(x, _ints(0, 0, count, -1)), perm=[0, 2, 1, 3])

    present_key = _op24.TensorScatter(past_key, split(key, kv), start, axis=2)
    present_value = _op24.TensorScatter(past_value, split(value, kv), start, axis=2)
    out = _CACHE_ATTENTION(split(query, heads), present_key, present_value, None, None, None, kv_len, is_causal=1)
    merged = _op.Reshape(_op.Transpose(out, perm=[0, 2, 1, 3]), _ints(0, 0, -1))
    return merged, present_key, present_value


def contrib_full_attention(query: Symbol, key: Symbol, value: Symbol, heads: int) -> Symbol:
    """ONNX Runtime's fused kernel, which never writes the P x P scores out."""
    return _MULTI_HEAD(query, key, value, num_heads=heads)


def portable_full_attention(query: Symbol, key: Symbol, value: Symbol, heads: int) -> Symbol:
    """Attention without a mask; 3-D inputs need the head counts."""
    return _ATTENTION(query, key, value, q_num_heads=heads, kv_num_heads=heads)


def contrib_masked_attention(query: Symbol, key: Symbol, value: Symbol, bias: Symbol, heads: int) -> Symbol:
    """As above, the mask added to the scores."""
    return _MASKED_MULTI_HEAD(query, key, value, None, None, bias, num_heads=heads)


def portable_masked_attention(query: Symbol, key: Symbol, value: Symbol, bias: Symbol, heads: int) -> Symbol:
    """As above, the mask added to the scores."""
    return _MASKED_ATTENTION(query, key, value, bias, q_num_heads=heads, kv_num_heads=heads)


def contrib_matmul_nbits(
    x: Symbol, packed: Symbol, scales: Symbol, zeros: Symbol, bits: int, block: int, inputs: int, signed: bool
) -> Symbol:
    """ONNX Runtime's kernel, which reads codes as they are packed here."""
    assert not signed  # a plan takes signed codes for the other dialect alone
    sizes = {"K": inputs, "N": packed.shape[0], "bits": bits, "block_size": block, "accuracy_level": INT8_COMPUTE}
    if zeros is None:
        return _MATMUL_NBITS(x, packed, scales, **sizes)
    return _MATMUL_NBITS_ZEROS(x, packed, scales, zeros, **sizes)


def portable_matmul_nbits(
    x: Symbol, packed: Symbol, scales: Symbol, zeros: Symbol, bits: int, block: int, inputs: int, signed: bool
) -> Symbol:
    """Weights of whole numbers, which engines fuse with the product: `retype_codes` says what they are typed as."""
    assert signed  # a plan takes signed codes for this dialect alone, and they have no zero points
    assert zeros is None
    return _op.MatMul(x, _op.Transpose(DEQUANTIZE_BLOCKS(packed, scales, axis=1, block_size=block), perm=[1, 0]))


def contrib_swish(x: Symbol, alpha: float) -> Symbol:
    """One pass over memory instead of two or three."""
    return _QUICK_GELU(x, alpha=alpha)


def portable_swish(x: Symbol, alpha: float) -> Symbol:
    """Sigmoid and a product: engines fuse them."""
    scaled = x if alpha == 1.0 else _op.Mul(x, _op.CastLike(_float(alpha), x))
    return _op.Mul(x, _op.Sigmoid(scaled))


def _flattened(x: Symbol) -> Symbol:
    """[1, S, D] -> [S, D], and several rows without an error: nobody reads their scores."""
    return _op.Flatten(x, axis=2)


def similarity(hidden: Symbol, previous: Symbol) -> Symbol:
    """Cosine to the gathered previous token, fp32; -2 where there is none or a norm is zero."""
    return _similarity(_flattened(hidden), previous)


def _first_row(x: Symbol) -> Symbol:
    """[B, S, D] -> [S, D]: of several rows nobody reads any scores."""
    return _op.Squeeze(_op.Slice(x, _ints(0), _ints(1), _ints(0)), _ints(0))


def first_row_similarity(hidden: Symbol, previous: Symbol) -> Symbol:
    """As above, of the first row alone: a static shape of several rows says as many tokens as one of a single row."""
    return _similarity(_first_row(hidden), previous)


def _similarity(hidden: Symbol, previous: Symbol) -> Symbol:
    rows = _op.Cast(hidden, to=FLOAT32)
    index = _op.Max(previous, _ints(0))
    dots = _op.ReduceSum(_op.Mul(rows, _op.Gather(rows, index, axis=0)), _ints(-1), keepdims=0)
    norms = _op.ReduceL2(rows, _ints(-1), keepdims=0)
    scale = _op.Mul(norms, _op.Gather(norms, index, axis=0))
    comparable = _op.And(_op.GreaterOrEqual(previous, _ints(0)), _op.Greater(scale, _float(0.0)))
    tiny = _float(float(torch.finfo(torch.float32).tiny))
    return _op.Where(comparable, _op.Div(dots, _op.Max(scale, tiny)), _float(DISSIMILAR))


def importance(query: Symbol, key: Symbol, last: Symbol, rows: int, heads: int, kv: int) -> Symbol:
    """Softmax of a few query rows over all keys, mean over heads and rows.

    query [S, H*hd] -> chosen rows [kv, rows*g, hd] --MatMul-- [kv, hd, S] <- key;  mask, softmax, mean -> [S]
    """
    return _importance(_flattened, query, key, last, rows, heads, kv)


def first_row_importance(query: Symbol, key: Symbol, last: Symbol, rows: int, heads: int, kv: int) -> Symbol:
    """As above, of the first row alone."""
    return _importance(_first_row, query, key, last, rows, heads, kv)


def _importance(
    rows_of: Callable[[Symbol], Symbol], query: Symbol, key: Symbol, last: Symbol, rows: int, heads: int, kv: int
) -> Symbol:
    chosen = _op.Max(_op.Sub(last, _ints(*range(rows))), _ints(0))  # [rows]
    picked = _op.Gather(rows_of(query), chosen, axis=0)
    q = _op.Transpose(_op.Reshape(_op.Cast(picked, to=FLOAT32), _ints(rows, kv, heads // kv, -1)), perm=[1, 0, 2, 3])
    q = _op.Reshape(q, _ints(0, rows * (heads // kv), -1))
    k = _op.Reshape(_op.Cast(rows_of(key), to=FLOAT32), _ints(0, kv, -1))
    head_dim = _op.Cast(_op.Shape(q, start=2, end=3), to=FLOAT32)
    scores = _op.Div(_op.MatMul(q, _op.Transpose(k, perm=[1, 2, 0])), _op.Sqrt(head_dim))  # [kv, rows*g, S]
    scores = _op.Reshape(scores, _ints(kv, rows, heads // kv, -1))
    length = _op.Squeeze(_op.Shape(query, start=1, end=2), _ints(0))
    start = _op.Squeeze(_ints(0), _ints(0))
    step = _op.Squeeze(_ints(1), _ints(0))
    visible = _op.LessOrEqual(_op.Range(start, length, step), _op.Unsqueeze(chosen, _ints(1)))  # [rows, S]
    hidden = _op.Unsqueeze(_op.Where(visible, _float(0.0), _float(float("-inf"))), _ints(1))  # [rows, 1, S]
    return _op.ReduceMean(_op.Softmax(_op.Add(scores, hidden), axis=-1), _ints(0, 1, 2), keepdims=0)


@dataclass(frozen=True)
class Dialect:
    """A target's way to say the custom ops.

    Attributes:
        name: as --dialect and the manifest have it.
        translations: custom op -> function that emits operators for it.
        exact_shapes: any length runs as it is; else a prefill has one static size a bucket.
        opset: the lowest that has its operators: older runtimes refuse newer ones.
        head_dim_multiple: of the channels of a head, as its kernels need them.
        signed_codes: see `BlockFormat.signed`.
        float8: it has products with weights in floats of 8 bits.
        rounds_activations: its products with quantized weights round activations to 8 bits; else these are floats.
        quantized_caches: it has attention over caches in int8, in operators of `kv_cache.OPSET`.
    """

    name: str
    translations: Mapping[str, Translation]
    exact_shapes: bool
    opset: int
    head_dim_multiple: int = 1
    signed_codes: bool = False
    float8: bool = False
    rounds_activations: bool = True
    quantized_caches: bool = False

    def table(self) -> dict[Any, Translation]:
        """As torch's exporter wants it: overload -> function."""
        return {getattr(torch.ops.framefusion, op).default: function for op, function in self.translations.items()}


_COMMON: dict[str, Translation] = {"rms_norm": rms_norm, "rotary": rotary}
DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect(  # ONNX Runtime: GroupQueryAttention over caches updated in place, dynamic shapes
            "gqa",
            _COMMON
            | {
                "cache_attention": gqa_cache_attention,
                "quantized_cache_attention": gqa_quantized_cache_attention,
                "full_attention": contrib_full_attention,
                "masked_attention": contrib_masked_attention,
                "matmul_nbits": contrib_matmul_nbits,
                "swish": contrib_swish,
                "similarity": similarity,
                "importance": importance,
            },
            exact_shapes=True,
            opset=23,
            head_dim_multiple=8,
            quantized_caches=True,
        ),
        Dialect(  # standard operators of opset 24: TensorScatter + Attention, static buckets
            "portable",
            _COMMON
            | {
                "cache_attention": portable_cache_attention,
                "full_attention": portable_full_attention,
                "masked_attention": portable_masked_attention,
                "matmul_nbits": portable_matmul_nbits,
                "matmul_float8": portable_matmul_float8,
                "swish": portable_swish,
                "similarity": first_row_similarity,
                "importance": first_row_importance,
            },
            exact_shapes=False,
            opset=24,
            signed_codes=True,
            float8=True,
            rounds_activations=False,
        ),
    )
}
