"""Evaluation from Python. The main path is in export/evaluate/evaluation.py."""

from framefusion.export.evaluate.evaluation import (
    conditions,
    evaluate,
    render,
    report,
)

__all__ = [
    "conditions",
    "evaluate",
    "render",
    "report",
]
