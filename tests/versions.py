"""What is not installed, or is older than what a test compares with: such tests skip there by name, and say why.

The lower bounds of pyproject.toml hold for the project, not for every class of transformers that a test compares with:
rules of its processors have changed since, and ours follow the newest. tests/runtime also runs without torch and the
libraries of the toolchain (`make test-runtime`): a test there that takes one of them as its reference needs it by name.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.version import Version

from framefusion.runtime.backends.onnxruntime.fit import INT8_CACHES_SINCE, PORTABLE_SINCE


def needs(package: str, least: str, reason: str) -> pytest.MarkDecorator:
    """Skip where a package is not installed, or an older version of it."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        return pytest.mark.skipif(True, reason=f"{package} is not installed: {reason}")
    return pytest.mark.skipif(Version(installed) < Version(least), reason=f"{package} {installed} < {least}: {reason}")


PORTABLE = ".".join(map(str, PORTABLE_SINCE["cpu"]))
needs_portable = needs("onnxruntime", PORTABLE, "its attention of the portable dialect is wrong or lacking")
INT8_CACHES = ".".join(map(str, INT8_CACHES_SINCE))
needs_int8_caches = needs("onnxruntime", INT8_CACHES, "its attention takes no caches in int8")
needs_torch = needs("torch", "0", "the reference that this test compares with, or what it builds with")
needs_transformers = needs("transformers", "0", "the reference that this test compares with")
