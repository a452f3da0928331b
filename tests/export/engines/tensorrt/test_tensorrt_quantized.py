"""Weights in 4 and 8 bits in the portable dialect: TensorRT-RTX reads them as they are, and compiles engines."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from framefusion.errors import BackendError
from framefusion.export.build import build
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.engines.compile import compile_bundle
from framefusion.export.engines.tensorrt import build as trt_build
from framefusion.export.engines.tensorrt.network import parse_graph
from framefusion.export.engines.tensorrt.network_check import layer_kinds, layers_of
from framefusion.export.options import BuildOptions, EngineOptions, Resources
from framefusion.runtime.backends.tensorrt.library import load_library
from framefusion.runtime.bundle import Bundle

trt = pytest.importorskip("tensorrt_rtx", reason="it is not installed")

TRAINED = Path(__file__).parents[3] / "models" / "tiny_qwen2_vl"
GRAPH = "segments/decoder/graph.onnx"
LAYERS = 2


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "kind"), [("int4", "INT4"), ("int8:64", "INT8"), ("int8", "INT8")])
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


def weights_of(folder: Path) -> dict[str, tuple[bytes, np.ndarray]]:
    """Matrix in floats of 8 bits -> its bytes, and what they stand for in float16.  [out, in]"""
    graph = onnx.load(folder / GRAPH)
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    found = {}
    for name, codes in arrays.items():
        if codes.dtype == ml_dtypes.float8_e4m3fn:
            scales = arrays[name.replace(".packed", ".scales")].astype(np.float32)
            floats = (codes.astype(np.float32) * scales.reshape(len(codes), -1)).astype(np.float16)
            found[name] = (codes.tobytes(), floats)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["fp8", "fp8+activations+head"])
def test_floats_of_8_bits_are_in_the_engine_as_they_are(tmp_path: Path, weights: str) -> None:
    """An engine cannot be inspected without a driver, so its bytes are: every matrix is there, and none in float16."""
    options = BuildOptions(
        reduction="none", num_decoder_layer=LAYERS, max_input_len=64, buckets=(64,), weights=weights,
        backend="tensorrt-rtx", dialect="portable", dtype="float16", max_batch_size=1,
    )  # fmt: skip
    built = build(Checkpoint(TRAINED), tmp_path / "bundle", options, verify=False)
    # 1. without --target-sm, for all GPUs that have such products
    engine = next(engine for engine in built.manifest.engines if engine.graph == GRAPH)
    assert engine.targets
    assert min(map(float, engine.targets)) == 8.9
    Bundle(built.folder).check_graphs()
    # 2. the network: weights of every linear map, and what enters those of the layers
    library = load_library("tensorrt-rtx")
    builder = library.builder()
    parsed = parse_graph(library, builder, built.folder / GRAPH, (80, 80))
    kinds = layer_kinds(parsed.network)
    rounded = "activations" in weights
    matrices = LAYERS * 7 + ("head" in weights)
    assert kinds["DEQUANTIZE"] == matrices + LAYERS * 7 * rounded
    assert kinds.get("QUANTIZE", 0) == LAYERS * 7 * rounded
    del parsed
    # 3. the engine: bytes of every matrix
    content = (built.folder / engine.file).read_bytes()
    found = weights_of(built.folder)
    assert len(found) == matrices
    for name, (codes, floats) in found.items():
        assert codes in content, name
        assert floats[0].tobytes() not in content, name
        assert np.ascontiguousarray(floats[:, 0]).tobytes() not in content, name
    assert min(len(codes) for codes, _ in found.values()) >= 1 << 13


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int4", "fp8+activations"])
def test_codes_and_a_reduction_in_one_static_graph(tmp_path: Path, weights: str) -> None:
    """What this schedule takes of the rotary tables crashed the library, until it was taken by GatherND."""
    options = BuildOptions(
        reduction="fixed", cost=0.6, merge_shares=(0.3,), prune_layer=2, num_decoder_layer=4, max_input_len=192,
        max_text_len=64, weights=weights, backend="tensorrt-rtx", target_sm=("89",), dialect="portable",
        dtype="float16",
    )  # fmt: skip
    built = build(Checkpoint(TRAINED), tmp_path / "bundle", options, verify=False)
    decode = GRAPH.replace("graph.onnx", "decode.onnx")
    assert {engine.graph for engine in built.manifest.engines} == {GRAPH, decode, "vision/graph.onnx"}


@pytest.mark.slow
def test_the_library_refuses_older_gpus_with_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is the library's: without ours it refuses, so nothing is compiled of floats in their place."""
    options = BuildOptions(
        reduction="none", num_decoder_layer=LAYERS, max_input_len=64, buckets=(64,), weights="fp8", dialect="portable",
        dtype="float16",
    )  # fmt: skip
    folder = build(Checkpoint(TRAINED), tmp_path / "bundle", options, verify=False).folder
    with pytest.raises(BackendError, match=r"--target-sm 86: floats of 8 bits need a GPU of compute capability 8\.9"):
        compile_bundle(folder, EngineOptions("tensorrt-rtx", ("86",)))
    with pytest.raises(BackendError, match="--variant plain has no products with floats of 8 bits"):
        compile_bundle(folder, EngineOptions("tensorrt-rtx", ("89",), variant="plain"))
    monkeypatch.setattr(trt_build, "float8_problem", lambda *_: "")
    with pytest.raises(BackendError, match="HW-specific datatypes: fp8_e4m3"):
        compile_bundle(folder, EngineOptions("tensorrt-rtx", ("86",)), Resources(cache=tmp_path / "cache"))
