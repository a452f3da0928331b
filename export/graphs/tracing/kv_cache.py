"""Attention over a KV cache in int8 as ONNX Runtime's CPU runs it: one node for a token, several for a prompt.

    one token    GroupQueryAttention over the int8 caches, which its kernel reads as they are
    a prompt     what is held and what is new as the floats that codes stand for, GroupQueryAttention over those, and
                 the new codes into their slots

Both give the same to 1e-6. For a prompt of 2080 tokens the kernel over int8 takes six to fourteen times as long as the
one over floats, and reading caches of floats in every step would cost what int8 is there to save; so an `If` takes one
of the two, within one graph, whose weights are in memory once. Branches read the graph's values, and write caches in
place where input and output are bound to the same memory.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from framefusion.ops.kv_cache import LEAST_CODE, MOST_CODE

OPSET = 24
"""The first with TensorScatter."""
QUANT_TYPE = "PER_CHANNEL"
BITS = 8
_CONTRIB = "com.microsoft"
_SCALES = 12  # place of key's and value's scales among the inputs of GroupQueryAttention, behind five that are not used


class Branch:
    """The nodes of a subgraph, in order; its values are named behind a prefix, so that none hides another."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._nodes: list[ir.Node] = []

    def add(self, operator: str, *inputs: Any, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """The value of a new node; a tuple of them where it has several."""
        node = ir.node(operator, inputs, attributes, domain=domain, num_outputs=outputs)
        self._nodes.append(node)
        for index, value in enumerate(node.outputs):
            value.name = f"{self._prefix}_{len(self._nodes)}_{index}"
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def ints(self, *values: int) -> Any:
        """A constant vector of int64."""
        return self.add("Constant", value_ints=list(values))

    def number(self, value: float) -> Any:
        """A constant scalar of fp32."""
        return self.add("Constant", value_float=value)

    def graph(self, *outputs: ir.Value) -> ir.Graph:
        """All of it as a subgraph with these outputs."""
        return ir.Graph([], outputs, nodes=self._nodes, name=self._prefix)


def one_token(prefix: str, rows: tuple[Any, Any, Any], past: tuple[Any, Any], scales: tuple[Any, Any],
              lengths: tuple[Any, Any], heads: int, groups: int) -> ir.Graph:  # fmt: skip
    """The kernel over int8.

    Args:
        prefix: of all names.
        rows: query [B, 1, H*hd], key and value [B, 1, Hkv*hd].
        past: int8 [B, Hkv, C, hd].
        scales: of keys and of values, fp32 [1, Hkv, 1, hd].
        lengths: each row's tokens less one, and the most of all, int32 [B] and [1].
        heads: H.
        groups: Hkv.
    """
    branch = Branch(prefix)
    inputs = [*rows, *past, *lengths]
    inputs += [None] * (_SCALES - len(inputs)) + list(scales)
    out, keys, values = branch.add(
        "GroupQueryAttention", *inputs, outputs=3, domain=_CONTRIB, num_heads=heads, kv_num_heads=groups,
        k_quant_type=QUANT_TYPE, v_quant_type=QUANT_TYPE, kv_cache_bit_width=BITS,
    )  # fmt: skip
    return branch.graph(out, keys, values)


def many_tokens(prefix: str, rows: tuple[Any, Any, Any], past: tuple[Any, Any], scales: tuple[Any, Any],
                lengths: tuple[Any, Any], heads: int, groups: int) -> ir.Graph:  # fmt: skip
    """The kernel over floats; arguments as above, with S rows. It computes in fp32 whatever the graph's type is."""
    branch = Branch(prefix)
    query, key, value = rows
    (before, total) = lengths
    fp32 = int(ir.DataType.FLOAT)
    int64 = int(ir.DataType.INT64)
    # 1. Where the new rows begin, and how many slots count at all.
    begin = branch.add("Sub", branch.add("Add", branch.add("Cast", before, to=int64), branch.ints(1)),
                       branch.add("Shape", query, start=1, end=2))  # fmt: skip
    used = branch.add("Cast", total, to=int64)
    floats = []
    presents = []
    for new, held, scale in ((key, past[0], scales[0]), (value, past[1], scales[1])):
        # 2. Codes of the new rows.  [B, S, Hkv*hd] -> int8 [B, Hkv, S, hd]
        apart = branch.add("Reshape", branch.add("Cast", new, to=fp32), branch.ints(0, 0, groups, -1))
        steps = branch.add("Div", branch.add("Transpose", apart, perm=[0, 2, 1, 3]), scale)
        bounds = (branch.number(float(LEAST_CODE)), branch.number(float(MOST_CODE)))
        codes = branch.add("Cast", branch.add("Clip", branch.add("Round", steps), *bounds), to=int(ir.DataType.INT8))
        # 3. The same rows as attention reads them, and what is held before them.
        again = branch.add("Transpose", _floats(branch, codes, scale), perm=[0, 2, 1, 3])
        floats.append(branch.add("Reshape", again, branch.ints(0, 0, -1)))
        slots = branch.add("Slice", held, branch.ints(0), used, branch.ints(2))
        floats.append(_floats(branch, slots, scale))
        # 4. The codes into their slots.
        presents.append(branch.add("TensorScatter", held, codes, begin, axis=2))
    keys, past_keys, values, past_values = floats
    inputs = [branch.add("Cast", query, to=fp32), keys, values, past_keys, past_values, before, total]
    out, _, _ = branch.add(
        "GroupQueryAttention", *inputs, outputs=3, domain=_CONTRIB, num_heads=heads, kv_num_heads=groups
    )
    return branch.graph(branch.add("CastLike", out, query), *presents)


def _floats(branch: Branch, codes: Any, scale: Any) -> Any:
    """What codes stand for, in fp32."""
    return branch.add("Mul", branch.add("Cast", codes, to=int(ir.DataType.FLOAT)), scale)
