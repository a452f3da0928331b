"""Frozen dataclasses to plain JSON values and back, with an error that names the place. Knows no bundle.

A class with `record_tag` stands for its subclasses: the tag names the class attribute that tells them apart. With
`sibling_tag` the tag is a field of the record around it instead, and what is None is left out. What a field may hold
beyond its type is said by a `Rule`: in the class attribute `field_rules`, or in a table by class and field.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from framefusion.console.plain_text import is_harmless
from framefusion.errors import FrameFusionError

Record = TypeVar("Record")
_WHITE = "\n\t\r"  # the control characters that text may hold


class RecordError(ValueError):
    """A JSON value that does not fit its dataclass; the message says where and what was expected."""


class Rule(NamedTuple):
    """What one field may hold beyond its type; lists and objects are held to it item by item.

    Attributes:
        least: smallest number.
        most: largest number.
        above: the smallest number itself is refused.
        items: most items of a list or object.
        characters: most characters of a text.
        pattern: what a text must match as a whole.
        is_name: a text, or the keys of an object, is the name of a file within the bundle.
        also: a number that is taken though it is out of range.
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    items: int = 4096
    characters: int = 1 << 16
    pattern: str | None = None
    is_name: bool = False
    also: int | None = None


Rules = Mapping[type, Mapping[str, Rule]]
_ANY = Rule()


def to_json(record: Any) -> Any:
    """A dataclass, or a container of them, as values that json.dumps takes."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        tag = getattr(record, "record_tag", None)
        tagged = {} if tag is None else {tag: getattr(record, tag)}
        values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        sparse = getattr(record, "sibling_tag", None) is not None
        return tagged | {name: to_json(value) for name, value in values.items() if value is not None or not sparse}
    if isinstance(record, Mapping):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [to_json(item) for item in record]
    return record


def from_json(kind: type[Record], value: Any, where: str = "", rules: Rules | None = None) -> Record:
    """Build the dataclass `kind` from a JSON object.

    Args:
        kind: the class.
        value: what a JSON parser gave.
        where: the place of the value, for messages.
        rules: what fields may hold; with them, keys that the class does not have are refused. Without, they are left
            alone: a newer writer of the same file may add some.

    Raises:
        RecordError: a key is missing, a value has another type, or a rule is broken.
    """
    return _Reader(rules).record(kind, value, where)


class _Reader:
    """Reads values under one table of rules."""

    def __init__(self, rules: Rules | None) -> None:
        self._rules = rules

    def record(self, kind: type[Record], value: Any, where: str) -> Record:
        """See `from_json`."""
        if not isinstance(value, Mapping):
            raise RecordError(f"{where or kind.__name__}: expected an object, found {ascii(value)[:60]}")
        kind = _by_tag(kind, value, where)
        fields = dataclasses.fields(cast(Any, kind))
        if self._rules is not None:
            known = {field.name for field in fields} | {getattr(kind, "record_tag", None)}
            unknown = [key for key in value if key not in known]
            if unknown:
                raise RecordError(f"{where}: {ascii(unknown[0])[:60]} is no key of it".lstrip(": "))
        hints = get_type_hints(kind)
        arguments = {}
        for field in fields:
            place = f"{where}.{field.name}".lstrip(".")
            if field.name in value:
                rule = self._rule(kind, field.name)
                hint = _by_sibling(hints[field.name], value, where)
                arguments[field.name] = self._convert(hint, value[field.name], place, rule)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise RecordError(f"{place} is missing")
        try:
            return kind(**arguments)
        except FrameFusionError as error:  # what a class itself has against its values is a fault of the file here
            raise RecordError(f"{where}: {error}".lstrip(": ")) from None

    def _rule(self, kind: type, name: str) -> Rule:
        """The rule of a field: of its class, or of a class that this one refines."""
        for base in kind.__mro__:
            rules = (self._rules or {}).get(base) or vars(base).get("field_rules", {})
            if name in rules:
                rule: Rule = rules[name]
                return rule
        return _ANY

    def _convert(self, hint: Any, value: Any, where: str, rule: Rule) -> Any:
        origin = get_origin(hint)
        parameters = get_args(hint)
        if hint is Any:
            return self._plain(value, where, rule)
        if origin in (Union, types.UnionType):
            if value is None:
                return None
            return self._convert(next(p for p in parameters if p is not type(None)), value, where, rule)
        if origin is Literal:
            fits = isinstance(value, str) and value in parameters
            return _expect(fits, value, f"one of {', '.join(map(str, parameters))}", where)
        if origin is tuple:
            _expect(isinstance(value, list), value, "a list", where)
            self._check_count(value, where, rule)
            return tuple(self._convert(parameters[0], item, f"{where}[{i}]", rule) for i, item in enumerate(value))
        if origin in (dict, Mapping) or hint is dict:
            _expect(isinstance(value, dict), value, "an object", where)
            return {
                key: self._convert(parameters[1], value[key], place, r)
                for key, place, r in self._keys(value, where, rule)
            }
        if dataclasses.is_dataclass(hint):
            return self.record(cast(Any, hint), value, where)
        if hint is float and type(value) is int:
            value = float(value)
        return self._check(_expect(type(value) is hint, value, hint.__name__, where), where, rule)

    def _keys(self, value: Mapping[str, Any], where: str, rule: Rule) -> list[tuple[str, str, Rule]]:
        """Keys of an object, their places for messages, and the rule of what stands there."""
        self._check_count(value, where, rule)
        for key in value:
            self._check(_expect(isinstance(key, str), key, "a text", where), f"{where}: key {ascii(key)[:60]}", rule)
        return [(key, f"{where}.{ascii(key)[:60]}", rule._replace(is_name=False, pattern=None)) for key in value]

    def _plain(self, value: Any, where: str, rule: Rule) -> Any:
        """A value of no declared type: JSON's own, with numbers and texts that the rule allows."""
        if self._rules is None or value is None or isinstance(value, bool):
            return value
        if isinstance(value, Mapping):
            return {key: self._plain(value[key], place, r) for key, place, r in self._keys(value, where, rule)}
        if isinstance(value, (list, tuple)):
            self._check_count(value, where, rule)
            return [self._plain(item, f"{where}[{i}]", rule) for i, item in enumerate(value)]
        return self._check(_expect(isinstance(value, (int, float, str)), value, "a value of JSON", where), where, rule)

    def _check_count(self, value: Any, where: str, rule: Rule) -> None:
        if self._rules is not None:
            _expect(len(value) <= rule.items, f"{len(value)} of them", f"at most {rule.items} items", where)

    def _check(self, value: Any, where: str, rule: Rule) -> Any:
        """A number or a text against a rule."""
        if self._rules is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            _check_text(value, where, rule)
        elif not _in_range(value, rule):
            least = f"more than {rule.least:g}" if rule.above else f"{rule.least:g} or more"
            raise RecordError(
                f"{where}: expected a number, {least} and at most {rule.most:g}, found {ascii(value)[:60]}"
            )
        return value


