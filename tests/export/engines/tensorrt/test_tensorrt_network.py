"""The network of a graph is what the graph says: each trap of the parser is set up and seen. Parses, builds nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from framefusion.errors import BackendError, BundleError
from framefusion.export.engines.tensorrt import network as tensorrt_network
from framefusion.export.engines.tensorrt.network import parse_graph
from framefusion.export.engines.tensorrt.network_check import (
    attentions_of,
    check_network,
    inputs_of,
    layer_kinds,
    layers_of,
    outputs_of,
)
from framefusion.runtime.backends.tensorrt.library import Library, load_library
from tests.export.engines.tensorrt.tensorrt_graphs import renamed, shapes_of, tiny_segment

trt = pytest.importorskip("tensorrt_rtx")
CAPACITIES = (48, 48)


@pytest.fixture(scope="module")
def library() -> Library:
    return load_library("tensorrt-rtx")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_segment(tmp_path_factory)


@pytest.fixture(params=[True, False], ids=["one row", "rows"])
def network(request: pytest.FixtureRequest, library: Library, graph: Path) -> Iterator[Any]:
    builder = library.builder()
    parsed = parse_graph(library, builder, graph, CAPACITIES, one_row=request.param)
    yield parsed.network
    del parsed  # before the builder


def tower(path: Path, *, head: int = 16, masked: bool = False, opset: int = 23) -> Path:
    """A full attention of two heads, as a vision tower has them."""
    names, width = ["q", "k", "v"], 2 * head
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [3, 8, width]) for name in names]
    if masked:
        names.append("mask")
        values.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT16, [3, 1, 8, 8]))
    node = helper.make_node("Attention", names, ["y"], name="look", q_num_heads=2, kv_num_heads=2)
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [3, 8, width])]
    made = helper.make_graph([node], "tower", values, outputs)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)]), str(path))
    return path


def test_every_attention_gets_its_length_and_its_mask(network: Any) -> None:
    found = list(attentions_of(trt, network))
    assert [cache for _, _, cache in found] == [0, 1]
    for attention, _, _ in found:
        assert attention.causal_kind == trt.CausalMaskKind.LOWER_RIGHT
        assert attention.key_value_lengths is not None
        assert attention.key_value_lengths.dtype == trt.int32
        rows = next(tensor.shape[0] for tensor in inputs_of(network) if tensor.name == "hidden")
        assert tuple(attention.key_value_lengths.shape) == (rows,)
        assert not attention.decomposable
    kinds = layer_kinds(network)
    assert kinds["KV_CACHE_UPDATE"] == 2 * kinds["ATTENTION_INPUT"] == 4


def test_caches_are_static_and_everything_else_is_as_in_the_graph(library: Library, graph: Path) -> None:
    builder, capacities = library.builder(), (32, 48)
    parsed = parse_graph(library, builder, graph, capacities)
    given, taken = shapes_of(inputs_of(parsed.network)), shapes_of(outputs_of(parsed.network))
    for j, capacity in enumerate(capacities):
        for part in ("key", "value"):
            assert given[f"past_{part}_{j}"] == taken[f"present_{part}_{j}"] == (1, 1, capacity, 16)
    model = onnx.load(str(graph), load_external_data=False)
    assert list(given) == [value.name for value in model.graph.input]
    assert list(taken) == [value.name for value in model.graph.output]
    assert given["hidden"] == (1, -1, 32)


def test_the_parser_alone_is_wrong_and_seen(library: Library, graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without step 3, as whoever parses and builds gets it: no lengths, a mask aligned to the upper left."""
    monkeypatch.setattr(tensorrt_network, "mask_attentions", lambda *_: None)
    with pytest.raises(BackendError, match=r"causal mask UPPER_LEFT, not LOWER_RIGHT; attention .* no valid length"):
        parse_graph(library, library.builder(), graph, CAPACITIES)


def test_the_cache_decides_the_length_not_the_order(library: Library, graph: Path) -> None:
    """The caches of the two layers swapped: the first attention reads cache 1."""
    swap = {f"{when}_{part}_{j}": f"{when}_{part}_{1 - j}"
            for when in ("past", "present") for part in ("key", "value") for j in (0, 1)}  # fmt: skip
    builder = library.builder()
    parsed = parse_graph(library, builder, renamed(graph, graph.with_name("swapped.onnx"), swap), CAPACITIES)
    assert [cache for _, _, cache in attentions_of(trt, parsed.network)] == [1, 0]
    check_network(library, parsed.network, graph, 2)
    first, second = (fed.attention for fed in attentions_of(trt, parsed.network))
    first.key_value_lengths, second.key_value_lengths = second.key_value_lengths, first.key_value_lengths
    with pytest.raises(BackendError, match="reads cache 1 and the valid length of another"):
        check_network(library, parsed.network, graph, 2)


