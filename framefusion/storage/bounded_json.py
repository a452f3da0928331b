"""JSON of unknown origin: bounded in bytes and depth before it is parsed, without what JSON does not have.

Python's parser takes any size, recurses as deep as a text nests, keeps the last of equal keys and reads NaN. A text
that needs any of that is refused here. Knows no format that is written in JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

MOST_BYTES = 1 << 26
MOST_DEPTH = 64
_LARGEST = 1 << 63  # integers of all formats read here are of 64 bits
_SHIFTS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)  # a string that never ends is one, too


class JsonError(ValueError):
    """A text that is no JSON, or more of it than is read; the message says what and the limit."""


def parse_json(content: bytes, *, most_bytes: int = MOST_BYTES, most_depth: int = MOST_DEPTH) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        JsonError: the text is too long or too deep, is no JSON, or holds NaN, an infinite number, an integer beyond 64
            bits, two equal keys, or half of a surrogate pair.
    """
    if len(content) > most_bytes:
        raise JsonError(f"{len(content)} bytes of JSON, the limit is {most_bytes}")
    if _is_deeper(content, most_depth):
        raise JsonError(f"JSON of more than {most_depth} levels, which is the limit")
    try:
        text = content.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_number
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a pair cannot be written anywhere
    except UnicodeEncodeError:
        raise JsonError("a text holds half of a surrogate pair") from None
    except ValueError as error:
        raise JsonError(str(error)) from None
    return value


def _is_deeper(content: bytes, most: int) -> bool:
    """Whether objects and lists nest deeper than so many levels, in time linear in the text."""
    depth = 0
    for match in _SHIFTS.finditer(content):
        first = match[0][:1]
        if first in b"[{":
            depth += 1
            if depth > most:
                return True
        elif first in b"]}":
            depth -= 1
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise JsonError(f"key {twice!r:.60} stands twice in one object")
    return members


def _constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is no number of JSON")


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) <= len(str(-_LARGEST)) else _LARGEST
    if not -_LARGEST <= value < _LARGEST:
        raise JsonError(f"{digits:.30} is beyond 64 bits")
    return value


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError(f"{digits:.30} is beyond a double")
    return value
