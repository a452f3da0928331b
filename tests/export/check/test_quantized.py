"""A bundle with weights in 4 bits: what its check compares, and that a code of another matrix is not believed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from framefusion.errors import BudgetError, CheckpointError
from framefusion.export.build import build
from framefusion.export.check.golden import ROUNDED_HEADROOM
from framefusion.export.check.quantized import EXACT
from framefusion.export.check.verify import weight_report
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.runtime.backends.openvino.backend import OpenVinoBackend, open_backend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest import WeightFormatRecord
from framefusion.runtime.proof.golden import require_golden
from framefusion.runtime.proof.opening import open_proven
from framefusion.runtime.proof.prove import prove

TRAINED = Path(__file__).parents[2] / "models" / "tiny_qwen2_vl"
INT4 = BuildOptions(weights="int4", num_decoder_layer=4, depth=2, cost=0.5)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(Checkpoint(TRAINED), tmp_path_factory.mktemp("int4") / "bundle", INT4).folder


@pytest.mark.slow
def test_a_quantized_bundle_is_checked_with_its_codes_and_runs(built: Path) -> None:
    bundle = Bundle(built)
    check = bundle.manifest.check
    lines = {line["what"]: line for line in check["lines"]}
    # 1. with activations in floats the limit is that of fp32; as it runs, that of activations in 8 bits
    exact = [line for what, line in lines.items() if what.startswith(EXACT)]
    assert len(exact) == 7
    assert all(line["value"] <= line["limit"] <= 1e-4 for line in exact)
    assert 1e-4 < lines["dense logits"]["value"] <= lines["dense logits"]["limit"] < 0.1
    assert lines["logits against transformers"]["value"] < 1e-4
    # 2. what quantization costs is said
    cost = check["quantization"]
    assert 0.01 < max(cost["errors_by_layer"]) < 0.2
    assert cost["errors_by_layer"][0] == 0
    # 3. the manifest says how weights are stored, and the golden how far a device may be off
    record = bundle.manifest.quantization
    assert record is not None
    assert (record.read, record.floats, record.formats) == (False, 1, (WeightFormatRecord(4, 32, True, 28),))
    limit = ROUNDED_HEADROOM * lines["dense logits"]["limit"]  # the worst of many vectors, not of one prompt
    assert require_golden(bundle).limits.numbers == pytest.approx(limit)
    choice, _ = open_proven(bundle)
    assert choice.option.backend == "onnxruntime"


@pytest.mark.slow
def test_openvino_reads_the_codes_and_rounds_activations_a_block(built: Path) -> None:
    pytest.importorskip("openvino", reason="it is not installed: pip install openvino")
    bundle = Bundle(built)
    backend = open_backend(bundle, "openvino", "cpu", 1)
    proof = prove(bundle, backend, require_golden(bundle))
    assert proof.right
    assert proof.worst.error > 1e-4  # in fp32 without that rounding it is nearer
    assert isinstance(backend, OpenVinoBackend)
    compiled = backend.graph("segments/rest/graph.onnx").model
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 32


@pytest.mark.slow
def test_a_code_that_was_written_wrong_is_found(built: Path) -> None:
    graph = built / "segments" / "rest" / "graph.onnx"
    places = {tensor.name: tensor for tensor in onnx.load(graph, load_external_data=False).graph.initializer}
    offset = next(entry.value for entry in places["blocks.1.k.packed"].external_data if entry.key == "offset")
    with (graph.parent / "weights.bin").open("r+b") as file:
        file.seek(int(offset))
        byte = file.read(1)[0]
        file.seek(int(offset))
        file.write(bytes([byte ^ 0x11]))
        file.flush()
        report = weight_report(built, BuildPlan(Checkpoint(TRAINED), INT4), all_codes=True)
        file.seek(int(offset))
        file.write(bytes([byte]))
    assert report["differing"] == ["segments/rest/graph.onnx: blocks.1.k.packed"]
    assert report["tensors"] > 2 * 28  # codes and scales of every linear map


def test_the_plan_counts_codes_as_bytes() -> None:
    checkpoint = Checkpoint(TRAINED)
    floats = BuildPlan(checkpoint, replace(INT4, weights=None, dtype="float16"))
    codes = BuildPlan(checkpoint, replace(INT4, dtype="float16"))
    graph = codes.graph("segments/layer01/graph.onnx")
    packed = sum(size for name, size in zip(graph.shapes, graph.eager_bytes, strict=True) if name.endswith("packed"))
    matrices = sum(
        size
        for graph in floats.graphs
        if graph.name == "segments/layer01/graph.onnx"
        for shape, size in zip(graph.shapes.values(), graph.eager_bytes, strict=True)
        if len(shape) == 2
    )
    assert packed == matrices / 8
    assert floats.quantization is None
    assert codes.in_floats is not None
    assert codes.in_floats.quantization is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": "int5"}, BudgetError, "int8 or int4 is expected"),
        ({"weights": "int4:48"}, CheckpointError, "blocks of 48 weights"),
        ({"weights": "int4", "backend": "inductor"}, BudgetError, "inductor engines are not compiled"),
        ({"weights": "int4+zero", "dialect": "portable"}, BudgetError, "has no zero points, as TensorRT has none"),
        ({"weights": "int4:256", "dialect": "portable"}, CheckpointError, "rows of 128 weights end within a block"),
    ],
)
def test_what_no_kernel_has_is_refused_before_anything_is_read(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BuildPlan(Checkpoint(TRAINED), BuildOptions(**options))
