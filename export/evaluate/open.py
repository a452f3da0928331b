"""Opens what answers the questions of an evaluation: a bundle, a live model, or a checkpoint in eager torch.

Knows how each is loaded, not how it answers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from framefusion.errors import BackendError, EvaluationError
from framefusion.export.evaluate.answering import (
    EAGER,
    ONNXRUNTIME,
    TRANSFORMERS,
    Answerer,
    PipelineAnswerer,
    Setup,
    engine_of,
)
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint


def open_answerer(setup: Setup) -> Answerer:
    """Open what a setup names.

    Raises:
        FrameFusionError: a bundle or checkpoint that cannot be opened.
    """
    if setup.is_bundle:
        if setup.live is not None:
            raise EvaluationError(f"--live {setup.live} is for a checkpoint, {setup.model} is a bundle: leave it out")
        return PipelineAnswerer(Pipeline(Bundle(setup.model), threads=setup.threads), setup, engine_of(ONNXRUNTIME))
    import torch

    from framefusion.export.checkpoints.checkpoint import Checkpoint

    if setup.threads:
        torch.set_num_threads(setup.threads)
    checkpoint = Checkpoint.named(setup.model, setup.revision)
    note = None
    if setup.live != EAGER:
        from framefusion.export.evaluate.live_answering import TransformersAnswerer

        try:
            return TransformersAnswerer(checkpoint, setup)
        except BackendError as error:
            if setup.live == TRANSFORMERS:
                raise
            note = str(error)
    return _eager(checkpoint, setup, note)


def _eager(checkpoint: Checkpoint, setup: Setup, note: str | None) -> Answerer:
    from framefusion.export.eager.pipeline import eager_pipeline
    from framefusion.export.plan.build_plan import BuildPlan
    from framefusion.export.plan.stored_weights import eager_options

    parts = tempfile.TemporaryDirectory()  # stays as long as the answerer
    pipeline = eager_pipeline(BuildPlan(checkpoint, eager_options(checkpoint)), Path(parts.name) / "parts")
    answerer = PipelineAnswerer(pipeline, setup, engine_of(EAGER))
    answerer.parts = parts
    answerer.note = note
    return answerer
