"""The environment of `make test-runtime`: the tests of this folder run as on a machine that only runs bundles."""

from __future__ import annotations

import importlib
import os

import pytest

from tests.wheel import NEVER_AT_RUN_TIME


@pytest.mark.skipif("BUNDLES" not in os.environ, reason="`make test-runtime` runs it: here bundles may be made")
@pytest.mark.parametrize("name", sorted(NEVER_AT_RUN_TIME))
def test_what_the_toolchain_needs_cannot_be_imported(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
        importlib.import_module(name)