def upper_left(network: Any) -> None:
    first_attention(network).causal_kind = trt.CausalMaskKind.UPPER_LEFT


def no_length(network: Any) -> None:
    first_attention(network).key_value_lengths = None


def constant_length(network: Any) -> None:
    import numpy as np

    first_attention(network).key_value_lengths = network.add_constant((1,), np.array([7], np.int32)).get_output(0)


def foreign_values(network: Any) -> None:
    first, second = (fed.attention for fed in attentions_of(trt, network))
    second.set_input(2, first.get_input(2))


def circle(network: Any) -> None:
    """The first attention waits for the second one's cache: no shape can be worked out."""
    first, second = (fed.attention for fed in attentions_of(trt, network))
    first.set_input(2, second.get_input(2))


def unused_input(network: Any) -> None:
    network.add_input("extra", trt.float16, (1,))


def kept_inside(network: Any) -> None:
    network.unmark_output(next(tensor for tensor in outputs_of(network) if tensor.name == "present_key_0"))


def copied(network: Any) -> None:
    """An update that reads a copy of the cache: its output shares no memory with the input."""
    update = next(layer for layer in layers_of(network) if layer.type == trt.LayerType.KV_CACHE_UPDATE)
    update.set_input(0, network.add_identity(update.get_input(0)).get_output(0))


def first_attention(network: Any) -> Any:
    return next(attentions_of(trt, network)).attention


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (upper_left, "has causal mask UPPER_LEFT"),
        (no_length, "has no valid length"),
        (constant_length, "reads cache 0 and the valid length of another"),
        (foreign_values, "takes keys of cache 1 and values of another"),
        (circle, "its shapes do not follow from one another"),
        (unused_input, "input extra is unused"),
        (kept_inside, "writes past_key_0 to present_key_0, not in place"),
        (copied, "to present_key_0, not in place"),
    ],
)
def test_a_network_that_is_harmed_is_refused(library: Library, network: Any, graph: Path, harm: Any, told: str) -> None:
    check_network(library, network, graph, 2)
    harm(network)
    with pytest.raises(BackendError, match=told):
        check_network(library, network, graph, 2)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_without_a_cache_is_left_alone(library: Library, tmp_path: Path, masked: bool) -> None:
    path, builder = tower(tmp_path / "tower.onnx", masked=masked), library.builder()
    parsed = parse_graph(library, builder, path, ())
    ((attention, _, cache),) = attentions_of(trt, parsed.network)
    assert (cache, attention.causal_kind, attention.key_value_lengths) == (None, trt.CausalMaskKind.NONE, None)
    assert (attention.mask is not None) == masked
    if not masked:
        attention.causal_kind = trt.CausalMaskKind.LOWER_RIGHT
        with pytest.raises(BackendError, match=r"look.* reads no cache and has a causal mask"):
            check_network(library, parsed.network, path, 0)


def test_heads_without_a_fused_kernel_are_taken_apart(library: Library, tmp_path: Path) -> None:
    builder = library.builder()
    parsed = parse_graph(library, builder, tower(tmp_path / "tower.onnx", head=8), ())
    assert next(attentions_of(trt, parsed.network)).attention.decomposable


def test_bad_graphs(library: Library, graph: Path, tmp_path: Path) -> None:
    builder, broken = library.builder(), tmp_path / "broken.onnx"
    with pytest.raises(BundleError, match=r"has 2 caches, 1 capacities are given: rebuild"):
        parse_graph(library, builder, graph, (32,))
    with pytest.raises(BundleError, match=r"nowhere.onnx is no readable ONNX graph .*No such file"):
        parse_graph(library, builder, tmp_path / "nowhere.onnx", ())
    broken.write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(BundleError, match="no readable ONNX graph"):
        parse_graph(library, builder, broken, CAPACITIES)
    lone = tmp_path / "graph.onnx"  # without the weights beside it
    lone.write_bytes(graph.read_bytes())
    with pytest.raises(BundleError, match=r"weights.bin has 0 bytes, graph.onnx reads \d+"):
        parse_graph(library, builder, lone, CAPACITIES)


def test_an_operator_that_the_library_does_not_have_is_named(library: Library, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [4])
    node = helper.make_node("GroupQueryAttention", ["x"], ["y"], name="gqa_3", domain="com.microsoft")
    made = helper.make_graph([node], "g", [value], [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [4])])
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets), str(tmp_path / "g.onnx"))
    with pytest.raises(BackendError, match=r"node gqa_3 \(GroupQueryAttention\): "):
        parse_graph(library, library.builder(), tmp_path / "g.onnx", ())
