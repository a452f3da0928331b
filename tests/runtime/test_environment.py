"""Two environments: `make test-runtime` is a machine that only runs bundles, `make test` skips for want of nothing."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, version

import pytest

from tests.wheel import NEVER_AT_RUN_TIME

WITHOUT_TOOLCHAIN = "BUNDLES" in os.environ


@pytest.mark.skipif(not WITHOUT_TOOLCHAIN, reason="`make test-runtime` runs it: here bundles may be made")
@pytest.mark.parametrize("name", sorted(NEVER_AT_RUN_TIME))
def test_what_the_toolchain_needs_cannot_be_imported(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
        importlib.import_module(name)


@pytest.mark.skipif(WITHOUT_TOOLCHAIN, reason="`make test` runs it: here tests that need the toolchain are skipped")
def test_no_test_is_skipped_for_want_of_a_package_of_the_extra_dev() -> None:
    from tools.lock import requirements  # of Python 3.11, as the toolchain is

    missing = []
    for requirement in requirements("dev"):
        if requirement.marker is None or requirement.marker.evaluate():
            try:
                version(requirement.name)
            except PackageNotFoundError:
                missing.append(requirement.name)
    assert missing == [], "pip install -e '.[dev]'"
