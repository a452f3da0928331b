"""The tables of docs/films.md: what overlapping gains, in Python and in a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tools.quantized_tables import table

WAYS = ("one_after_the_other", "overlapped")
HEAD = (
    "an operator takes",
    "by default",
    "one after the other s",
    "overlapped s",
    "speed-up",
    "processor time",
    "one film: decoding s",
    "tower s",
)


def overlap(result: dict[str, Any], machine: str) -> str:
    """Films of one request, decoded while the tower has what is there, beside one after the other.

    Args:
        result: of the benchmark.
        machine: on which it was taken.
    """
    long = result.get("long_film")
    films = []
    if "speed_up" in next(iter(result["results"].values())):
        films.append(f"{result['films']} films of {result['film_size']}")
    if long:
        films.append(f"in a server one of {result['film_size']}, {long['seconds']} s, {long['pictures']} pictures")
    return (
        f"Files to rows: {'; '.join(films)}. In turn: medians / minima of {result['rounds']} rounds "
        f"(`{result['command']}`; {machine}).\n\n{table(HEAD, list(_rows(result)))}"
    )


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One of each way to compute the tower, in Python and in a server, where it was measured."""
    for name, row in result["results"].items():
        alone = tuple(f"{row['one_film_alone'][stage]['min_s']:.2f}" for stage in ("video", "vision"))
        if "speed_up" in row:
            yield (name, row["default"], *_both_ways(row), *alone)
        if "server" in row:
            yield (f"{name}, server", row["default"], *_both_ways(row["server"]), "-", "-")


def _both_ways(both: dict[str, Any]) -> tuple[str, ...]:
    times = (f"{both[way]['median_s']:.2f} / {both[way]['min_s']:.2f}" for way in WAYS)
    gain = f"{both['speed_up']:.2f}x / {both['speed_up_of_minima']:.2f}x"
    return (*times, gain, f"{both['cpu_seconds_ratio']:.2f}")
