"""How each family shows videos and images to its model: a module each, one line of the table below.

A module holds the family's `Preprocessing` with the rules of its fields in a manifest, which frames of a video it is
shown, and, where no other family has them, the inputs of its tower and their bounds. Importing this package makes all
of them known: nothing else in the runtime names a family. Another package adds one by an entry point of the group
`framefusion.preprocessing`, the rule's name = "module:Class"; it is loaded when a manifest names it. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from framefusion.errors import BundleError
from framefusion.runtime.families.internvl import InternVLPreprocessing
from framefusion.runtime.families.llava import LlavaPreprocessing
from framefusion.runtime.families.minicpmv import MiniCpmVPreprocessing
from framefusion.runtime.families.nvila import NvilaPreprocessing
from framefusion.runtime.families.qwen2_5_vl import Qwen25VLPreprocessing
from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing
from framefusion.runtime.families.qwen3_vl import Qwen3VLPreprocessing
from framefusion.runtime.media.preprocess import Preprocessing
from framefusion.storage.entry_points import load_named, origin

GROUP = "framefusion.preprocessing"
WHAT = "preprocessing rule"

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
    loaded = load_named(GROUP, rule, WHAT, BundleError)
    if loaded is None:
        return None
    if not (isinstance(loaded, type) and issubclass(loaded, Preprocessing)):
        raise BundleError(
            f"{origin(GROUP, rule, WHAT)} is {loaded!r:.60}: name a subclass of "
            f"{Preprocessing.__module__}.Preprocessing"
        )
    if loaded.rule != rule:
        raise BundleError(
            f"{origin(GROUP, rule, WHAT)} calls itself {loaded.rule!r}: give class and entry point the same name"
        )
    return loaded
