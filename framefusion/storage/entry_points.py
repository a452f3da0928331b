"""What installed packages add to a table of the box, by an entry point each: found by name, loaded when asked for.

Every failure is one of the package and says its name and version. Knows no table.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from framefusion.errors import FrameFusionError


def load_named(group: str, name: str, what: str, error: type[FrameFusionError]) -> Any:
    """What the entry point of a name stands for; None where no package has this name.

    Args:
        group: of entry points.
        name: of the entry point.
        what: the thing is, for messages.
        error: to raise.

    Raises:
        FrameFusionError: `error`: two packages claim the name, or the package cannot be loaded.
    """
    points = tuple(entry_points(group=group, name=name))
    if not points:
        return None
    if len({point.value for point in points}) > 1:
        claims = " and ".join(sorted(map(_distribution, points)))
        raise error(f"{what} {name!r} is claimed by {claims}: uninstall all but one")
    try:
        return points[0].load()
    except Exception as failure:  # whatever another package's import may raise
        reason = f"{type(failure).__name__}: {failure}"
        raise error(f"{origin(group, name, what)} cannot be loaded ({reason}): repair or uninstall it") from failure


def names(group: str) -> tuple[str, ...]:
    """Names that installed packages have in a group, sorted."""
    return tuple(sorted({point.name for point in entry_points(group=group)}))


def origin(group: str, name: str, what: str) -> str:
    """The thing with the package and the value that it comes from, for messages."""
    point = next(iter(entry_points(group=group, name=name)))
    return f"{what} {name!r} of {_distribution(point)} ({point.value})"


def package(group: str, name: str) -> str:
    """Name and version of the package that has an entry point of this name."""
    return _distribution(next(iter(entry_points(group=group, name=name))))


def _distribution(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
