"""What belongs to the forward that a thread is in: context variables, so that threads and tasks do not mix.

The hooks of handle.py set them, and importance.py reads the call. Knows what they hold, not what becomes of it.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

import torch

from framefusion.live.call import Call
from framefusion.live.labels import MultimodalInputs
from framefusion.reduction.tracks import IntArray


@dataclass(frozen=True)
class GivenLabels:
    """Labels of the user's own, for the prompts of one model.

    Attributes:
        owner: `model.framefusion` of that model.
        labels: of whole prompts; text behind them.  [B, S]
    """

    owner: object
    labels: IntArray


CALL: ContextVar[Call | None] = ContextVar("framefusion_call", default=None)
"""The forward of the decoder, if it reduces or reads what was reduced."""

INPUTS: ContextVar[MultimodalInputs | None] = ContextVar("framefusion_inputs", default=None)
"""What the multimodal model around the decoder was called with."""

LABELS: ContextVar[GivenLabels | None] = ContextVar("framefusion_labels", default=None)
"""Labels in place of those read from input_ids."""

BEGUN: ContextVar[bool | None] = ContextVar("framefusion_begun", default=None)
"""Whether the decoder has begun within the model's forward; None where nothing waits for it."""


def current_call() -> Call | None:
    """The call that this thread is in; None in a compiled step, where nothing is reduced."""
    return None if torch.compiler.is_compiling() else CALL.get()


def current_call_of(owner: object) -> Call | None:
    """The same, None where it is the call of another model's hooks."""
    call = current_call()
    return call if call is not None and call.context.owner is owner else None
