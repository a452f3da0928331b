"""Names of transformers that the live model leans on, in one place.

A name that moved is looked up under each of its spellings, by what is passed and not by the version installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""The KV cache among the arguments of a model, a decoder, a layer: since transformers 5.24, and before."""


def cache_of(given: Mapping[str, Any]) -> Any:
    """The KV cache among keyword arguments, under whichever name; None without one."""
    return next((given[name] for name in CACHE_ARGUMENTS if given.get(name) is not None), None)
