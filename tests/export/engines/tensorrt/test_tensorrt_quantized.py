"""Weights in 4 bits in the portable dialect: TensorRT-RTX reads them as INT4, and compiles an engine over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from framefusion.export.build import build
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.engines.tensorrt.network import parse_graph
from framefusion.export.engines.tensorrt.network_check import layer_kinds, layers_of
from framefusion.export.options import BuildOptions
from framefusion.runtime.backends.tensorrt.library import load_library
from framefusion.runtime.bundle import Bundle

trt = pytest.importorskip("tensorrt_rtx", reason="it is not installed")

TRAINED = Path(__file__).parents[3] / "models" / "tiny_qwen2_vl"
GRAPH = "segments/decoder/graph.onnx"


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "kind"), [("int4", "INT4"), ("int8:64", "INT8")])
def test_codes_reach_the_network_as_they_are(tmp_path: Path, weights: str, kind: str) -> None:
    options = BuildOptions(
        reduction="none", num_decoder_layer=2, max_input_len=64, buckets=(64,), weights=weights,
        backend="tensorrt-rtx", target_sm=("86",), dialect="portable", dtype="float16",
    )  # fmt: skip
    built = build(Checkpoint(TRAINED), tmp_path / "bundle", options, verify=False)
    # 1. an engine for each graph, by the library's own verdict on what was written
    assert {engine.graph for engine in built.manifest.engines} == {GRAPH, "vision/graph.onnx"}
    Bundle(built.folder).check_graphs()
    # 2. the network that the library makes of the graph: all linear maps of the layers, and no copy in floats
    library = load_library("tensorrt-rtx")
    builder = library.builder()
    parsed = parse_graph(library, builder, built.folder / GRAPH, (80, 80))
    assert layer_kinds(parsed.network)["DEQUANTIZE"] == 2 * 7
    codes = [layer.get_output(0) for layer in layers_of(parsed.network) if layer.type == trt.LayerType.CONSTANT]
    assert sum(tensor.dtype == getattr(trt.DataType, kind) for tensor in codes) == 2 * 7
    del parsed
