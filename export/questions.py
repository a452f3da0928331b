"""A file of questions, from Python. It is in export/evaluate/questions.py."""

from framefusion.export.evaluate.questions import (
    Question,
    read_questions,
)

__all__ = [
    "Question",
    "read_questions",
]
