"""How this package is installed here, and so which command adds one of its extras. Knows no extra.

What pip, uv and their like write beside an installed package, direct_url.json (PEP 610), says where it came from; from
an index comes none.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "framefusion-aot"


def install_command(extra: str, *, upgrade: bool = False) -> str:
    """The pip command that installs an extra of this package, from where the package itself was installed.

    Args:
        extra: its name, or several: "export,signing".
        upgrade: also what is installed of it and too old.
    """
    return f"pip install {'-U ' * upgrade}{_requirement(extra, _origin())}"


def _origin() -> Mapping[str, Any]:
    """The record of where this package came from; {} for an index, a folder where it was not installed at all."""
    from importlib.metadata import PackageNotFoundError, distribution  # both are slow to import, and for errors alone

    try:
        text = distribution(NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        return {"url": Path(__file__).resolve().parents[1].as_uri(), "dir_info": {"editable": True}}
    try:
        record = json.loads(text or "{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("url"), str) else {}


def _requirement(extra: str, origin: Mapping[str, Any]) -> str:
    """What pip is to be given, quoted for a shell."""
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    named = f"{NAME}[{extra}]"
    if not origin:
        return shlex.quote(named)
    url = origin["url"]
    parts = urlsplit(url)
    vcs = origin.get("vcs_info")
    if parts.scheme != "file":
        source = url
        if isinstance(vcs, dict):
            commit = f"@{vcs['commit_id']}" if vcs.get("commit_id") else ""
            source = f"{vcs.get('vcs', 'git')}+{url}{commit}"
        return shlex.quote(f"{named} @ {source}{_subfolder(origin)}")
    path = url2pathname(parts.path)
    if not os.path.exists(path):  # a clone or a wheel that is gone
        if "archive_info" not in origin:
            return f"{shlex.quote(f'.[{extra}]')} in a clone of its repository"
        return f"{shlex.quote(f'{Path(path).name}[{extra}]')} where that wheel is"
    editable = isinstance(origin.get("dir_info"), dict) and origin["dir_info"].get("editable", False)
    return f"{'-e ' * bool(editable)}{shlex.quote(f'{path}[{extra}]')}"


def _subfolder(origin: Mapping[str, Any]) -> str:
    folder = origin.get("subdirectory")
    return f"#subdirectory={folder}" if folder else ""
