"""Where there is no torch, the mistakes of an eager model cannot be made: `make test` makes them."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("torch") else ["test_blocks.py"]
