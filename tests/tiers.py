"""Which cases of a parametrised test run before every commit, and which in CI alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def in_tiers(values: Sequence[Any], *, fast: int, several: bool = False) -> list[Any]:
    """The first `fast` values as they are, the others marked slow.

    Args:
        values: of a parameter.
        fast: how many run before every commit.
        several: a value is a tuple for several parameters.
    """
    rest = values[fast:] if several else [(value,) for value in values[fast:]]
    return [*values[:fast], *(pytest.param(*value, marks=pytest.mark.slow) for value in rest)]
