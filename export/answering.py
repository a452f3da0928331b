"""What answers the questions of an evaluation, from Python. It is in export/evaluate/answering.py."""

from framefusion.export.evaluate.answering import (
    Answer,
    Answerer,
    Condition,
    Setup,
)
from framefusion.export.evaluate.open import open_answerer

__all__ = [
    "Answer",
    "Answerer",
    "Condition",
    "Setup",
    "open_answerer",
]
