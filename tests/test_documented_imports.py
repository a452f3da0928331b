"""The Python that the pages show: every import in a code block of the README and of docs/ works as it stands there."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.wheel import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def imported_names(page: Path) -> set[tuple[str, str]]:
    """(module, name) of each `from framefusion... import name` of a page's Python blocks."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    return {
        (node.module or "", alias.name) for node in nodes for alias in node.names if "framefusion" in str(node.module)
    }


DOCUMENTED = sorted({imported for page in PAGES for imported in imported_names(page)})


def test_the_pages_show_imports() -> None:
    assert len(DOCUMENTED) >= 10


@pytest.mark.parametrize(("module", "name"), DOCUMENTED)
def test_a_documented_import_works(module: str, name: str) -> None:
    assert hasattr(import_module(module), name)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("framefusion.policy", "Reduction"),
        ("framefusion.policy", "ReductionState"),
        ("framefusion.tracks", "frame_numbers"),
        ("framefusion.reducers.reducer", "Reducer"),
        ("framefusion.runtime.sources", "video_of_frames"),
        ("framefusion.runtime.sources", "as_image"),
        ("framefusion.runtime.sources", "as_video"),
        ("framefusion.runtime.trust", "Trust"),
    ],
)
def test_what_the_pages_name_in_a_sentence_is_there(module: str, name: str) -> None:
    assert hasattr(import_module(module), name)
