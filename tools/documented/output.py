"""Whether a command printed what its page shows.

A page shortens: of what a command prints, it shows some lines, in their order. White space is one blank, so that tables
may be as wide as they like. A whole number is compared as it stands; one with a fraction or exponent, and one before a
unit of time or size, is the machine's and may be any. A line `...` stands for any lines and is not compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_ANY = r"-?\d[\d.,]*(?:e[-+]?\d+)?"
_UNIT = r"(?:B|kB|MB|GB|s|ms|seconds?|minutes?|tokens/s)\b"
_LOOSE = re.compile(rf"(?<![\w.])-?\d+(?:\.\d[\d.]*(?:e[-+]?\d+)?|e[-+]?\d+|(?= {_UNIT}))")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def missing_line(shown: Sequence[str], printed: str) -> str | None:
    """The first line shown that was not printed behind the ones before it; None where all were."""
    text = " ".join(_ESCAPES.sub("", printed).split())
    start = 0
    for line in shown:
        if line.strip() == "...":
            continue
        found = _pattern(line).search(text, start)
        if found is None:
            return line
        start = found.end()
    return None


def _pattern(line: str) -> re.Pattern[str]:
    """A line as a regular expression: figures of the machine may be any."""
    text = " ".join(line.split())
    parts = []
    end = 0
    for figure in _LOOSE.finditer(text):
        parts.append(re.escape(text[end : figure.start()]))
        end = figure.end()
    parts.append(re.escape(text[end:]))
    return re.compile(r"(?<!\w)" + _ANY.join(parts) + r"(?!\w)")
