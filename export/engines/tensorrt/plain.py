"""A graph of the portable dialect in the operators that TensorRT had before it had layers for attention and caches.

TensorRT's parser knows Attention since 10.14, TensorScatter, RMSNormalization and RotaryEmbedding since 10.15; that of
10.3, which is on the Jetsons of JetPack 6, reads opset 20. What is said here in its operators:

    TensorScatter        nothing is scattered: the new rows are an output, `rows_key_j`, which the runtime appends to
                         the cache behind the run; attention reads the cache and the rows, one behind the other
    Attention            Q Kt + mask, softmax, product with V; heads that share keys are rows of one product
    RMSNormalization     in fp32, as the operator says
    RotaryEmbedding      halves, products and sums
    CumSum               sums of blocks: the parser makes a loop of one turn for each element of it

The mask is computed in the graph, of the lengths of the caches and the sizes of the inputs: a query sees the slots of
the cache below kv_len - S, and of the new rows itself and those before it. A prefill, which no tokens precede, is run
over a cache of PREFILL_SLOTS slots, all of which are masked. No row is masked wholly, and masked scores stay finite.

In place would be shorter and is nowhere promised: an output at the address of an input is allowed to plug-ins alone.
Knows no library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from framefusion.errors import BundleError
from framefusion.runtime.backends.kv_cache import rows_name

OPSET = 20  # the newest that the parser of TensorRT 10.3 documents, and the IR that belongs to it
IR_VERSION = 9
PREFILL_SLOTS = 16  # of the caches that a prefill is given
BLOCK = 128  # elements of a sum that are added at once
_MASKED: Mapping[int, float] = {
    TensorProto.FLOAT16: -(2.0**15),
    TensorProto.BFLOAT16: -(2.0**100),
    TensorProto.FLOAT: -(2.0**100),
}  # what is added to a masked score: with any score it is finite, and exp of it is 0
_KNOWN_ATTRIBUTES: Mapping[str, Mapping[str, tuple[Any, ...] | None]] = {
    "Attention": {"is_causal": (0, 1), "q_num_heads": None, "kv_num_heads": None, "scale": None},
    "TensorScatter": {"mode": (b"linear",), "axis": (2,)},
    "RotaryEmbedding": {"num_heads": None, "rotary_embedding_dim": (0,), "interleaved": (0,)},
    "RMSNormalization": {"axis": (-1,), "epsilon": None, "stash_type": (1,)},
    "CumSum": {"exclusive": (0,), "reverse": (0,)},
}  # what is translated; None takes any value


def rewrite_plain(model: onnx.ModelProto, graph: Path, one_length: bool = False) -> None:
    """Rewrite a graph in place.

    Args:
        model: of the portable dialect; its weights may lie outside.
        graph: its file, for messages.
        one_length: its caches hold equally many tokens at all times, and have equally many slots: one mask does.

    Raises:
        BundleError: a node has attributes or inputs that are not translated.
    """
    _Rewriter(model, graph, one_length).rewrite()


class _Rewriter:
    """Goes through the nodes in order and emits them again, or others in their place."""

    def __init__(self, model: onnx.ModelProto, graph: Path, one_length: bool) -> None:
        self._model = model
        self._graph = graph
        self._one_length = one_length
        values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
        self._types = {value.name: value.type.tensor_type for value in values}
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self._scatters: dict[str, onnx.NodeProto] = {}  # name of a whole cache -> what would have made it
        self._shared: dict[tuple[str, ...], str] = {}  # what several nodes need: masks, sizes
        self._renamed: dict[str, str] = {}
        self._number = 0

    def rewrite(self) -> None:
        translations = {
            "Attention": self._attention,
            "TensorScatter": self._tensor_scatter,
            "RMSNormalization": self._rms_normalization,
            "RotaryEmbedding": self._rotary_embedding,
            "CumSum": self._cumulative_sum,
        }
        # 1. Emit every node again, or what stands for it; shared masks come before whoever needs them first.
        for node in self._model.graph.node:
            if node.domain not in ("", "ai.onnx"):
                raise self._unknown(node, f"is of the domain {node.domain}")
            if node.op_type in translations:
                self._require_known(node)
                translations[node.op_type](node)
            else:
                self._nodes.append(node)
        # 2. Give the new rows the names of outputs, and let them be outputs in place of whole caches.
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [self._renamed.get(name, name) for name in names]
        del self._model.graph.node[:]
        self._model.graph.node.extend(self._nodes)
        for value in self._model.graph.output:
            if value.name in self._scatters:
                self._turn_into_rows(value)
        # 3. Say that it is of an older opset: of what is left, no operator means anything else there.
        self._model.ir_version = IR_VERSION
        del self._model.opset_import[:]
        self._model.opset_import.append(helper.make_opsetid("", OPSET))

    def _turn_into_rows(self, value: onnx.ValueInfoProto) -> None:
        """The output of a cache as that of its rows: as many as the segment is given."""
        axis = value.type.tensor_type.shape.dim[2]
        scatter = self._scatters[value.name]
        value.name = self._renamed[scatter.input[1]]
        axis.dim_param = f"rows_{value.name.rsplit('_', 1)[1]}"

    def _tensor_scatter(self, node: onnx.NodeProto) -> None:
        """[B, Hkv, C, hd], rows [B, Hkv, S, hd] -> both, one behind the other."""
        past, rows, _ = node.input
        self._scatters[node.output[0]] = node
        self._renamed[rows] = rows_name(past)
        self._emit("Concat", [past, rows], axis=2, output=f"{past}/seen")

    def _attention(self, node: onnx.NodeProto) -> None:
        scatter = self._scatters.get(node.input[1])
        if scatter is None:
            self._full_attention(node)
        else:
            self._cache_attention(node, scatter)

    def _cache_attention(self, node: onnx.NodeProto, scatter: onnx.NodeProto) -> None:
        """Queries [B, H, S, hd] over a cache and the rows behind it, lower right causal."""
        query, _, value = node.input[:3]
        attributes = _attributes(node)
        minus = self._makers.get(scatter.input[2])
        agree = (
            bool(attributes.get("is_causal"))
            and not any(node.input[3:6])
            and minus is not None
            and minus.op_type == "Sub"
            and list(node.input[6:]) == [minus.input[0]]  # what is valid ends with the rows that are scattered
            and value in self._scatters
            and self._scatters[value].input[2] == scatter.input[2]
        )
        if not agree:
            raise self._unknown(node, "is not the causal attention over a cache of this version")
        past = self._types[scatter.input[0]]
        kv_heads, _, head = (axis.dim_value for axis in past.shape.dim[1:])
        heads = self._split_heads(query, node)
        groups = heads // kv_heads
        dtype = past.elem_type
        # 1. Heads that share keys as rows of one product: no key is copied. [B, H, S, hd] -> [B, Hkv, g S, hd]
        scaled = self._scaled(query, attributes.get("scale", 1 / math.sqrt(head)), dtype)
        folded = self._emit("Reshape", [scaled, self._ints(0, kv_heads, -1, head)]) if groups > 1 else scaled
        # 2. One mask for all layers whose caches are equally long.
        mask = self._mask(query, scatter, groups, dtype)
        # 3. The product of the probabilities, as heads again.
        keys = self._emit("Transpose", [f"{scatter.input[0]}/seen"], perm=[0, 1, 3, 2])
        values = f"{self._scatters[value].input[0]}/seen"
        out = self._softmax_product(folded, keys, values, mask, None if groups > 1 else node.output[0])
        if groups > 1:
            self._emit("Reshape", [out, self._ints(0, heads, -1, head)], output=node.output[0])

    def _full_attention(self, node: onnx.NodeProto) -> None:
        """Queries, keys and values [B, S, H hd], all of which see all, but for a mask that is added to the scores."""
        attributes = _attributes(node)
        heads = attributes.get("q_num_heads")
        if not heads or attributes.get("kv_num_heads") != heads or attributes.get("is_causal") or any(node.input[4:]):
            raise self._unknown(node, "is no attention of a tower of this version")
        query, key, value = node.input[:3]
        tensor = self._typed(query, node)
        width = tensor.shape.dim[2].dim_value
        if not width:
            raise self._unknown(node, "has queries of an unknown width")
        split = self._ints(0, 0, heads, -1)
        scaled = self._scaled(query, attributes.get("scale", 1 / math.sqrt(width // heads)), tensor.elem_type)
        queries, keys, values = (
            self._emit("Transpose", [self._emit("Reshape", [name, split])], perm=perm)
            for name, perm in ((scaled, [0, 2, 1, 3]), (key, [0, 2, 3, 1]), (value, [0, 2, 1, 3]))
        )
        bias = node.input[3] if len(node.input) > 3 else ""
        out = self._softmax_product(queries, keys, values, bias)
        merged = self._emit("Transpose", [out], perm=[0, 2, 1, 3])
        self._emit("Reshape", [merged, self._ints(0, 0, -1)], output=node.output[0])

    def _softmax_product(self, queries: str, keys: str, values: str, bias: str, output: str | None = None) -> str:
        scores = self._emit("MatMul", [queries, keys])
        if bias:
            scores = self._emit("Add", [scores, bias])
        shares = self._emit("Softmax", [scores], axis=-1)
        return self._emit("MatMul", [shares, values], output=output)

    def _scaled(self, query: str, scale: float, dtype: int) -> str:
        """The queries, not the scores: those may be too large for half precision."""
        return self._emit("Mul", [query, self._number_of(scale, dtype)])

    def _mask(self, query: str, scatter: onnx.NodeProto, groups: int, dtype: int) -> str:
        """What is added to the scores.  [B, 1, g S, C + S]"""
        past, _, start = scatter.input
        rows = self._rows_of(query)
        known = (rows, "" if self._one_length else start, str(groups), str(dtype))
        if known not in self._shared:
            number = self._number_of
            slots = self._axis(past, 2)
            repeated = [self._axis(start, 0), self._ints(groups), rows]  # B, g, S
            # 1. Of the cache, what each row of the batch has written. [C] < [B, 1] -> [B, C] -> [B, g, S, C]
            lengths = self._emit("Unsqueeze", [start, self._ints(1)])
            written = self._emit("Less", [self._range(slots), lengths])
            before = self._emit("Where", [written, number(0.0, dtype), number(_MASKED[dtype], dtype)])
            before = self._emit("Unsqueeze", [before, self._ints(1, 2)])
            held = self._emit("Expand", [before, self._emit("Concat", [*repeated, slots], axis=0)])
            # 2. Of the new tokens, what is not behind. [S, S] -> [B, g, S, S]
            new = self._emit("Expand", [self._causal(rows, dtype), self._emit("Concat", [*repeated, rows], axis=0)])
            # 3. One behind the other, heads that share keys as rows of one product.
            mask = self._emit("Concat", [held, new], axis=3)
            columns = self._emit("Add", [slots, rows])
            whole = self._emit("Concat", [self._ints(0, 1, -1), columns], axis=0)
            self._shared[known] = self._emit("Reshape", [mask, whole]) if groups > 1 else mask
        return self._shared[known]

    def _causal(self, rows: str, dtype: int) -> str:
        """[S, S]"""
        known = (rows, str(dtype))
        if known not in self._shared:
            places = self._range(rows)
            later = self._emit("LessOrEqual", [places, self._emit("Unsqueeze", [places, self._ints(1)])])
            number = self._number_of
            self._shared[known] = self._emit("Where", [later, number(0.0, dtype), number(_MASKED[dtype], dtype)])
        return self._shared[known]

    def _rows_of(self, query: str) -> str:
        """How many rows attention has, as a tensor [1]: those of the graph's input, where they are free."""
        axis = self._types["hidden"].shape.dim[1]
        return self._axis(query, 2) if axis.HasField("dim_value") else self._axis("hidden", 1)

    def _axis(self, value: str, axis: int) -> str:
        """[1]"""
        known = ("axis", value, str(axis))
        if known not in self._shared:
            self._shared[known] = self._emit("Shape", [value], start=axis, end=axis + 1)
        return self._shared[known]

    def _range(self, count: str) -> str:
        """0, 1, ... of a number [1]"""
        scalars = (self._scalar(0), self._emit("Squeeze", [count, self._ints(0)]), self._scalar(1))
        return self._emit("Range", scalars)

    def _split_heads(self, query: str, node: onnx.NodeProto) -> int:
        """H of Transpose(Reshape(x, [0, 0, H, -1]))."""
        transpose = self._makers.get(query)
        reshape = None if transpose is None else self._makers.get(transpose.input[0])
        constant = None if reshape is None or reshape.op_type != "Reshape" else self._makers.get(reshape.input[1])
        if constant is None or constant.op_type != "Constant":
            raise self._unknown(node, "has queries that were not split into heads")
        values = _constant_values(constant)
        return int(values[2])

    def _rms_normalization(self, node: onnx.NodeProto) -> None:
        """x / sqrt(mean(x x) + eps) in fp32, in the type of x again, times the weight."""
        x, weight = node.input
        wide = self._emit("Cast", [x], to=TensorProto.FLOAT)
        mean = self._emit("ReduceMean", [self._emit("Mul", [wide, wide]), self._ints(-1)], keepdims=1)
        epsilon = self._number_of(_attributes(node)["epsilon"], TensorProto.FLOAT)
        root = self._emit("Sqrt", [self._emit("Add", [mean, epsilon])])
        normal = self._emit("CastLike", [self._emit("Div", [wide, root]), x])
        self._emit("Mul", [normal, weight], output=node.output[0])

    def _rotary_embedding(self, node: onnx.NodeProto) -> None:
        """[B, S, H hd] as halves [B, S, H, 2, hd / 2], turned by the tables [B, S, hd / 2]."""
        attributes = _attributes(node)
        x, *tables = node.input[:3]
        if len(node.input) > 3 or not attributes.get("num_heads"):
            raise self._unknown(node, "has positions, or no number of heads")
        halves = self._emit("Reshape", [x, self._ints(0, 0, attributes["num_heads"], 2, -1)])
        first, second = (
            self._emit("Slice", [halves, self._ints(place), self._ints(place + 1), self._ints(3)]) for place in (0, 1)
        )
        cos, sin = (self._emit("Unsqueeze", [table, self._ints(2, 3)]) for table in tables)
        turned = [
            self._emit("Sub", [self._emit("Mul", [first, cos]), self._emit("Mul", [second, sin])]),
            self._emit("Add", [self._emit("Mul", [second, cos]), self._emit("Mul", [first, sin])]),
        ]
        self._emit("Reshape", [self._emit("Concat", turned, axis=3), self._ints(0, 0, -1)], output=node.output[0])

    def _cumulative_sum(self, node: onnx.NodeProto) -> None:
        """[n] of whole numbers: sums within blocks, and of the blocks before, which are sums of integers throughout."""
        tensor = self._typed(node.input[0], node)
        sizes = [axis.dim_value for axis in tensor.shape.dim]
        if len(sizes) != 1 or not sizes[0] or tensor.elem_type != TensorProto.INT64:
            raise self._unknown(node, "is no sum over a known number of integers")
        total = self._sums(node.input[0], sizes[0])
        self._emit("Identity", [total], output=node.output[0])

    def _sums(self, values: str, size: int) -> str:
        """The sum up to each of [n], in blocks of BLOCK, and again over the sums of the blocks."""
        blocks = -(-size // BLOCK)
        block = min(size, BLOCK)
        padding = blocks * block - size
        if padding:
            zeros = self._constant(np.zeros(padding, np.int64))
            values = self._emit("Concat", [values, zeros], axis=0)
        rows = self._emit("Reshape", [values, self._ints(blocks, 1, block)])
        upto = self._constant(np.tril(np.ones((block, block), np.int64)))
        within = self._emit("ReduceSum", [self._emit("Mul", [rows, upto]), self._ints(2)], keepdims=0)
        if blocks > 1:
            whole = self._emit("ReduceSum", [rows, self._ints(1, 2)], keepdims=0)  # [blocks]
            before = self._emit("Sub", [self._sums(whole, blocks), whole])
            within = self._emit("Add", [within, self._emit("Unsqueeze", [before, self._ints(1)])])
        flat = self._emit("Reshape", [within, self._ints(-1)])
        if not padding:
            return flat
        return self._emit("Slice", [flat, self._ints(0), self._ints(size), self._ints(0)])

    def _emit(self, op: str, inputs: Sequence[str], *, output: str | None = None, **attributes: Any) -> str:
        """Add a node of one output; returns its name."""
        self._number += 1
        name = output or f"plain_{self._number}"
        self._nodes.append(helper.make_node(op, list(inputs), [name], name=f"plain_{op}_{self._number}", **attributes))
        return name

    def _ints(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def _scalar(self, value: int) -> str:
        return self._constant(np.array(value, np.int64))

    def _number_of(self, value: float, dtype: int) -> str:
        return self._constant(np.array(value, np.float64), dtype)

    def _constant(self, values: np.ndarray[Any, Any], dtype: int = TensorProto.INT64) -> str:
        """Each once in a graph."""
        known = (dtype, values.shape, values.tobytes())
        if known not in self._constants:
            tensor = helper.make_tensor("", dtype, values.shape, values.flatten())
            self._constants[known] = self._emit("Constant", [], value=tensor)
        return self._constants[known]

    def _typed(self, name: str, node: onnx.NodeProto) -> Any:
        if name not in self._types:
            raise self._unknown(node, f"reads {name}, whose type the graph does not say")
        return self._types[name]

    def _require_known(self, node: onnx.NodeProto) -> None:
        known = _KNOWN_ATTRIBUTES[node.op_type]
        for name, value in _attributes(node).items():
            if name not in known or value not in (known[name] or (value,)):
                raise self._unknown(node, f"has {name} = {value!r}")

    def _unknown(self, node: onnx.NodeProto, why: str) -> BundleError:
        return BundleError(
            f"node {node.name or node.output[0]} ({node.op_type}) of {self._graph} {why}, which is not translated for "
            "this version of TensorRT: rebuild the bundle, or take a newer TensorRT"
        )


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _constant_values(node: onnx.NodeProto) -> np.ndarray[Any, Any]:
    value = helper.get_attribute_value(node.attribute[0])
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.array(value)
