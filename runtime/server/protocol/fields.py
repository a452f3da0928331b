"""Fields of a client's JSON, read one by one: what is known is checked, what is left over is listed and not refused.

Clients of OpenAI's protocol send fields of many servers; a server that refused them would serve few. A known field with
a value that means nothing here is refused, for nothing may be passed over that changes an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from framefusion.errors import RequestError

_SHOWN = 80  # characters of a value in a message


class Fields:
    """The fields of one JSON object.

    Args:
        values: the object.
        place: what messages call it, "" for the body.

    Raises:
        RequestError: it is no object.
    """

    def __init__(self, values: object, place: str = "") -> None:
        if not isinstance(values, Mapping):
            raise RequestError(f"{place or 'the body'} is {shown(values)}: give a JSON object", param=place or None)
        self._values: dict[str, Any] = dict(values)
        self._place = place

    def name(self, field: str) -> str:
        """What a message calls a field: messages[0].content."""
        return f"{self._place}.{field}" if self._place else field

    def __contains__(self, field: str) -> bool:
        return self._values.get(field) is not None

    def take(self, field: str) -> Any:
        """The value of a field, None where it is absent or null; it is known from now on."""
        return self._values.pop(field, None)

    def refuse(self, field: str, problem: str) -> RequestError:
        """The error about a field's value."""
        return RequestError(f"{self.name(field)} {problem}", param=self.name(field))

    def text(self, field: str, *, most: int | None = None) -> str | None:
        """A string.

        Raises:
            RequestError: it is none, or longer than `most` characters.
        """
        value = self.take(field)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.refuse(field, f"is {shown(value)}: give a string")
        if most is not None and len(value) > most:
            raise self.refuse(field, f"has {len(value)} characters, at most {most} are taken: give a shorter one")
        return value

    def flag(self, field: str, default: bool = False) -> bool:
        """True or false.

        Raises:
            RequestError: it is neither.
        """
        value = self.take(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(field, f"is {shown(value)}: give true or false")
        return value

    def whole(self, field: str, low: int, high: int) -> int | None:
        """A whole number from `low` to `high`.

        Raises:
            RequestError: it is none.
        """
        value = self.take(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(field, f"is {shown(value)}: give a whole number from {low} to {high}")
        return value

    def number(self, field: str, low: float, high: float, *, above: bool = False) -> float | None:
        """A number from `low` to `high`; `above` shuts out `low` itself.

        Raises:
            RequestError: it is none.
        """
        value = self.take(field)
        if value is None:
            return None
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not low <= value <= high or (above and value == low):
            begin = f"above {low:g} and at most" if above else f"from {low:g} to"
            raise self.refuse(field, f"is {shown(value)}: give a number {begin} {high:g}")
        return float(value)

    def inner(self, field: str) -> Fields | None:
        """An object in a field.

        Raises:
            RequestError: it is none.
        """
        value = self.take(field)
        return None if value is None else Fields(value, self.name(field))

    def only(self, field: str, *allowed: object, because: str) -> None:
        """Take a field that may have these values alone: others would ask for what is not done here.

        Raises:
            RequestError: it has another.
        """
        value = self.take(field)
        if value is None or any(value == choice and type(value) is type(choice) for choice in allowed):
            return
        raise self.refuse(field, f"is {shown(value)}: {because}")

    @property
    def unknown(self) -> list[str]:
        """Names of the fields that nobody took; those that are null ask for nothing."""
        return [self.name(field) for field, value in self._values.items() if value is not None]


def shown(value: object) -> str:
    """A value as a message shows it."""
    try:
        text = repr(value[: _SHOWN + 1] if isinstance(value, str) else value)
    except RecursionError:  # lists in lists, as deep as a body may have them
        text = f"a {type(value).__name__} of great depth"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def printable(name: str) -> str:
    """A name of a client's as a message or a log shows it: in one line, and of characters that can be encoded."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name[: 2 * _SHOWN])
