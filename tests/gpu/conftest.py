"""Tests that need a GPU are skipped, with the reason, where there is none."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from framefusion.runtime.machine.gpu import find_gpu


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    if find_gpu() is None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU and driver on this machine"))