def _in_range(value: float, rule: Rule) -> bool:
    if rule.also is not None and value == rule.also:
        return True
    return math.isfinite(value) and rule.least <= value <= rule.most and not (rule.above and value == rule.least)


def _check_text(value: str, where: str, rule: Rule) -> None:
    """A text of bounded length that can be shown: terminals obey control characters, and readers what turns lines."""
    _expect(len(value) <= rule.characters, value, f"at most {rule.characters} characters", where)
    bad = next((c for c in value if c not in _WHITE and not is_harmless(c)), None)
    _expect(bad is None, bad, "text without control characters", where)
    if rule.pattern is not None:
        _expect(re.fullmatch(rule.pattern, value) is not None, value, f"text like {rule.pattern}", where)
    if rule.is_name:
        problem = name_problem(value)
        _expect(problem is None, value, f"the name of a file in the bundle ({problem})", where)


def name_problem(name: str) -> str | None:
    """What keeps a text from being the name of a file within a folder, None where nothing does."""
    parts = name.split("/")
    if not name or name.startswith("/"):
        return "it is empty or absolute"
    if any(part in ("", ".", "..") for part in parts):
        return "it has an empty part, . or .."
    if "\\" in name or re.match("[A-Za-z]:", name):
        return "it is a name of another system"
    if not all(map(is_harmless, name)) or any(len(part.encode("utf-8")) > 255 for part in parts) or len(name) > 1024:
        return "it has control characters or is too long"
    return None


def _by_tag(kind: type[Record], value: Mapping[str, Any], where: str) -> type[Record]:
    """The subclass that a tagged value is of; any other class is itself."""
    tag = getattr(kind, "record_tag", None)
    return kind if tag is None else _tagged(kind, tag, value, where)


def _by_sibling(hint: Any, siblings: Mapping[str, Any], where: str) -> Any:
    """The subclass that the record around a value names, where its class wants that; any other type is itself."""
    tag = getattr(hint, "sibling_tag", None)
    return hint if tag is None else _tagged(hint, tag, siblings, where)


def _tagged(kind: type[Record], tag: str, value: Mapping[str, Any], where: str) -> type[Record]:
    """The subclass of `kind` whose attribute `tag` is what `value` has under this name."""
    kinds: dict[str, type[Record]] = {}
    pending = [kind]
    while pending:
        subclass = pending.pop()
        pending += subclass.__subclasses__()
        if hasattr(subclass, tag):
            kinds[getattr(subclass, tag)] = subclass
    name = value.get(tag)
    fits = isinstance(name, str) and name in kinds
    return kinds[_expect(fits, name, f"one of {', '.join(kinds)}", f"{where}.{tag}")]


def _expect(fits: bool, value: Any, expected: str, where: str) -> Any:
    if not fits:
        raise RecordError(f"{where}: expected {expected}, found {ascii(value)[:60]}")
    return value
