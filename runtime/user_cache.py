"""Where this user keeps what can be made again: $XDG_CACHE_HOME, else ~/.cache. Knows no content."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """The folder of one kind of content; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "framefusion-aot" / name
