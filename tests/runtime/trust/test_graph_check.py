"""Graphs of unknown origin: what a build never writes is refused before a runtime opens it, and soon."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.errors import BundleError
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest_file import read_manifest
from framefusion.runtime.trust import graph_check, onnx_wire
from framefusion.runtime.trust.graph_check import OPERATORS, check_graph
from framefusion.runtime.trust.onnx_wire import WireError, read_model

onnx = pytest.importorskip("onnx", reason="it is not installed: it makes the graphs that are refused")
helper = pytest.importorskip("onnx.helper")
numpy_helper = pytest.importorskip("onnx.numpy_helper")

GRAPH, VISION = "segments/rest/graph.onnx", "vision/graph.onnx"
Edit = Callable[[Any], object]


def load(path: Path) -> Any:
    return onnx.load(path, load_external_data=False)


def test_what_is_read_is_what_onnx_reads(bundle: Path) -> None:
    for name in Bundle(bundle, verify=False).graphs:
        theirs, ours = load(bundle / name), read_model((bundle / name).read_bytes())
        assert ours.operators == {(node.domain, node.op_type) for node in theirs.graph.node}
        assert ours.nodes == len(theirs.graph.node)
        assert ours.opsets == {opset.domain: opset.version for opset in theirs.opset_import}
        for values, found in ((theirs.graph.input, ours.inputs), (theirs.graph.output, ours.outputs)):
            assert list(found) == [value.name for value in values]
            for value in values:
                kind = value.type.tensor_type
                sizes = [size.dim_value if size.HasField("dim_value") else -1 for size in kind.shape.dim]
                assert found[value.name] == (kind.elem_type, tuple(sizes))
        for theirs_, ours_ in zip(theirs.graph.initializer, ours.initializers, strict=True):
            told = {entry.key: entry.value for entry in theirs_.external_data}
            assert ours_[:3] == (theirs_.name, theirs_.data_type, tuple(theirs_.dims))
            assert (ours_.external or {}) == told


def test_every_graph_of_a_build_passes(bundle: Path) -> None:
    Bundle(bundle, verify=False).check_graphs()


def add_node(*arguments: Any, **attributes: Any) -> Edit:
    return lambda model: model.graph.node.append(helper.make_node(*arguments, **attributes))


def loop(model: Any) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", ["n", "c"], [], body=body))


def hidden_subgraph(model: Any) -> None:
    """In an attribute of an operator that has none."""
    model.graph.node[0].attribute.append(helper.make_attribute("body", helper.make_graph([], "body", [], [])))


def own_function(model: Any) -> None:
    opset = helper.make_opsetid("", 23)
    model.functions.append(
        helper.make_function("", "Add", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], [opset])
    )


def place_of(key: str, value: str) -> Edit:
    """Change where the first weight lies."""

    def edit(model: Any) -> None:
        (entry,) = (entry for entry in model.graph.initializer[0].external_data if entry.key == key)
        entry.value = value

    return edit


def grow(model: Any) -> None:
    model.graph.initializer[0].dims[0] = 1 << 40


def add_opset(model: Any) -> None:
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))


def widen(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 4096


def retype(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


def rename_output(model: Any) -> None:
    model.graph.output[0].name = "other"


def outside_attribute(model: Any) -> None:
    tensor = numpy_helper.from_array(np.zeros(1, np.float32), "t")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def attribute(operator: str, **values: Any) -> Edit:
    """Change attributes of the nodes of an operator, or add them."""

    def edit(model: Any) -> None:
        for node in model.graph.node:
            if node.op_type == operator:
                kept = [one for one in node.attribute if one.name not in values]
                del node.attribute[:]
                node.attribute.extend(kept)
                node.attribute.extend(helper.make_attribute(name, value) for name, value in values.items())

    return edit


EDITS: dict[str, tuple[Edit, str]] = {
    "heads beyond 32 bits": (attribute("GroupQueryAttention", num_heads=1 << 40), "it may be 0 to"),
    "key heads beyond 32 bits": (attribute("GroupQueryAttention", kv_num_heads=1 << 40), "it may be 0 to"),
    "an axis beyond 32 bits": (attribute("Gather", axis=-(1 << 63)), "'axis' of Gather is -9223372036854775808"),
    "code that no build runs": (attribute("GroupQueryAttention", local_window_size=3), "which no build writes"),
    "numbers without end": (attribute("Reshape", allowzero=[0] * 10_000), "more than 64 numbers"),
    "batch dimensions below 0": (
        add_node("GatherND", ["a", "b"], ["c"], batch_dims=-2),
        "'batch_dims' of GatherND is -2, it may be 0 to 16",
    ),
    "custom domain": (add_node("Add", ["a", "b"], ["c"], domain="my.ops"), "operator 'my.ops.Add'"),
    "contrib operator of no dialect": (add_node("Rfft", ["a"], ["b"], domain="com.microsoft"), "com.microsoft.Rfft"),
    "python": (add_node("PyOp", ["a"], ["b"], domain="ai.onnx.contrib"), "ai.onnx.contrib.PyOp"),
    "loop": (loop, "holds a subgraph"),
    "hidden subgraph": (hidden_subgraph, "holds a subgraph"),
    "function": (own_function, "holds field 25"),
    "opset": (add_opset, "takes operators of 'ai.onnx.ml'"),
    "absolute weights": (place_of("location", "/etc/passwd"), ""),
    "weights above": (place_of("location", "../../../../etc/passwd"), ""),
    "weights unlisted": (place_of("location", "other.bin"), "does not list"),
    "weights of another part": (place_of("location", "../../embedding.bin"), ""),
    "weights beyond the file": (place_of("offset", str(1 << 40)), "bytes at"),
    "weights before the file": (place_of("offset", "-1"), "bytes at"),
    "weights of another size": (place_of("length", "1"), "bytes at"),
    "shape beyond memory": (grow, "bytes at"),
    "input of another width": (widen, "input hidden has type 1"),
    "input of another type": (retype, "input hidden has type 10"),
    "output of another name": (rename_output, "has an output 'other'"),
    "attribute in a file": (outside_attribute, "numbers lie in another file"),
}


@pytest.mark.parametrize("name", EDITS)
def test_graphs_that_no_build_writes(bundle: Path, tmp_path: Path, name: str) -> None:
    edit, words = EDITS[name]
    model = load(bundle / GRAPH)
    edit(model)
    for folder in ("segments/rest", "segments/layer00"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "segments/rest/weights.bin").write_bytes((bundle / "segments/rest/weights.bin").read_bytes())
    (tmp_path / "embedding.bin").write_bytes(b"")
    (tmp_path / GRAPH).write_bytes(model.SerializeToString())
    with pytest.raises(BundleError) as refused:
        check_graph(tmp_path, GRAPH, read_manifest(bundle))
    assert words in str(refused.value)
    with pytest.raises(BundleError):  # and by what opens it, with and without a manifest
        OnnxRuntimeBackend(tmp_path, manifest=read_manifest(bundle)).session(GRAPH)


def test_a_tower_of_bytes_is_not_taken_for_one_of_floats_nor_the_other_way_round(bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle)
    floats = replace(manifest, vision=replace(manifest.vision, input="float"))
    assert manifest.vision.input == "uint8"
    with pytest.raises(BundleError, match=r"input patches has type 2 .*, the manifest says .*dtype=1\b"):
        check_graph(bundle, VISION, floats)
    model = load(bundle / VISION)
    (patches,) = (value for value in model.graph.input if value.name == "patches")
    patches.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    shutil.copytree(bundle / "vision", tmp_path / "vision")
    (tmp_path / VISION).write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"input patches has type 1 .*, the manifest says .*dtype=2\b"):
        check_graph(tmp_path, VISION, manifest)


def test_an_unlisted_graph_is_not_opened(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    files = {name: record for name, record in manifest.files.items() if name != GRAPH}
    backend = OnnxRuntimeBackend(bundle, manifest=Bundle(bundle, verify=False).with_manifest(files=files).manifest)
    with pytest.raises(BundleError, match="manifest does not list"):
        backend.session(GRAPH)


def test_bytes_that_are_no_model(bundle: Path) -> None:
    whole = (bundle / VISION).read_bytes()
    for content in (b"", b"\xff" * 20, whole[:-1], whole + whole, b"\x3a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"):
        with pytest.raises(WireError):
            read_model(content)


@pytest.mark.parametrize("field", [b"\x0a\x00", b"\x3a\x02\x0a\x00", b"\x08\x01", b"\x42\x00"])
def test_a_file_of_nothing_but_fields_ends_soon(field: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_wire, "MOST_FIELDS", 1000)
    with pytest.raises(WireError):
        read_model(field * 10_000_000)


def test_the_time_of_a_graph_grows_as_its_nodes(bundle: Path) -> None:
    """16 times as many, as in 22 layers of about 60 nodes, the last segment of a 7B model: 12 ms on one core."""
    model = load(bundle / GRAPH)
    small = model.SerializeToString()
    nodes, weights = list(model.graph.node), list(model.graph.initializer)
    for _ in range(15):
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(weights)
    large = model.SerializeToString()
    assert read_model(large).nodes > 1200
    assert least_time(large) < 3 * 16 * least_time(small)  # 256 times where each node looks at each


def least_time(content: bytes) -> float:
    """Seconds of the processor to read a graph, of the quickest of five times."""
    spent = []
    for _ in range(5):
        start = time.process_time()
        read_model(content)
        spent.append(time.process_time() - start)
    return min(spent)


def test_the_list_holds_what_the_dialects_say_and_no_code() -> None:
    """Loops, operators that read files or call back, and those of sequences and texts are in no list; branches of an If
    are read node by node (test_coded_caches.py)."""
    assert OPERATORS.keys() == {"", "com.microsoft"}
    assert not OPERATORS[""] & {"Loop", "Scan", "SequenceMap", "StringNormalizer", "RandomNormal", "Optional"}
    assert {"GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "QuickGelu"} == graph_check.CONTRIB
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert known >= graph_check.STANDARD


def test_what_onnxruntime_has_to_say_is_one_line_of_an_error(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A node's name is the graph's own, and terminals obey some names."""
    model = load(bundle / VISION)
    model.graph.node[0].name = "\x1b]0;mine\x07"
    model.graph.node[0].input.append("nothing that there is")
    copied = tmp_path / "bundle"
    shutil.copytree(bundle, copied)
    (copied / VISION).write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="cannot be loaded by onnxruntime") as refused:
        OnnxRuntimeBackend(copied).session(VISION)
    assert str(refused.value).isprintable()
    assert capfd.readouterr() == ("", "")
