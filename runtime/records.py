"""Frozen dataclasses to plain JSON values and back, with an error that names the place. Knows no bundle.

A class with `record_tag` stands for its subclasses: the tag names the class attribute that tells them apart.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


class RecordError(ValueError):
    """A JSON value that does not fit its dataclass; the message says where and what was expected."""


def to_json(record: Any) -> Any:
    """A dataclass, or a container of them, as values that json.dumps takes."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        tag = getattr(record, "record_tag", None)
        tagged = {} if tag is None else {tag: getattr(record, tag)}
        return tagged | {field.name: to_json(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, Mapping):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [to_json(item) for item in record]
    return record


def from_json(kind: type[Record], value: Any, where: str = "") -> Record:
    """Build the dataclass `kind` from a JSON object.

    Unknown keys are left alone: a newer writer of the same schema may add some.

    Raises:
        RecordError: a key is missing or a value has another type.
    """
    if not isinstance(value, Mapping):
        raise RecordError(f"{where or kind.__name__}: expected an object, found {value!r:.60}")
    kind = _told_apart(kind, value, where)
    hints = get_type_hints(kind)
    arguments = {}
    for field in dataclasses.fields(cast(Any, kind)):
        place = f"{where}.{field.name}".lstrip(".")
        if field.name in value:
            arguments[field.name] = _convert(hints[field.name], value[field.name], place)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecordError(f"{place} is missing")
    return kind(**arguments)


def _told_apart(kind: type[Record], value: Mapping[str, Any], where: str) -> type[Record]:
    """The subclass that a tagged value is of; any other class is itself."""
    tag = getattr(kind, "record_tag", None)
    if tag is None:
        return kind
    kinds: dict[str, type[Record]] = {}
    pending = [kind]
    while pending:
        one = pending.pop()
        pending += one.__subclasses__()
        if hasattr(one, tag):
            kinds[getattr(one, tag)] = one
    return kinds[_expect(value.get(tag) in kinds, value.get(tag), f"one of {', '.join(kinds)}", f"{where}.{tag}")]


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, parameters = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(p for p in parameters if p is not type(None)), value, where)
    if origin is Literal:
        return _expect(value in parameters, value, f"one of {', '.join(map(str, parameters))}", where)
    if origin is tuple:
        _expect(isinstance(value, list), value, "a list", where)
        return tuple(_convert(parameters[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping) or hint is dict:
        _expect(isinstance(value, dict), value, "an object", where)
        return {key: _convert(parameters[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_json(cast(Any, hint), value, where)
    if hint is float and type(value) is int:
        return float(value)
    return _expect(type(value) is hint, value, hint.__name__, where)


def _expect(fits: bool, value: Any, expected: str, where: str) -> Any:
    if not fits:
        raise RecordError(f"{where}: expected {expected}, found {value!r:.60}")
    return value
