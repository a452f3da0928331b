"""Plain networks: what the portable dialect's operators become for TensorRT 10.3, beside ONNX Runtime's own.

Each operator alone here, and whole graphs in the slow tests; every family's in test_tensorrt_families.py.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from framefusion.errors import BackendError, BundleError
from framefusion.export.engines.builder import EngineSpec
from framefusion.export.engines.tensorrt import network as tensorrt_network
from framefusion.export.engines.tensorrt.build import TensorRTBuilder, build_engine
from framefusion.export.engines.tensorrt.network import parse_plain
from framefusion.export.engines.tensorrt.network_check import layer_kinds, outputs_of
from framefusion.export.engines.tensorrt.plain import BLOCK, PREFILL_SLOTS, rewrite_plain
from framefusion.export.engines.tensorrt.profiles import graph_axes
from framefusion.export.options import EngineOptions
from framefusion.runtime.backends.tensorrt.library import load_library, plain_options
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.engine_record import ProfileRecord
from tests.bundles import shared
from tests.export.engines.tensorrt.tensorrt_graphs import REST, TINY, tiny_segment, write_segment
from tests.versions import needs_portable

Array = NDArray[Any]
EXACT = 2e-6  # of the largest value: fp32 sums in another order
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
PARSED = {
    "Add", "And", "Cast", "CastLike", "Clip", "Concat", "Constant", "Div", "Equal", "Erf", "Expand", "Gather",
    "Gelu", "Greater", "GreaterOrEqual", "Identity", "IsNaN", "LayerNormalization", "Less", "LessOrEqual",
    "MatMul", "Max", "Mul", "Neg", "Not", "Or", "Pad", "Pow", "Range", "ReduceL2", "ReduceMean", "ReduceSum",
    "Reshape", "ScatterElements", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub",
    "Tanh", "Tile", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
"""Operators that the parser of TensorRT 10.1 has an importer for (onnx-tensorrt, 10.1-GA, onnxOpImporters.cpp)."""


def model_of(nodes: list[onnx.NodeProto], inputs: dict[str, Any], outputs: dict[str, Any]) -> onnx.ModelProto:
    (given, taken) = (
        [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in group.items()]
        for group in (inputs, outputs)
    )
    graph = helper.make_graph(nodes, "g", given, taken)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def run(model: onnx.ModelProto | Path, feeds: dict[str, Array]) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    content = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def rewritten(model: onnx.ModelProto, one_length: bool = False) -> onnx.ModelProto:
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    rewrite_plain(plain, Path("graph.onnx"), one_length)
    assert {node.op_type for node in plain.graph.node} <= PARSED
    onnx.checker.check_model(plain)
    assert [opset.version for opset in plain.opset_import] == [20]
    return plain


def assert_same(model: onnx.ModelProto, feeds: dict[str, Array], limit: float = EXACT) -> None:
    found, expected = run(rewritten(model), feeds), run(model, feeds)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=limit * max(np.abs(values).max(), 1))


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_norm() -> None:
    node = helper.make_node("RMSNormalization", ["x", "w"], ["y"], axis=-1, epsilon=1e-3)
    model = model_of([node], {"x": (FLOAT, [1, "n", 12]), "w": (FLOAT, [12])}, {"y": (FLOAT, [1, "n", 12])})
    assert_same(model, {"x": drawn(1, 5, 12) / 50, "w": drawn(12)})


@pytest.mark.parametrize("heads", [1, 3])
def test_rotary(heads: int) -> None:
    node = helper.make_node("RotaryEmbedding", ["x", "cos", "sin"], ["y"], num_heads=heads)
    shapes = {"x": (FLOAT, [2, "n", 8 * heads]), "cos": (FLOAT, [2, "n", 4]), "sin": (FLOAT, [2, "n", 4])}
    model = model_of([node], shapes, {"y": (FLOAT, [2, "n", 8 * heads])})
    assert_same(model, {"x": drawn(2, 5, 8 * heads), "cos": drawn(2, 5, 4, seed=1), "sin": drawn(2, 5, 4, seed=2)})


@pytest.mark.parametrize("size", [1, BLOCK, BLOCK + 1, BLOCK * BLOCK + 7])
def test_sums(size: int) -> None:
    nodes = [
        helper.make_node("Constant", [], ["axis"], value_int=0),
        helper.make_node("CumSum", ["x", "axis"], ["y"]),
    ]
    model = model_of(nodes, {"x": (INT64, [size])}, {"y": (INT64, [size])})
    feeds = {"x": np.random.default_rng(0).integers(-3, 1 << 30, size)}
    np.testing.assert_array_equal(run(rewritten(model), feeds)["y"], np.cumsum(feeds["x"]))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_a_tower(masked: bool) -> None:
    inputs: dict[str, Any] = {name: (FLOAT, ["b", "n", 24]) for name in "qkv"}
    inputs |= {"bias": (FLOAT, [1, 1, "n", "n"])} if masked else {}
    node = helper.make_node("Attention", list(inputs), ["y"], q_num_heads=3, kv_num_heads=3)
    feeds = {name: drawn(2, 6, 24, seed=place) for place, name in enumerate("qkv")}
    feeds |= {"bias": drawn(1, 1, 6, 6, seed=9)} if masked else {}
    assert_same(model_of([node], inputs, {"y": (FLOAT, ["b", "n", 24])}), feeds)


def cached(heads: int, kv: int, head: int = 8, length: Any = "tokens") -> onnx.ModelProto:
    """One attention over a cache, as the dialect says it."""
    make = helper.make_node
    nodes = [make("Constant", [], [name], value_ints=ints) for name, ints in {
        "zero": [0], "one": [1], "split_q": [0, 0, heads, -1], "split_kv": [0, 0, kv, -1]}.items()]  # fmt: skip
    for name, source, split in (("q", "hidden", "split_q"), ("k", "key", "split_kv"), ("v", "value", "split_kv")):
        nodes.append(make("Reshape", [source, split], [f"{name}_split"]))
        nodes.append(make("Transpose", [f"{name}_split"], [name], perm=[0, 2, 1, 3]))
    nodes += [
        make("Slice", ["kv_len", "zero", "one", "zero"], ["held"]),
        make("Shape", ["hidden"], ["length"], start=1, end=2),
        make("Sub", ["held", "length"], ["start"]),
        make("TensorScatter", ["past_key_0", "k", "start"], ["present_key_0"], axis=2),
        make("TensorScatter", ["past_value_0", "v", "start"], ["present_value_0"], axis=2),
        make("Attention", ["q", "present_key_0", "present_value_0", "", "", "", "held"], ["y"], is_causal=1),
    ]
    caches = {f"{when}_{part}_0": (FLOAT, [1, kv, "capacity_0", head])
              for when in ("past", "present") for part in ("key", "value")}  # fmt: skip
    inputs = {"hidden": (FLOAT, [1, length, heads * head]), "key": (FLOAT, [1, length, kv * head]),
              "value": (FLOAT, [1, length, kv * head]), "kv_len": (INT64, [1])}  # fmt: skip
    outputs = {name: value for name, value in caches.items() if name.startswith("present")}
    inputs |= {name: value for name, value in caches.items() if name.startswith("past")}
    return model_of(nodes, inputs, {"y": (FLOAT, [1, heads, length, head])} | outputs)


@needs_portable
@pytest.mark.parametrize(("heads", "kv"), [(2, 2), (6, 2), (7, 1)])
@pytest.mark.parametrize(("length", "held", "slots"), [(5, 5, 16), (4, 9, 16), (1, 16, 16), (2, 12, 12)])
def test_attention_over_a_cache(heads: int, kv: int, length: int, held: int, slots: int) -> None:
    """Prefill, chunk and steps: rows to append are those of the scatter, and no slot beyond is read."""
    model = cached(heads, kv)
    feeds = {"hidden": drawn(1, length, heads * 8), "key": drawn(1, length, kv * 8, seed=1),
             "value": drawn(1, length, kv * 8, seed=2), "kv_len": np.array([held]),
             "past_key_0": drawn(1, kv, slots, 8, seed=3), "past_value_0": drawn(1, kv, slots, 8, seed=4)}  # fmt: skip
    for part in ("key", "value"):
        feeds[f"past_{part}_0"][:, :, held - length :] = 3e4  # what lies where nothing is held
    found, expected = run(rewritten(model), feeds), run(model, feeds)
    np.testing.assert_allclose(found["y"], expected["y"], rtol=0, atol=EXACT * 10)
    for part in ("key", "value"):
        written = expected[f"present_{part}_0"][:, :, held - length : held]
        np.testing.assert_array_equal(found[f"rows_{part}_0"], written)


def test_what_is_not_translated_is_refused_by_name() -> None:
    model = cached(2, 1)
    attention = model.graph.node[-1]
    attention.attribute.append(helper.make_attribute("softcap", 3.0))
    with pytest.raises(BundleError, match=r"node y \(Attention\) of graph.onnx has softcap = 3.0, .* a newer TensorRT"):
        rewritten(model)
    del attention.attribute[:]
    with pytest.raises(BundleError, match=r"is not the causal attention over a cache"):
        rewritten(model)
    model = cached(2, 1)
    model.graph.node[0].domain = "com.microsoft"
    with pytest.raises(BundleError, match=r"\(Constant\) of graph.onnx is of the domain com.microsoft"):
        rewritten(model)
    model = cached(2, 1)
    model.graph.node[-1].input[6] = "kv_len"  # another length than that of the scatter
    with pytest.raises(BundleError, match=r"is not the causal attention over a cache"):
        rewritten(model)


trt = pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_segment(tmp_path_factory)


def test_a_network_without_layers_for_attention(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed with the weights beside the graph; a cache is an input of free length and its new rows an output."""
    library = load_library("tensorrt-rtx")
    builder = library.builder()
    network, parser = parse_plain(library, builder, graph, 2, one_length=True)
    kinds = layer_kinds(network)
    assert {"MATRIX_MULTIPLY", "SOFTMAX"} <= kinds.keys()
    assert (
        not {"ATTENTION_INPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING", "LOOP", "PLUGIN_V2", "PLUGIN_V3"} & kinds.keys()
    )
    shapes = {tensor.name: tuple(tensor.shape) for tensor in outputs_of(network)}
    assert shapes["rows_key_1"] == (1, 1, -1, 16)
    with pytest.raises(BundleError, match="has 2 caches, 1 capacities are given"):
        parse_plain(library, builder, graph, 1, one_length=True)

    def forgetful(model: onnx.ModelProto, *arguments: Any) -> None:
        rewrite_plain(model, *arguments)
        del model.graph.output[-1]

    monkeypatch.setattr(tensorrt_network, "rewrite_plain", forgetful)
    with pytest.raises(BackendError, match=r"something else: it has logits, .*rows_key_1, not logits, .*rows_value_1"):
        parse_plain(library, builder, graph, 2, one_length=True)
    del network, parser


