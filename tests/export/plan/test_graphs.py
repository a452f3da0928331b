"""The list of a bundle's graphs: names, roles and weights as the bundle has them, and one trace for each structure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from framefusion.export.build import build
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.pipeline import eager_loaders
from framefusion.export.plan.build_plan import WEIGHTS, BuildOptions, BuildPlan

ADAPTIVE = BuildOptions(cost=0.5, depth=1, max_input_len=512)
FIXED = BuildOptions(
    reduction="fixed", cost=0.5, merge_shares=(0.3, 0.2), prune_layer=1, max_input_len=128, max_text_len=32
)


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        (
            ADAPTIVE,
            {
                "segments/layer00/graph.onnx": "both",
                "segments/layer01/graph.onnx": "both",
                "segments/rest/graph.onnx": "both",
                "vision/graph.onnx": "vision",
            },
        ),
        (
            FIXED,
            {
                "segments/decoder/graph.onnx": "prefill",
                "segments/decoder/decode.onnx": "decode",
                "vision/graph.onnx": "vision",
            },
        ),
    ],
)
@pytest.mark.usefixtures("instant_traces")
def test_a_bundle_has_the_graphs_of_its_plan(
    options: BuildOptions, graphs: dict[str, str], checkpoint: Path, tmp_path: Path
) -> None:
    plan = BuildPlan(Checkpoint(checkpoint), options)
    assert {graph.name: graph.role for graph in plan.graphs} == graphs
    built = build(Checkpoint(checkpoint), tmp_path / "bundle", options, verify=False)
    assert dict(built.manifest.graphs) == {graph.name: graph.weight_bytes for graph in plan.graphs}
    assert {name for name in built.manifest.files if name.endswith(".onnx")} == graphs.keys()
    for graph in plan.graphs:
        written = (built.folder / graph.folder / WEIGHTS).stat().st_size
        assert 0 <= graph.weight_bytes - written < 4096  # the last tensor of a file is not followed by padding
    for record in built.manifest.segments:
        assert plan.graph(record.prefill).role in ("both", "prefill")
        assert plan.graph(record.decode).role in ("both", "decode")


def test_every_parameter_of_every_graph_has_a_source(checkpoint: Path) -> None:
    for options in (ADAPTIVE, FIXED):
        for graph in BuildPlan(Checkpoint(checkpoint), options).graphs:
            assert graph.shapes
            assert graph.shapes.keys() <= graph.sources.keys(), graph.name
            assert all(parameter.device.type == "meta" for parameter in graph.module().parameters())
            assert graph.module() is not graph.module()


def test_graphs_over_one_file_of_weights_share_their_tensors(checkpoint: Path) -> None:
    plan = BuildPlan(Checkpoint(checkpoint), FIXED)
    loaders = eager_loaders(plan)
    prefill, decode = (dict(loaders[graph.name]().named_parameters()) for graph in plan.graphs[:2])
    assert prefill.keys() == decode.keys()
    assert all(prefill[name].data_ptr() == decode[name].data_ptr() for name in prefill)
    assert all(parameter.dtype == torch.float32 for parameter in prefill.values())
