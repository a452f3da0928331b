"""Caches in int8: a kernel reads them by a node's attributes, so these must agree; and branches hold nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import BundleError
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest import KvCacheRecord
from framefusion.runtime.trust.graph_check import check_graph

onnx = pytest.importorskip("onnx", reason="it is not installed: it makes the graphs that are refused")
helper = pytest.importorskip("onnx.helper")

CODED: dict[str, Any] = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
HEADS: dict[str, Any] = {"num_heads": 4, "kv_num_heads": 2}
FLOAT, INT8, UINT8 = 1, 3, 2
INPUTS = ["q", "k", "v", "past_key_0", "past_value_0", "before", "total"]


def attention(past: str = "past_key_0", **attributes: Any) -> Any:
    inputs = [past if name == "past_key_0" else name for name in INPUTS]
    return helper.make_node("GroupQueryAttention", inputs, ["o", "pk", "pv"], domain="com.microsoft", **attributes)


def write(folder: Path, nodes: list[Any], cached: int = INT8) -> None:
    kinds = dict.fromkeys(INPUTS, FLOAT) | dict.fromkeys(("past_key_0", "past_value_0"), cached)
    inputs = [helper.make_tensor_value_info(name, kind, [1]) for name, kind in kinds.items()]
    outputs = [helper.make_tensor_value_info("o", FLOAT, [1])]
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "graph.onnx")


def branch(*nodes: Any, outputs: int = 1, inputs: int = 0, weights: int = 0) -> Any:
    values = [helper.make_tensor_value_info(f"b{index}", FLOAT, [1]) for index in range(outputs + inputs)]
    tensors = [helper.make_tensor("w", FLOAT, [1], [1.0])] * weights
    return helper.make_graph(list(nodes), "branch", values[outputs:], values[:outputs], tensors)


def choice(**branches: Any) -> Any:
    return helper.make_node("If", ["c"], ["o"], **branches)


def test_caches_that_attributes_agree_with_pass(tmp_path: Path) -> None:
    for cached, attributes in ((INT8, CODED), (FLOAT, {})):
        write(tmp_path, [attention(**HEADS, **attributes)], cached)
        assert len(check_graph(tmp_path, "graph.onnx").attentions) == 1
    read = [helper.make_node("Mul", ["x", "s"], ["held"]), attention("held", **HEADS)]
    write(tmp_path, [choice(then_branch=branch(attention(**HEADS, **CODED)), else_branch=branch(read[0]))])
    assert check_graph(tmp_path, "graph.onnx").nodes == 3


@pytest.mark.parametrize(
    ("cached", "attributes", "past", "message"),
    [
        (INT8, {}, "past_key_0", "of type 3, as another one"),
        (FLOAT, CODED, "past_key_0", "of type 1, as another one"),
        (UINT8, CODED, "past_key_0", "of type 2, as another one"),
        (INT8, CODED | {"k_quant_type": "NONE"}, "past_key_0", "has caches that are"),
        (INT8, CODED | {"v_quant_type": "PER_TENSOR"}, "past_key_0", "has caches that are"),
        (INT8, {"k_quant_type": "PER_CHANNEL"}, "past_key_0", "has caches that are"),
        (INT8, CODED | {"kv_cache_bit_width": 4}, "past_key_0", "kv_cache_bit_width"),
        (FLOAT, {}, "cast", "takes 'cast', which is no cache"),
        (INT8, CODED, "product", "takes 'product', which is no cache"),
        (FLOAT, {}, "nowhere", "takes 'nowhere', which is no cache"),
    ],
)  # fmt: skip
def test_caches_that_a_kernel_would_read_as_others_are_refused(
    tmp_path: Path, cached: int, attributes: dict[str, Any], past: str, message: str
) -> None:
    """ONNX Runtime 1.32 reads int8 caches as floats where no attribute says what they are, far beyond their end."""
    nodes = [
        helper.make_node("Cast", ["past_value_0"], ["cast"], to=INT8),
        helper.make_node("Mul", ["q", "k"], ["product"]),
        attention(past, **HEADS, **attributes),
    ]
    write(tmp_path, nodes, cached)
    with pytest.raises(BundleError) as refused:
        check_graph(tmp_path, "graph.onnx")
    assert message in str(refused.value)


def test_a_name_of_two_branches_is_what_either_says(tmp_path: Path) -> None:
    """Branches may use a name twice: one that is a product in one of them is no cache for the other."""
    product = helper.make_node("Mul", ["q", "k"], ["held"])
    cast = helper.make_node("Cast", ["q"], ["held"], to=INT8)
    attend = attention("held", **HEADS)
    write(tmp_path, [choice(then_branch=branch(cast, attend), else_branch=branch(product, attend))], FLOAT)
    with pytest.raises(BundleError, match="takes 'held', which is no cache"):
        check_graph(tmp_path, "graph.onnx")


NODE = helper.make_node("Neg", ["q"], ["b0"])
INNER = choice(then_branch=branch(NODE), else_branch=branch(NODE))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (choice(then_branch=branch(NODE)), "If has the branches"),
        (choice(then_branch=branch(NODE), else_branch=branch(NODE), other=branch(NODE)), "If has the branches"),
        (choice(then_branch=branch(NODE), else_branch=branch(NODE, outputs=2)), "If has the branches"),
        (choice(then_branch=branch(INNER), else_branch=branch(NODE)), "one lies within another"),
        (choice(then_branch=branch(NODE, inputs=1), else_branch=branch(NODE)), "holds field 11"),
        (choice(then_branch=branch(NODE, weights=1), else_branch=branch(NODE)), "holds field 5"),
        (helper.make_node("Neg", ["q"], ["o"], body=branch(NODE)), "holds a subgraph"),
        (helper.make_node("If", ["c"], ["o"], domain="com.microsoft", then_branch=branch(NODE)), "holds a subgraph"),
        (
            choice(then_branch=branch(helper.make_node("Loop", [], ["b0"])), else_branch=branch(NODE)),
            "operator 'Loop' is none",
        ),
    ],
)  # fmt: skip
def test_what_no_branch_of_a_build_holds_is_refused(tmp_path: Path, node: Any, message: str) -> None:
    write(tmp_path, [node])
    with pytest.raises(BundleError) as refused:
        check_graph(tmp_path, "graph.onnx")
    assert message in str(refused.value)


def test_a_manifest_and_its_graphs_agree_on_the_caches(bundle: Path) -> None:
    opened = Bundle(bundle, verify=False)
    coded = replace(opened.manifest, kv_cache=KvCacheRecord("int8", 1, 0.0))
    with pytest.raises(BundleError, match="past_key_0"):
        check_graph(bundle, coded.segments[0].graph, coded)
