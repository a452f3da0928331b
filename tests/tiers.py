"""Which cases of a parametrised test run before every commit, and which in CI alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def in_tiers(values: Sequence[Any], *, fast: int) -> list[Any]:
    """The first `fast` values as they are, the others marked slow."""
    return [*values[:fast], *(pytest.param(value, marks=pytest.mark.slow) for value in values[fast:])]
