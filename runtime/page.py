"""The page of a watched answer: one HTML file with everything in it. Knows the facts of `view.py`, runs no model."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framefusion.errors import StorageError

TEMPLATE = Path(__file__).with_name("page.html")


def page(facts: Mapping[str, Any]) -> str:
    """The page as text; it loads nothing from elsewhere."""
    told = json.dumps(facts, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    told = told.replace("<", "\\u003c")  # no text of a user or a model may end the script
    template = TEMPLATE.read_text(encoding="utf-8").replace("{{name}}", html.escape(str(facts["name"])))
    return template.replace("{{facts}}", told)  # last: what users and models say stays as it is


def check_writable(path: Path) -> None:
    """Refuse a place where no page can be written, before a model has worked for it.

    Raises:
        StorageError: it is a folder, or in none that can be written.
    """
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise StorageError(f"{path} cannot be written: give -o a file in a folder that exists, such as report.html")


def write_page(facts: Mapping[str, Any], path: Path) -> int:
    """Write the page; its size in bytes.

    Raises:
        StorageError: it cannot be written there.
    """
    content = page(facts).encode("utf-8")
    try:
        path.write_bytes(content)
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error}): free space or choose another file with -o") from error
    return len(content)
