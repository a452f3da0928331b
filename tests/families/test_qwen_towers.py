"""The towers of Qwen2.5-VL and Qwen3-VL at many sizes, in torch and compiled, against transformers' vision models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.hashed_file import HashedFile
from framefusion.export.checkpoints.tensors.weights import load_parameters, write_parameters
from framefusion.export.families.qwen2_5_vl import weights as qwen2_5_vl_tower
from framefusion.export.families.qwen3_vl import weights as qwen3_vl_tower
from framefusion.export.families.towers import TowerPlan
from framefusion.export.graphs.tracing.dialects import DIALECTS
from framefusion.export.graphs.tracing.trace import save_graph, trace
from framefusion.runtime.media.visual_input import Grid, Tiles
from tests.families.case import relative_error
from tests.families.qwen2_5_vl import Qwen25VLCase
from tests.families.qwen2_vl import Qwen2VLCase
from tests.families.qwen3_vl import Qwen3VLCase

Array = NDArray[Any]
LIMIT = 1e-5  # fp32 sums in another order; a token in a wrong window, or a wrong corner of the table, is off by 1e-2
# Windows of 2 x 2 merge blocks divide the first one; the others leave borders of one row, one column, or both.
GRIDS = [Grid(3, 8, 8), Grid(1, 4, 4), Grid(2, 6, 10), Grid(5, 2, 14), Grid(2, 12, 6), Grid(1, 2, 2), Grid(1, 10, 22)]
FAMILIES = [(Qwen25VLCase(), qwen2_5_vl_tower.tower), (Qwen3VLCase(), qwen3_vl_tower.tower)]


@dataclass
class Subject:
    checkpoint: Checkpoint
    plan: TowerPlan
    reference: Any  # transformers' vision model

    def inputs(self, grid: Grid) -> dict[str, Array]:
        values = np.random.default_rng(0).normal(size=(grid.frames, grid.height * grid.width, self.plan.patch_width))
        tiles = Tiles(values.astype(np.float32), grid)
        return {"patches": tiles.values, **self.plan.settings.call(tiles, self.plan.head_dim).inputs}

    @torch.inference_mode()
    def expected(self, patches: Array, grid: Grid) -> list[Array]:
        found = self.reference(torch.from_numpy(patches).flatten(0, 1), torch.tensor([grid]), return_dict=True)
        features = getattr(found, "deepstack_features", None)
        return [found.pooler_output.numpy()] + ([torch.stack(list(features)).numpy()] if features else [])


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family[0].family)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    case: Qwen2VLCase
    tower: Callable[[Checkpoint], TowerPlan]
    case, tower = request.param
    folder: Path = tmp_path_factory.mktemp(case.family)
    case.write(folder, "untied")
    checkpoint = Checkpoint(folder)
    return Subject(checkpoint, tower(checkpoint), case.reference(folder).model.model.visual)


def compare(found: list[Array], expected: list[Array]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < LIMIT


def test_torch_graphs_equal_transformers(subject: Subject) -> None:
    module = load_parameters(subject.plan.module, subject.checkpoint, subject.plan.sources, torch.float32)
    names = subject.plan.module.signature().inputs
    for grid in GRIDS:
        inputs = subject.inputs(grid)
        with torch.inference_mode():
            found = module(*(torch.from_numpy(inputs[name]) for name in names))
        outputs = [found] if isinstance(found, torch.Tensor) else list(found)
        compare([output.numpy() for output in outputs], subject.expected(inputs["patches"], grid))


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["gqa", "portable"])
def test_compiled_graphs_equal_transformers(subject: Subject, dialect: str, tmp_path: Path) -> None:
    """One graph for all sizes."""
    import onnxruntime

    plan = subject.plan
    with HashedFile(tmp_path / "weights.bin") as file:
        places = write_parameters(plan.module, subject.checkpoint, plan.sources, torch.float32, file)
    graph = trace(plan.module.to("meta"), DIALECTS[dialect]).model
    save_graph(graph, tmp_path / "graph.onnx", "weights.bin", places)
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    for grid in GRIDS:
        inputs = subject.inputs(grid)
        compare(session.run(None, inputs), subject.expected(inputs["patches"], grid))
