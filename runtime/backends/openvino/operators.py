"""Operators of the `gqa` dialect as OpenVINO is to read them: attention that writes into its caches where they lie.

OpenVINO's own reading of GroupQueryAttention has the caches as outputs, copies all of them in each step, and takes no
bf16. Its PagedAttentionExtension writes new slots into its inputs instead. That reads caches in blocks of 32 slots, and
is given the blocks of each sequence; so a cache [B, Hkv, C, hd] is B * Hkv sequences of one head, not a byte moved:

    query   [B, S, H * hd]     -> [B * Hkv * S, G * hd]       the G = H / Hkv heads that read one head of keys
    keys    [B, S, Hkv * hd]   -> [B * Hkv * S, hd]
    cache   [B, Hkv, C, hd]    =  [B * Hkv * C/32, 1, 32, hd]    sequence n lies in blocks n * C/32 to (n + 1) * C/32

The operator is OpenVINO's internal one, and its releases give it other inputs: where that fails, reading a graph does,
and the caller reads it without. Knows no buffer and no bundle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCK = 32
"""Slots of a block: the only number that OpenVINO's kernel for CPUs takes."""
_CONTRIB = "com.microsoft"
_PAGED = "PagedAttentionExtension"


def read_model(path: str, *, in_place: bool, beside: int = 0) -> Any:
    """A graph as OpenVINO's model.

    Args:
        path: of the ONNX file.
        in_place: parameters of caches keep their names and get the shape [blocks, 1, 32, hd], results of caches are
            gone. Without it both are as the graph has them.
        beside: bytes of each slot beside its numbers, where caches are codes; 0 where they are floats.

    Raises:
        RuntimeError: it cannot be read so.
    """
    import openvino
    from openvino.frontend.onnx import ConversionExtension

    core = openvino.Core()
    core.add_extension(ConversionExtension("QuickGelu", _CONTRIB, _quick_gelu))
    if in_place:
        core.add_extension(ConversionExtension("GroupQueryAttention", _CONTRIB, _attention))
    model = core.read_model(path)
    if in_place:
        _use_blocks(model, beside)
    return model


def writes_in_place(model: Any) -> bool:
    """Whether a graph has attention over caches that it writes into."""
    return any(node.get_type_name() == _PAGED for node in model.get_ops())


def attention_scale(width: int) -> float:
    """What scores of heads of a width are multiplied with; the dialect's operator says no other."""
    return float(width**-0.5)


def _quick_gelu(node: Any) -> list[Any]:
    """x * sigmoid(alpha x); OpenVINO's own reading refuses half types."""
    from openvino import opset15 as ops

    x = node.get_input(0)
    alpha = ops.convert_like(ops.constant(np.float32(node.get_attribute("alpha"))), x)
    outputs: list[Any] = ops.swish(x, alpha).outputs()
    return outputs


def _attention(node: Any) -> list[Any]:
    """GroupQueryAttention as the dialect writes it: no attribute but the numbers of heads (graph_check.py)."""
    from openvino import opset15 as ops
    from openvino.op import _PagedAttentionExtension

    query, key, value, past_key, past_value, last_slots = map(node.get_input, range(6))
    groups = node.get_attribute("kv_num_heads")
    shared = node.get_attribute("num_heads") // groups
    width = key.get_partial_shape()[2].get_length() // groups
    # 1. Rows of query, key and value, sequence after sequence.
    rows = _rows(query, groups, shared * width)
    keys = _rows(key, groups, width)
    values = _rows(value, groups, width)
    # 2. Of each sequence: the tokens it has, its rows, its blocks.
    sizes = ops.shape_of(key, "i32")
    length = ops.gather(sizes, _vector(1), _number(0))
    totals = ops.add(ops.reshape(last_slots, _vector(-1, 1), False), _number(1))
    past = ops.reshape(ops.tile(ops.subtract(totals, length), _vector(1, groups)), _vector(-1), False)
    sequences = ops.multiply(ops.gather(sizes, _number(0), _number(0)), _number(groups))
    counted = ops.range(_number(0), ops.add(sequences, _number(1)), _number(1), "i32")
    blocks = ops.gather(ops.shape_of(past_key, "i32"), _number(0), _number(0))  # a size of the shape it gets later
    indices = ops.range(_number(0), blocks, _number(1), "i32")
    begins = ops.multiply(counted, ops.divide(blocks, sequences))
    # 3. The operator, and what it may know of its caches while it is compiled.
    scale = ops.constant(np.float32(attention_scale(width)))
    longest = ops.reduce_max(totals, _vector(0, 1), False)
    given = [rows, keys, values, past_key, past_value, past, ops.multiply(counted, length), indices, begins, scale]
    paged = _PagedAttentionExtension([_output(each) for each in (*given, *_last_inputs(longest))])
    for part in ("k", "v"):
        paged.rt_info[f"num_{part}_heads"] = 1
        paged.rt_info[f"{part}_head_size"] = width
    # 4. A row a token again. Caches are no outputs any more: two that nobody reads stand in for them.
    apart = ops.reshape(paged.output(0), ops.concat([_vector(-1, groups), length, _vector(shared * width)], 0), False)
    attended = ops.reshape(ops.transpose(apart, _vector(0, 2, 1, 3)), _vector(0, 0, groups * shared * width), True)
    return [attended.output(0), paged.output(1), paged.output(2)]


def _rows(tokens: Any, groups: int, width: int) -> Any:
    """[B, S, Hkv * w] -> [B * Hkv * S, w]"""
    from openvino import opset15 as ops

    apart = ops.reshape(tokens, _vector(0, 0, groups, width), True)
    return ops.reshape(ops.transpose(apart, _vector(0, 2, 1, 3)), _vector(-1, width), False)


def _last_inputs(longest: Any) -> list[Any]:
    """Inputs 10 to 27: all but the longest sequence is of what graphs of ours have no use for."""
    zero = _number(0)
    none = _empty(np.int32)
    no_floats = _empty(np.float32)
    window_and_slopes = [zero, no_floats]
    score_window = none
    rotation = [none, none, no_floats]
    sparsity = [no_floats, zero, zero]
    sinks = _empty(np.float32, rank=4)
    eviction = [zero, none, none, none]
    token_types = none
    biases = [_empty(np.uint8), none]
    first = [*window_and_slopes, longest, score_window, *rotation, *sparsity]
    return [*first, sinks, *eviction, token_types, *biases]


def _use_blocks(model: Any, beside: int) -> None:
    """Parameters of caches as blocks of one head, and no results of caches."""
    import openvino

    for node in model.get_ordered_ops():
        if node.get_type_name() != _PAGED:
            continue
        for output in node.outputs()[1:]:
            for target in output.get_target_inputs():
                model.remove_result(target.get_node())
        for index in (3, 4):
            parameter = node.input(index).get_source_output().get_node()
            width = parameter.get_partial_shape()[3].get_length() + beside
            parameter.set_partial_shape(openvino.PartialShape([-1, 1, BLOCK, width]))
            parameter.set_element_type(openvino.Type.dynamic)  # else a cache of another type is converted: a copy
    model.validate_nodes_and_infer_types()


def _output(value: Any) -> Any:
    return value.output(0) if hasattr(value, "output") else value


def _constant(array: Any) -> Any:
    from openvino import opset15 as ops

    return ops.constant(array)


def _empty(kind: type, rank: int = 1) -> Any:
    return _constant(np.zeros((0,) * rank, kind))


def _vector(*values: int) -> Any:
    return _constant(np.array(values, np.int32))


def _number(value: int) -> Any:
    return _constant(np.int32(value))
