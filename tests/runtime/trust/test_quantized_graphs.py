"""Products with packed codes: a kernel reads as many as the attributes say, so the weights must have as many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.errors import BundleError
from framefusion.runtime.trust.graph_check import check_graph

onnx = pytest.importorskip("onnx", reason="it is not installed: it makes the graphs that are refused")
helper = pytest.importorskip("onnx.helper")
numpy_helper = pytest.importorskip("onnx.numpy_helper")

SIZES = {"K": 96, "N": 5, "bits": 4, "block_size": 32, "accuracy_level": 4}


def write(folder: Path, arrays: Mapping[str, Any], sizes: Mapping[str, int], inputs: tuple[str, ...]) -> None:
    node = helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", **sizes)
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, size]) for name, size in (("x", 96), ("y", 5))
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph([node], "graph", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "graph.onnx")


def weights(**changes: Any) -> dict[str, Any]:
    usual = {"codes": np.zeros((5, 3, 16), np.uint8), "scales": np.zeros((5, 3), np.float32)}
    return usual | {"zeros": np.zeros((5, 2), np.uint8)} | changes


def test_products_of_the_right_size_pass(tmp_path: Path) -> None:
    for inputs in (("x", "codes", "scales"), ("x", "codes", "scales", "zeros")):
        write(tmp_path, weights(), SIZES, inputs)
        assert len(check_graph(tmp_path, "graph.onnx").products) == 1


@pytest.mark.parametrize(
    ("changes", "sizes", "inputs", "message"),
    [
        ({"codes": np.zeros((5, 2, 16), np.uint8)}, {}, "x codes scales", "needs (5, 3, 16)"),
        ({"codes": np.zeros((5, 3, 16), np.int8)}, {}, "x codes scales", "needs (5, 3, 16)"),
        ({"scales": np.zeros((5, 2), np.float32)}, {}, "x codes scales", "needs (5, 3)"),
        ({"zeros": np.zeros((5, 1), np.uint8)}, {}, "x codes scales zeros", "needs (5, 2)"),
        ({}, {"N": 4096}, "x codes scales", "a product of 96 with 4096"),
        ({}, {"K": 960}, "x codes scales", "a product of 960 with 5"),
        ({}, {"bits": 8}, "x codes scales", "in 8 bits"),
        ({}, {"bits": 5}, "x codes scales", "codes of 5 bits"),
        ({}, {"block_size": 48}, "x codes scales", "blocks of 48"),
        ({}, {"accuracy_level": 5}, "x codes scales", "accuracy_level"),
        ({}, {}, "x codes x", "which is no weight"),
        ({}, {}, "x codes", "has 2 inputs"),
        ({}, {}, "x codes scales zeros zeros", "has 5 inputs"),
    ],
)
def test_products_of_another_size_are_refused(
    tmp_path: Path, changes: dict[str, Any], sizes: dict[str, int], inputs: str, message: str
) -> None:
    write(tmp_path, weights(**changes), SIZES | sizes, tuple(inputs.split()))
    with pytest.raises(BundleError) as refused:
        check_graph(tmp_path, "graph.onnx")
    assert message in str(refused.value)


def test_an_attribute_that_stands_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path, weights(), SIZES, ("x", "codes", "scales"))
    model = onnx.load(tmp_path / "graph.onnx")
    model.graph.node[0].attribute.append(helper.make_attribute("N", 4096))
    onnx.save(model, tmp_path / "graph.onnx")
    with pytest.raises(BundleError, match="states an attribute twice"):
        check_graph(tmp_path, "graph.onnx")
