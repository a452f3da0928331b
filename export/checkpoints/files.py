"""The files of a checkpoint folder as input from a stranger: regular ones, inside the folder, JSON within limits.

A link may lead to another file of the folder or into the store of the hub's cache (models--ORG--NAME/blobs), which is
how a snapshot is kept; any other would read, and publish, a file of this machine. Knows no model and no tensor.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from framefusion.errors import CheckpointError

LARGEST_JSON = 32_000_000
"""Bytes of a JSON file; the index of a model with 90,000 tensors has 9 MB."""
LARGEST_TOKENIZER = 256_000_000
"""Bytes of tokenizer.json; the largest published ones have 35 MB."""
DEEPEST_JSON = 64
_BLOB = re.compile(r"/models--[^/]+/blobs/[0-9a-f]{40}(?:[0-9a-f]{24})?$")
_POINTER = b"version https://git-lfs"
LFS = "is a pointer of Git LFS and no content: run git lfs pull in the folder, or download it with hf download"


def check_file(path: Path, root: Path) -> None:
    """Refuse a file that is none, or that lies elsewhere.

    Args:
        path: what will be opened.
        root: the folder of the checkpoint.

    Raises:
        CheckpointError: a link that leaves the folder or leads nowhere; a folder, pipe or device; no access.
    """
    try:
        target = path.resolve()
        mode = target.stat().st_mode
        inside = target.is_relative_to(root.resolve()) or _BLOB.search(target.as_posix())
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a circle of links, before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path} cannot be opened ({reason}): download it again") from None
    if not inside:
        raise CheckpointError(
            f"{path} is a link to {target}, which is outside the checkpoint: put the file itself there (cp -L)"
        )
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is no regular file: download it again")


def present(path: Path) -> bool:
    """Whether something has this name, a link that leads nowhere included."""
    try:
        path.lstat()
    except (OSError, ValueError):
        return False
    return True


def inner_name(name: object) -> bool:
    """Whether a name, as an index gives it, can only mean a file below the folder."""
    if not isinstance(name, str) or not name or not name.isprintable() or "\\" in name or len(name) > 1024:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and bool(path.name)


def read_json_file(path: Path, root: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: see `check_file`; it is too large, nests too deep, or is no object.
    """
    check_file(path, root)
    limit = LARGEST_TOKENIZER if path.name == "tokenizer.json" else LARGEST_JSON
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise CheckpointError(f"{path} has more than {limit} bytes: no checkpoint has such a file")
        if content.startswith(_POINTER):
            raise CheckpointError(f"{path} {LFS}")
        loaded = json.loads(content.decode("utf-8"))
        _check_depth(loaded)
    except RecursionError:
        raise CheckpointError(f"{path} nests deeper than {DEEPEST_JSON} levels: download it again") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): download it again") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected an object")
    return loaded


def is_pointer(path: Path) -> bool:
    """Whether a file is the text that Git LFS leaves where the content was not fetched."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _check_depth(value: object) -> None:
    """Raise RecursionError, as the parser does far beyond, for what nests deeper than DEEPEST_JSON."""
    level: list[Any] = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEEPEST_JSON + 1):
        inner: list[Any] = []
        for container in level:
            inner += container.values() if isinstance(container, dict) else container
        level = [item for item in inner if isinstance(item, (dict, list))]
        if not level:
            return
    raise RecursionError
