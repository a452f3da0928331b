"""What a graph says and TensorRT-RTX does not compile is said in another way: the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from framefusion.export.engines.tensorrt.network import drop_unread, gather_rotary_apart, scale_whole_rows

TOKENS, KEPT, HALF = 7, 4, 4


def rotation() -> onnx.ModelProto:
    """The prompt is picked by a constant, rows are taken twice, as of a merge and a prune, and another table once."""
    names = ("cos", "sin", "other")
    nodes = [helper.make_node("Gather", [name, "first"], [f"{name}/all"], axis=0) for name in names]
    nodes += [helper.make_node("Gather", [f"{name}/all", "merged"], [f"{name}/merged"], axis=0) for name in names]
    for name in ("cos", "sin"):
        nodes.append(helper.make_node("Gather", [f"{name}/merged", "pruned"], [f"{name}/pruned"], axis=0))
        nodes.append(helper.make_node("Unsqueeze", [f"{name}/pruned", "front"], [f"{name}/row"]))
    inputs = ["query", "cos/row", "sin/row"]
    nodes.append(helper.make_node("RotaryEmbedding", inputs, ["out"], num_heads=1))
    tables = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, TOKENS, HALF]) for name in names]
    indices = [helper.make_tensor_value_info(name, TensorProto.INT64, [KEPT]) for name in ("merged", "pruned")]
    query = helper.make_tensor_value_info("query", TensorProto.FLOAT, [1, KEPT, 2 * HALF])
    outputs = [
        helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, KEPT, 2 * HALF]),
        helper.make_tensor_value_info("other/merged", TensorProto.FLOAT, [KEPT, HALF]),
    ]
    constants = [helper.make_tensor("first", TensorProto.INT64, [], [0])]
    constants.append(helper.make_tensor("front", TensorProto.INT64, [1], [0]))
    graph = helper.make_graph(nodes, "rotation", [*tables, *indices, query], outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def test_rows_are_the_same_and_those_of_tables_are_taken_by_gather_nd() -> None:
    model = rotation()
    generator = np.random.default_rng(0)
    feeds = {name: generator.normal(size=(1, TOKENS, HALF)).astype(np.float32) for name in ("cos", "sin", "other")}
    feeds["query"] = generator.normal(size=(1, KEPT, 2 * HALF)).astype(np.float32)
    feeds |= {"merged": np.array([6, 0, 3, 2]), "pruned": np.array([3, 3, 0, 1])}
    before = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    gather_rotary_apart(model)
    onnx.checker.check_model(model)
    after = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    for left, right in zip(before, after, strict=True):
        np.testing.assert_array_equal(left, right)
    kinds = {node.output[0]: node.op_type for node in model.graph.node if node.op_type.startswith("Gather")}
    rows = {f"{name}/{part}" for name in ("cos", "sin") for part in ("merged", "pruned")}
    assert {name for name, kind in kinds.items() if kind == "GatherND"} == rows
    assert {name for name, kind in kinds.items() if kind == "Gather"} == {
        "cos/all",
        "sin/all",
        "other/all",
        "other/merged",
    }


def test_a_graph_without_such_rows_stays_as_it_is() -> None:
    model = rotation()
    del model.graph.node[-1]  # nothing is rotated
    before = model.SerializeToString(deterministic=True)
    gather_rotary_apart(model)
    assert model.SerializeToString(deterministic=True) == before


def scaled(blocks: int) -> onnx.ModelProto:
    """INT8 [6, 4] with a scale for each of so many blocks of a row."""
    generator = np.random.default_rng(1)
    codes = generator.integers(-127, 128, (6, 4)).astype(np.int8)
    scales = generator.random((6, blocks), np.float32)
    node = helper.make_node("DequantizeLinear", ["codes", "scales"], ["out"], axis=1, block_size=4 // blocks)
    constants = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [6, 4])]
    graph = helper.make_graph([node], "scaled", [], outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.mark.parametrize(("blocks", "shape"), [(1, [6]), (2, [6, 2])])
def test_one_scale_a_row_is_said_as_that(blocks: int, shape: list[int]) -> None:
    model = scaled(blocks)
    before = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})[0]
    scale_whole_rows(model)
    onnx.checker.check_model(model)
    assert list(model.graph.initializer[1].dims) == shape
    np.testing.assert_array_equal(onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})[0], before)


def test_inputs_that_nothing_reads_are_dropped_and_those_of_branches_are_not() -> None:
    names = ("chosen", "inside", "unread")
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in names[1:]]
    inputs.insert(0, helper.make_tensor_value_info("chosen", TensorProto.BOOL, []))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("then", "else", "out")]
    branches = [
        helper.make_graph([helper.make_node(kind, ["inside"], [output.name])], output.name, [], [output])
        for kind, output in zip(("Neg", "Abs"), outputs, strict=False)
    ]
    node = helper.make_node("If", ["chosen"], ["out"], then_branch=branches[0], else_branch=branches[1])
    graph = helper.make_graph([node], "branches", inputs, outputs[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    drop_unread(model)
    onnx.checker.check_model(model)
    assert [value.name for value in model.graph.input] == ["chosen", "inside"]
