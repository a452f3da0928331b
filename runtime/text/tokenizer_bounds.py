"""Limits of a tokenizer.json from somebody else: its size, and how much a text may grow while it is read and written.

Knows the format of the `tokenizers` package, no token. Patterns need no limit here: that package's regular expressions
give up after ten million steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

MAX_BYTES = 64 << 20  # the largest ones in use have 33 MB (Gemma 3, 262,144 tokens)
MAX_GROWTH = 64.0  # times that a text may grow; a space written as U+2581 is three bytes for one
MAX_WRITTEN = 1 << 16  # characters that all steps may write by themselves


class TokenizerLimitError(ValueError):
    """A tokenizer.json that would take too much memory."""


def raised_by_tokenizers(error: BaseException) -> bool:
    """Whether `tokenizers` may have raised it: plain Exception, or a BaseException of pyo3 where its Rust panics."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def check_size(size: int) -> None:
    """Refuse a file that no tokenizer in use comes near.

    Raises:
        TokenizerLimitError: it has more than `MAX_BYTES`.
    """
    if size > MAX_BYTES:
        raise TokenizerLimitError(f"it has {size} bytes, the limit is {MAX_BYTES}")


def check_growth(backend: Any) -> None:
    """Refuse a `tokenizers.Tokenizer` whose steps multiply a text.

    Raises:
        TokenizerLimitError: all steps together may make it more than `MAX_GROWTH` times as long, or write more than
            `MAX_WRITTEN` characters by themselves.
    """
    for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
        if part is None:
            continue
        growth = 1.0
        written = 0
        for step in _steps(json.loads(part.__getstate__())):
            content = str(step.get("content") or step.get("prepend") or step.get("replacement") or "")
            written += len(content)
            if step.get("type") == "Replace":
                growth *= max(len(content) / _shortest(step.get("pattern")), 1.0)
        if growth > MAX_GROWTH or written > MAX_WRITTEN:
            raise TokenizerLimitError(
                f"its replacements make a text up to {growth:.3g} times as long and write {written} characters, the "
                f"limits are {MAX_GROWTH:g} and {MAX_WRITTEN}"
            )


def _steps(component: Any) -> Iterator[Mapping[str, Any]]:
    """A component and all that it is composed of."""
    if isinstance(component, list):
        for part in component:
            yield from _steps(part)
    elif isinstance(component, dict):
        yield component
        for part in component.values():
            yield from _steps(part)


def _shortest(pattern: Any) -> int:
    """Characters that a match has at least; a regular expression may match a single one."""
    text = pattern.get("String") if isinstance(pattern, dict) else None
    return max(len(text), 1) if isinstance(text, str) else 1
