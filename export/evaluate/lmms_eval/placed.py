"""A live model of an evaluation on a device and in a type of its own, as one that runs on a GPU has to be.

No GPU was there to run it on: it was run on the CPU, in float32 and bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from framefusion.errors import EvaluationError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.evaluate.answering import TRANSFORMERS, Setup
from framefusion.export.evaluate.live_answering import TransformersAnswerer
from framefusion.export.evaluate.questions import Question

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PlacedAnswerer(TransformersAnswerer):
    """transformers' own model on a device, in a type.

    Raises:
        EvaluationError: a bundle, eager torch, an unknown type or device.
    """

    def __init__(self, setup: Setup, device: str, dtype: str) -> None:
        if setup.is_bundle or setup.live not in (None, TRANSFORMERS):
            raise EvaluationError(f"device={device} and dtype={dtype} are for a live checkpoint: leave them out")
        if dtype not in DTYPES:
            raise EvaluationError(f"dtype={dtype} is unknown: known are {', '.join(DTYPES)}")
        super().__init__(Checkpoint.named(setup.model, setup.revision), setup)
        try:
            self.model.to(device=device, dtype=DTYPES[dtype])
        except (RuntimeError, AssertionError) as error:  # torch: no such device, or built without it
            raise EvaluationError(f"device={device} cannot be had: {str(error).splitlines()[0]}") from None
        self.engine = f"{self.engine} on {device} in {dtype}"

    def inputs(self, question: Question) -> Mapping[str, Any]:
        """See `TransformersAnswerer.inputs`."""
        inputs: Any = super().inputs(question)
        placed: Mapping[str, Any] = inputs.to(self.model.device, dtype=self.model.dtype)
        return placed
