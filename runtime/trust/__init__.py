"""Whether a bundle of unknown origin may be opened: its graphs, its signatures, its engines.

`from framefusion.runtime.trust import Trust` is what a caller writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framefusion.runtime.trust.origin import Trust as Trust


def __getattr__(name: str) -> Any:
    """`Trust`, imported when it is asked for: the format of a bundle leans on this folder's other modules."""
    if name != "Trust":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from framefusion.runtime.trust.origin import Trust

    return Trust
