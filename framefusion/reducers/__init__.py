"""The table of reducers: the methods of the box by name, and those that installed packages add.

A package adds one by an entry point of the group "framefusion.reducers" whose name is the reducer's and whose value is
a subclass of `Reducer`. Nothing is imported before it is asked for. Knows no method.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from framefusion.errors import ReducerError
from framefusion.reducers.reducer import Reducer

GROUP = "framefusion.reducers"
DEFAULT = "framefusion"

REDUCERS: Mapping[str, str] = {
    "framefusion": "framefusion.reducers.framefusion:FrameFusion",
    "none": "framefusion.reducers.baselines:KeepAll",
    "random": "framefusion.reducers.baselines:RandomTokens",
    "uniform": "framefusion.reducers.baselines:UniformFrames",
    "fastv": "framefusion.reducers.fastv:FastV",
    "evs": "framefusion.reducers.evs:EVS",
    "vidcom2": "framefusion.reducers.vidcom2:VidCom2",
}
"""Name -> "module:Class". A name of this table cannot be taken by a package."""


def reducer_names() -> tuple[str, ...]:
    """Names of all reducers: the box's in the order of the table, then those of installed packages by name."""
    return (*REDUCERS, *sorted({point.name for point in entry_points(group=GROUP)} - set(REDUCERS)))


def load_reducer(name: str) -> Reducer:
    """The reducer of a name.

    Raises:
        ReducerError: no such reducer, two packages that claim the name, or a package whose reducer cannot be loaded.
    """
    if name in REDUCERS:
        module, _, attribute = REDUCERS[name].partition(":")
        reducer: Reducer = getattr(import_module(module), attribute)()
        return reducer
    points = tuple(entry_points(group=GROUP, name=name))
    if not points:
        raise ReducerError(
            f"reducer {name!r} is unknown; known are {', '.join(reducer_names())}: take one of them, or install the "
            "package that brings it"
        )
    if len({point.value for point in points}) > 1:
        raise ReducerError(
            f"reducer {name!r} is claimed by {' and '.join(sorted(map(_distribution, points)))}: uninstall all but one"
        )
    return _loaded(points[0])


def reducer_facts() -> list[dict[str, Any]]:
    """The declarations of each reducer as plain values: name, paper, merges, query_agnostic, static, inputs, origin.

    "origin" is "the box" for the reducers of this package, else the package it comes from.

    Raises:
        ReducerError: a package's reducer cannot be loaded.
    """
    facts = []
    for name in reducer_names():
        reducer = load_reducer(name)
        origin = "the box" if name in REDUCERS else _distribution(next(iter(entry_points(group=GROUP, name=name))))
        declared = {field: getattr(reducer, field) for field in ("name", "paper", "merges", "query_agnostic", "static")}
        facts.append(declared | {"inputs": sorted(reducer.inputs), "origin": origin})
    return facts


def _loaded(point: EntryPoint) -> Reducer:
    origin = f"reducer {point.name!r} of {_distribution(point)} ({point.value})"
    try:
        reducer = point.load()()
    except Exception as error:  # whatever another package's import may raise
        raise ReducerError(
            f"{origin} cannot be loaded ({type(error).__name__}: {error}): repair or uninstall it"
        ) from error
    if not isinstance(reducer, Reducer):
        given = type(reducer).__name__
        raise ReducerError(f"{origin} gives a {given}: name a subclass of {Reducer.__module__}.Reducer")
    if reducer.name != point.name:
        raise ReducerError(f"{origin} calls itself {reducer.name!r}: give class and entry point the same name")
    return reducer


def _distribution(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
