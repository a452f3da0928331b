"""`ff-export check --bisect` on a sound bundle and on real faults: the report names graph, block and node."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from framefusion.errors import BackendError, CheckFailedError
from framefusion.export.build import build
from framefusion.export.check.bisect import bisect
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.options import BuildOptions
from framefusion.runtime.bundle import file_record
from framefusion.runtime.format.manifest_file import read_manifest, write_manifest
from tests.commands import export
from tests.export.test_build import MODES

SEGMENT = "segments/rest/graph.onnx"


@pytest.fixture
def faulty(bundle: Path, tmp_path: Path) -> Path:
    """A copy to be spoiled."""
    return Path(shutil.copytree(bundle, tmp_path / "faulty"))


def recorded(folder: Path, name: str) -> None:
    """Put a changed file's hash into the manifest: nothing but a comparison can see the fault."""
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, files={**manifest.files, name: file_record(folder / name)}))


def alter_weight(folder: Path, graph: str, name: str) -> None:
    tensor = ir.load(folder / graph).graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    weights = Path(graph).parent / "weights.bin"
    with (folder / weights).open("r+b") as file:
        file.seek(tensor.offset or 0)
        number = np.frombuffer(file.read(4), np.float32) + np.float32(0.5)
        file.seek(tensor.offset or 0)
        file.write(number.tobytes())
    recorded(folder, str(weights))


def alter_node(folder: Path, graph: str, change: Callable[[onnx.NodeProto], bool]) -> str:
    """Change the first node that `change` says it has changed; returns its name."""
    model = onnx.load(folder / graph, load_external_data=False)
    node = next(node for node in model.graph.node if change(node))
    (folder / graph).write_bytes(model.SerializeToString())
    recorded(folder, graph)
    return str(node.name)


def set_attribute(operator: str, name: str, value: Any, skip: int = 0) -> Callable[[onnx.NodeProto], bool]:
    left = [skip]

    def change(node: onnx.NodeProto) -> bool:
        if node.op_type != operator:
            return False
        left[0] -= 1
        if left[0] >= 0:
            return False
        (attribute,) = (item for item in node.attribute if item.name == name)
        attribute.CopyFrom(onnx.helper.make_attribute(name, value))
        return True

    return change


def only_found(folder: Path, checkpoint: Path) -> dict[str, Any]:
    report = bisect.bisect_bundle(folder, Checkpoint(checkpoint))
    assert not report["passed"]
    json.dumps(report, allow_nan=False)
    (found,) = report["found"]
    assert found["place"] in report["words"][0]
    assert all(node in report["words"][0] for node in found["suspect"]["nodes"])
    return dict(found)


def test_a_sound_bundle_says_so(bundle: Path, checkpoint: Path) -> None:
    report = bisect.bisect_bundle(bundle, Checkpoint(checkpoint))
    assert report["passed"]
    assert report["ways"] == ["onnxruntime"]
    assert report["words"] == ["onnxruntime: every graph agrees with eager torch"]
    compared = {(row["graph"], row["kind"], row["output"]) for row in report["boundaries"]}
    assert ("vision/graph.onnx", "vision", "tokens") in compared
    for kind in ("prefill", "decode"):
        outputs = {output for graph, call, output in compared if (graph, call) == ("segments/layer01/graph.onnx", kind)}
        scores = {"similarity", "importance"} if kind == "prefill" else set()  # nothing reads those of a decode step
        assert outputs == {"hidden_out", "present_key_0", "present_value_0"} | scores
    assert "every graph agrees" in bisect.render(report)


def test_a_bisection_needs_a_checkpoint_and_memory(
    bundle: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = export("check", bundle, "--bisect")
    assert refused.exit_code == 2
    assert "--checkpoint" in refused.output
    monkeypatch.setattr(bisect, "available_memory", lambda: 1_000_000)
    with pytest.raises(BackendError, match=r"needs .* GB, 0.0 GB are free: .* --num-decoder-layer"):
        bisect.bisect_bundle(bundle, Checkpoint(checkpoint))


@pytest.mark.slow
def test_a_weight_that_is_not_the_checkpoints(faulty: Path, checkpoint: Path) -> None:
    alter_weight(faulty, SEGMENT, "blocks.4.gate.weight")
    found = only_found(faulty, checkpoint)
    assert found["place"] == "segment rest, layer 3 mlp"
    assert found["boundary"]["graph"] == SEGMENT
    (node,) = found["suspect"]["nodes"]
    assert "(MatMul)" in node
    assert found["suspect"]["causes"] == ["blocks.4.gate.weight is not the checkpoint's: 1 of 2048 numbers differ"]
    assert found["suspect"]["error"] > 1e-4 > found["suspect"]["inputs"]


@pytest.mark.slow
def test_an_attribute_that_was_changed(faulty: Path, checkpoint: Path) -> None:
    name = alter_node(faulty, "segments/layer01/graph.onnx", set_attribute("RMSNormalization", "epsilon", 0.5, skip=1))
    found = only_found(faulty, checkpoint)
    assert found["place"] == "segment layer01, layer 1 attention"
    assert found["suspect"]["nodes"] == [f"{name} (RMSNormalization)"]
    assert "epsilon 0.5, traced now 1e-05" in found["suspect"]["causes"][0]


@pytest.mark.slow
def test_one_node_of_an_operator_that_is_many(faulty: Path, checkpoint: Path) -> None:
    """The importance is thirty nodes in ONNX and one op in torch; its softmax is over the wrong axis."""
    name = alter_node(faulty, "segments/layer01/graph.onnx", set_attribute("Softmax", "axis", 1))
    found = only_found(faulty, checkpoint)
    assert found["boundary"]["output"] == found["suspect"]["value"] == "importance"
    assert found["suspect"]["nodes"] == [f"{name} (Softmax)"]


@pytest.mark.slow
def test_the_vision_tower(faulty: Path, checkpoint: Path) -> None:
    name = alter_node(faulty, "vision/graph.onnx", set_attribute("LayerNormalization", "epsilon", 3.0, skip=1))
    found = only_found(faulty, checkpoint)
    assert found["place"].startswith("vision tower, ")
    assert found["suspect"]["nodes"] == [f"{name} (LayerNormalization)"]


@pytest.mark.slow
def test_a_weight_behind_reductions_within_the_graph(checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions(reduction="fixed", dialect="portable", **MODES["fixed"])
    build(Checkpoint(checkpoint), tmp_path / "bundle", options, verify=False)
    graph = "segments/decoder/graph.onnx"
    alter_weight(tmp_path / "bundle", graph, "blocks.5.up.weight")
    found = only_found(tmp_path / "bundle", checkpoint)
    assert found["place"] == "segment decoder, layer 2 mlp"
    assert "blocks.5.up.weight" in found["suspect"]["causes"][0]


@pytest.mark.slow
def test_the_command_tells_and_fails(faulty: Path, checkpoint: Path) -> None:
    name = alter_node(faulty, SEGMENT, set_attribute("GroupQueryAttention", "kv_num_heads", 1))
    assert name  # one head of keys is what it had: nothing is wrong yet
    alter_weight(faulty, SEGMENT, "blocks.1.o.weight")
    result = export("check", faulty, "--checkpoint", checkpoint, "--bisect")
    assert result.exit_code == CheckFailedError.exit_code
    assert "layer 2 attention" in result.output
    assert "blocks.1.o.weight is not the checkpoint's" in result.output
    report = json.loads(export("check", faulty, "--checkpoint", checkpoint, "--bisect", "--json").stdout)
    assert report["comparison"]["found"][0]["place"] == "segment rest, layer 2 attention"
