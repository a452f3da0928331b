"""The page of a watched answer: one HTML file with everything in it. Knows the facts of `view.py`, runs no model."""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framefusion.errors import StorageError
from framefusion.storage import files

PARTS = Path(__file__).with_name("parts")
TEMPLATE = "page.html"
STYLE = "style.css"
SCRIPTS = ("kit.js", "player.js", "charts.js", "page.js")
"""In this order; together they are one script."""
_SEAL = "<!-- sha256 of all above: {} -->\n"  # a page that anybody edited is theirs
_LARGEST = 1 << 32  # bytes of a page


def page(facts: Mapping[str, Any]) -> str:
    """The page as text; it loads nothing from elsewhere."""
    payload = json.dumps(facts, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    payload = payload.replace("<", "\\u003c")  # no text of a user or a model may end the script
    places = {
        "style": _part(STYLE),
        "script": "".join(map(_part, SCRIPTS)),
        "name": html.escape(str(facts["name"])),
        "facts": payload,
    }
    # in one pass: a place that a name or an answer spells is not filled in
    content = re.sub(r"\{\{(\w+)\}\}", lambda place: places[place[1]], _part(TEMPLATE))
    return content + _seal(content.encode("utf-8"))


def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")


def check_writable(path: Path) -> Path:
    """The place of a page, refused before a model has worked for it where none can be written.

    Raises:
        StorageError: it is a link, a folder, a file that is no page of ours or was edited, or in no folder that can be
            written.
    """
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise StorageError(f"{path} cannot be written: give -o a file in a folder that exists, such as report.html")
    place = files.output_path(path)
    if os.path.lexists(place) and not is_page(place):
        raise StorageError(f"{path} exists and is no page of view, or was edited: choose another file with -o")
    return place


def is_page(path: Path) -> bool:
    """Whether a file is a page as this module wrote it, or empty: what a new one may replace."""
    try:
        content = files.read_file(path, _LARGEST)
    except OSError:
        return False
    length = len(_seal(b""))
    return not content or content[-length:] == _seal(content[:-length]).encode("ascii")


def write_page(facts: Mapping[str, Any], path: Path) -> int:
    """Write the page, in one step: an old one stays until the new one is complete. Its size in bytes.

    Raises:
        StorageError: it cannot be written there.
    """
    content = page(facts).encode("utf-8")
    place = check_writable(path)
    try:
        files.write_file(place, content)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}): free space or choose another file with -o"
        ) from None
    return len(content)


def _seal(content: bytes) -> str:
    """The last line of a page, from all bytes before it."""
    return _SEAL.format(hashlib.sha256(content).hexdigest())
