"""What older versions of a reference cannot tell: tests that compare with it skip there, and say why.

The lower bounds of pyproject.toml hold for the project, not for every class of transformers that a test compares with:
rules of its processors have changed since, and ours follow the newest.
"""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version

from framefusion.runtime.backends.onnxruntime.fit import PORTABLE_SINCE


def needs(package: str, least: str, reason: str) -> pytest.MarkDecorator:
    """Skip where an older version of a package is installed."""
    installed = version(package)
    return pytest.mark.skipif(Version(installed) < Version(least), reason=f"{package} {installed} < {least}: {reason}")


PORTABLE = ".".join(map(str, PORTABLE_SINCE["cpu"]))
needs_portable = needs("onnxruntime", PORTABLE, "its attention of the portable dialect is wrong or lacking")