def plain_spec(graph: Path, capacity: int) -> EngineSpec:
    profiles = []
    for name, tokens, slots in (("prefill 32", 32, PREFILL_SLOTS), ("decode", 2, capacity)):
        sizes = {"tokens": tokens, "capacity_0": slots, "capacity_1": slots, "batch": 1, "lengths": 2}
        shapes = {value: (tuple(axis if isinstance(axis, int) else sizes[axis] for axis in axes),)
                  for value, axes in graph_axes(graph).items()}  # fmt: skip
        profiles.append(ProfileRecord(name, tokens, shapes))
    options = plain_options(one_length=True)
    return EngineSpec(graph, "tensorrt-rtx", ("8.6",), "float16", (capacity,) * 2, tuple(profiles), options)


@pytest.mark.slow
def test_a_plain_engine_is_built_with_and_without_a_stream(graph: Path, tmp_path: Path) -> None:
    """TensorRT 10.3 gives its plan as a whole: the file is the same, and so is what ends such a build."""
    from dataclasses import replace

    spec = plain_spec(graph, 64)
    facts = build_engine(spec, tmp_path / "streamed")
    library = load_library("tensorrt-rtx")

    class Older(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name == "IStreamWriter":
                raise AttributeError(name)
            return getattr(library.module, name)

    older = replace(library, module=Older("tensorrt_rtx"))
    whole = build_engine(spec, tmp_path / "whole", library=older)
    assert facts.layer_kinds == whole.layer_kinds
    assert abs(facts.size - whole.size) < facts.size / 100
    shapes = {tensor.name: tensor.shape for tensor in whole.tensors}
    assert shapes["past_key_0"] == (1, 1, -1, 16)
    assert shapes["rows_value_1"] == (1, 1, -1, 16)

    def stop(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(spec, tmp_path / "ended", library=older, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["streamed", "whole"]


def test_the_variant_of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = TensorRTBuilder("tensorrt-rtx")
    builder.check(EngineOptions("tensorrt-rtx", ("86",), variant="plain"))
    with pytest.raises(BackendError, match=r"--max-autotune is not for tensorrt-rtx"):
        builder.check(EngineOptions("tensorrt-rtx", ("86",), max_autotune=True))
    from framefusion.runtime.backends.tensorrt.library import Library, too_old, variants_of

    assert variants_of("tensorrt", "10.3.0") == variants_of("tensorrt", "10.13.3.9") == ("plain",)
    assert variants_of("tensorrt", "11.0.0.114") == variants_of("tensorrt-rtx", "1.7.1") == ("attention", "plain")
    assert too_old("tensorrt", "10.2.0.19")
    assert not too_old("tensorrt", "10.3.0.26")
    assert not too_old("tensorrt-rtx", "1.7.1")
    older = Library("tensorrt", ModuleType("tensorrt"), "10.3.0", load_library("tensorrt-rtx").messages)
    assert older.check_variant(None) == "plain"
    with pytest.raises(BackendError, match=r"--variant attention: tensorrt 10.3.0 has no .* with 11: leave it"):
        older.check_variant("attention")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["fixed", "portable"])
def test_whole_graphs_give_what_they_gave(name: str, rows: int, tmp_path: Path) -> None:
    """Every graph of a bundle: segments with scores, a static prefill that reduces inside, its decode, the tower.

    Rows of a batch have a token each, behind caches of their own lengths.
    """
    folder = shared(name)
    graphs = [path for path in sorted(folder.rglob("*.onnx")) if not path.name.endswith(".plain.onnx")]
    for path in graphs:
        model = onnx.load(str(path))
        one_length = name == "portable"
        feeds = feeds_of(model, name == "fixed" and path.name == "graph.onnx", rows)
        if "label" in feeds:
            feeds["kv_len"][:] = static_lengths(folder)
        found = run(rewritten(model, one_length), feeds)
        expected = run(path, feeds)
        for output, values in expected.items():
            if output.startswith("present_"):
                layer = int(output.rsplit("_", 1)[1])
                batch = values.shape[0]
                new = found["rows_" + output.partition("_")[2]]
                ends = feeds["kv_len"].reshape(-1, batch)[layer]
                written = np.stack([values[row, :, end - new.shape[2] : end] for row, end in enumerate(ends)])
                np.testing.assert_allclose(new, written, rtol=0, atol=1e-5 * np.abs(written).max())
            elif rows == 1 or output in ("hidden_out", "logits"):  # of several rows nobody reads scores
                np.testing.assert_allclose(found[output], values, rtol=0, atol=1e-5 * max(np.abs(values).max(), 1))
    assert len(graphs) >= 3


def static_lengths(folder: Path) -> tuple[int, ...]:
    fixed = Bundle(folder, verify=False).manifest.fixed
    assert fixed is not None
    return fixed.lengths


def feeds_of(model: onnx.ModelProto, static: bool, rows: int = 1) -> dict[str, Array]:
    """Drawn inputs: a chunk of six tokens behind five, a token of each row, or a static prefill, of which all count."""
    tokens = 6 if rows == 1 else 1
    layers = sum(value.name.startswith("past_key_") for value in model.graph.input)
    sizes = {"tokens": tokens, "grids": 2, "patches": 16, "batch": rows, "lengths": rows * layers}
    feeds: dict[str, Array] = {}
    random = np.random.default_rng(0)
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [axis.dim_value or sizes.get(axis.dim_param, 192 if static else 24) for axis in tensor.shape.dim]
        if tensor.elem_type == FLOAT:
            feeds[value.name] = random.standard_normal(shape).astype(np.float32)
        elif tensor.elem_type == TensorProto.UINT8:
            feeds[value.name] = random.integers(0, 255, shape).astype(np.uint8)
        else:
            feeds[value.name] = np.zeros(shape, np.int64)
    if "kv_len" in feeds:
        feeds["kv_len"][:] = 11 + 2 * (np.arange(feeds["kv_len"].size) % rows)
        feeds["last"][:] = tokens - 1
        feeds |= {"previous": np.maximum(np.arange(tokens) - 3, -1)} if "previous" in feeds else {}
    if static and "label" in feeds:
        length = feeds["label"].size
        feeds["label"] = np.arange(length) % 16
        feeds["order"] = np.argsort(feeds["label"], kind="stable")
        origin = next(value for value in model.graph.output if value.name == "origin")
        kept = origin.type.tensor_type.shape.dim[0].dim_value
        feeds["last"][:] = kept - 1
        feeds["drops"][:] = (length - kept) // 2
    return feeds


@pytest.mark.slow
def test_a_chunk_of_a_segment_in_half_precision(tmp_path: Path) -> None:
    """Masked scores stay finite and shares of what is masked are zero, in fp16 too."""
    path = write_segment(tmp_path / "graph.onnx", TINY, REST, torch.float16)
    model = onnx.load(str(path))
    feeds = {name: values.astype(np.float16) if values.dtype == np.float32 else values
             for name, values in half_feeds(model).items()}  # fmt: skip
    found, expected = run(rewritten(model, True), feeds), run(path, feeds)
    assert np.isfinite(found["logits"]).all()
    np.testing.assert_allclose(
        found["logits"], expected["logits"], rtol=0, atol=2e-2 * np.abs(expected["logits"]).max()
    )


def half_feeds(model: onnx.ModelProto) -> dict[str, Array]:
    for value in model.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = FLOAT
    feeds = feeds_of(model, False)
    for value in model.graph.input:
        if value.type.tensor_type.elem_type == FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return feeds
