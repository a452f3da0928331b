"""The table of reducers: the methods of the box by name, and those that installed packages add.

A package adds one by an entry point of the group "framefusion.reducers" whose name is the reducer's and whose value is
a subclass of `Reducer`. Nothing is imported before it is asked for. Knows no method.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from framefusion.errors import ReducerError
from framefusion.reducers.reducer import Reducer
from framefusion.storage.entry_points import load_named, names, origin, package

GROUP = "framefusion.reducers"
WHAT = "reducer"
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
    return (*REDUCERS, *(name for name in names(GROUP) if name not in REDUCERS))


def load_reducer(name: str) -> Reducer:
    """The reducer of a name.

    Raises:
        ReducerError: no such reducer, two packages that claim the name, or a package whose reducer cannot be loaded.
    """
    if name in REDUCERS:
        module, _, attribute = REDUCERS[name].partition(":")
        reducer: Reducer = getattr(import_module(module), attribute)()
        return reducer
    loaded = load_named(GROUP, name, WHAT, ReducerError)
    if loaded is None:
        raise ReducerError(
            f"reducer {name!r} is unknown; known are {', '.join(reducer_names())}: take one of them, or install the "
            "package that brings it"
        )
    return _installed(name, loaded)


def reducer_facts() -> list[dict[str, Any]]:
    """The declarations of each reducer as plain values: name, paper, merges, query_agnostic, static, inputs, origin.

    "origin" is "the box" for the reducers of this package, else the package it comes from.

    Raises:
        ReducerError: a package's reducer cannot be loaded.
    """
    facts = []
    for name in reducer_names():
        reducer = load_reducer(name)
        source = "the box" if name in REDUCERS else package(GROUP, name)
        declared = {field: getattr(reducer, field) for field in ("name", "paper", "merges", "query_agnostic", "static")}
        facts.append(declared | {"inputs": sorted(reducer.inputs), "origin": source})
    return facts


def _installed(name: str, reducer_class: Any) -> Reducer:
    """The reducer of a package's class."""
    where = origin(GROUP, name, WHAT)
    try:
        reducer = reducer_class()
    except Exception as error:  # whatever another package's code may raise
        raise ReducerError(
            f"{where} cannot be loaded ({type(error).__name__}: {error}): repair or uninstall it"
        ) from error
    if not isinstance(reducer, Reducer):
        given = type(reducer).__name__
        raise ReducerError(f"{where} gives a {given}: name a subclass of {Reducer.__module__}.Reducer")
    if reducer.name != name:
        raise ReducerError(f"{where} calls itself {reducer.name!r}: give class and entry point the same name")
    return reducer
