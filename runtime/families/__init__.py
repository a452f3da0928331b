"""How each family shows videos and images to its model: a module each, one line of the table below.

A module holds the family's `Preprocessing` with the rules of its fields in a manifest, which frames of a video it is
shown, and, where no other family has them, the inputs of its tower and their bounds. Importing this package makes all
of them known: nothing else in the runtime names a family. Another package adds one by an entry point of the group
`framefusion.preprocessing`, the rule's name = "module:Class"; it is loaded when a manifest names it. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from framefusion.errors import BundleError
from framefusion.runtime.families.internvl import InternVLPreprocessing
from framefusion.runtime.families.llava import LlavaPreprocessing
from framefusion.runtime.families.minicpmv import MiniCpmVPreprocessing
from framefusion.runtime.families.nvila import NvilaPreprocessing
from framefusion.runtime.families.qwen2_5_vl import Qwen25VLPreprocessing
from framefusion.runtime.families.qwen3_vl import Qwen3VLPreprocessing
from framefusion.runtime.families.qwen_vl import QwenVLPreprocessing
from framefusion.runtime.media.preprocess import Preprocessing

GROUP = "framefusion.preprocessing"

FAMILIES: tuple[type[Preprocessing], ...] = (
    QwenVLPreprocessing,
    Qwen25VLPreprocessing,
    Qwen3VLPreprocessing,
    LlavaPreprocessing,
    MiniCpmVPreprocessing,
    InternVLPreprocessing,
    NvilaPreprocessing,
)
RULES: Mapping[str, type[Preprocessing]] = {family.rule: family for family in FAMILIES}
"""`Preprocessing.rule` -> class. A name of this table cannot be taken by a package."""


def load_preprocessing(rule: str) -> type[Preprocessing] | None:
    """The class of a rule, from the table or from an installed package; None where neither has it.

    Raises:
        BundleError: two packages claim the name, or a package's class cannot be loaded.
    """
    if rule in RULES:
        return RULES[rule]
    points = tuple(entry_points(group=GROUP, name=rule))
    if not points:
        return None
    if len({point.value for point in points}) > 1:
        claims = " and ".join(sorted(map(_distribution, points)))
        raise BundleError(f"preprocessing rule {rule!r} is claimed by {claims}: uninstall all but one")
    return _loaded(points[0])


def _loaded(point: EntryPoint) -> type[Preprocessing]:
    origin = f"preprocessing rule {point.name!r} of {_distribution(point)} ({point.value})"
    try:
        loaded = point.load()
    except Exception as error:  # whatever another package's import may raise
        raise BundleError(
            f"{origin} cannot be loaded ({type(error).__name__}: {error}): repair or uninstall it"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Preprocessing)):
        raise BundleError(f"{origin} is {loaded!r:.60}: name a subclass of {Preprocessing.__module__}.Preprocessing")
    if loaded.rule != point.name:
        raise BundleError(f"{origin} calls itself {loaded.rule!r}: give class and entry point the same name")
    return loaded


def _distribution(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
