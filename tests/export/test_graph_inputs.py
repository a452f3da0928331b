"""Inputs of one graph: those that a request gives it, and polygraphy itself runs every graph with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from framefusion.errors import BundleError, StorageError
from framefusion.export.commands.cli import ff_export
from framefusion.export.graph_inputs import graph_inputs, write_inputs
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.proof.golden import require_golden
from framefusion.runtime.proof.rehearsal import Rehearsal
from tests.bundles import shared


def session(graph: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bundle", "portable"])
def test_a_graph_by_itself_gives_what_it_gives_in_a_request(name: str) -> None:
    bundle = Bundle(shared(name))
    golden = require_golden(bundle)
    graph = bundle.folder / bundle.manifest.segments[-1].graph
    alone = session(graph)
    names = {value.name for value in alone.get_inputs()}
    feeds = graph_inputs(graph)
    assert all(set(feed) == names for feed in feeds)
    assert [feed["kv_len"].max() > 0 for feed in feeds] == [True] * len(feeds)
    rehearsal = Rehearsal(bundle, OnnxRuntimeBackend(bundle.folder, 1, manifest=bundle.manifest), golden.request)
    expected = [row for run in golden.runs for row in rehearsal.answer(run.cost, run.similarity_lower_bound).logits]
    logits = [alone.run(["logits"], feed)[0].reshape(-1) for feed in feeds]
    assert len(logits) == len(expected) > 4
    for ours, theirs in zip(logits, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bundle", "portable"])
def test_polygraphy_runs_graphs_with_them(name: str, tmp_path: Path) -> None:
    folder = shared(name)
    for graph in (folder / Bundle(folder).manifest.segments[1].graph, folder / "vision/graph.onnx"):
        output = tmp_path / "inputs.json"
        done = CliRunner().invoke(ff_export, ["inputs", str(graph), "-o", str(output), "--json"])
        report = json.loads(done.stdout)
        assert report["bytes"] == output.stat().st_size
        command = ["polygraphy", "run", str(graph), "--onnxrt", "--load-inputs", str(output), "--validate"]
        code = f"import sys; sys.argv = {command!r}\nfrom polygraphy.tools import main; sys.exit(main())"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        assert "PASSED | Runtime" in run.stdout
        assert run.stdout.count("Streaming iteration") in (0, report["runs"])


def test_what_is_no_graph_is_refused_by_name(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is in no bundle: give the file of a graph"):
        graph_inputs(tmp_path / "graph.onnx")
    with pytest.raises(BundleError, match=r"is no graph of its bundle: choose one of .*vision/graph\.onnx"):
        graph_inputs(bundle / "tokenizer.json")
    with pytest.raises(StorageError):
        write_inputs([{"a": np.zeros(2)}], tmp_path / "none" / "inputs.json")
