"""A pipeline over a family's torch graphs: a bundle whose graphs were never traced, and a backend that needs none."""

from __future__ import annotations

from pathlib import Path

import pytest

from framefusion.export import build
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.backend import EagerBackend
from framefusion.export.eager.pipeline import eager_loaders
from framefusion.export.options import BuildOptions
from framefusion.export.plan import build_plan as plan
from framefusion.export.writing import parts
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.pipeline import Pipeline


def eager_pipeline(folder: Path, bundle: Path, options: BuildOptions) -> Pipeline:
    """The torch graphs of a checkpoint under the runtime's own pipeline.

    Args:
        folder: the checkpoint.
        bundle: where to put what is no graph; must not exist.
        options: of the build.
    """
    checkpoint = Checkpoint(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "trace_graph", lambda *_: None)
        patch.setattr(parts, "save_graph", lambda _model, path, *_: path.write_bytes(b"graph"))
        built = build.build(checkpoint, bundle, options, verify=False)
    return Pipeline(Bundle(built.folder), EagerBackend(eager_loaders(plan.BuildPlan(checkpoint, options))))
