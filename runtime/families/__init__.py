"""How each family shows videos and images to its model: a subclass of `Preprocessing` each, by the rule's name."""

from __future__ import annotations

from collections.abc import Mapping

from framefusion.runtime.families.internvl import InternVLPreprocessing
from framefusion.runtime.families.llava import LlavaPreprocessing
from framefusion.runtime.families.minicpmv import MiniCpmVPreprocessing
from framefusion.runtime.families.nvila import NvilaPreprocessing
from framefusion.runtime.families.qwen2_5_vl import Qwen25VLPreprocessing
from framefusion.runtime.families.qwen3_vl import Qwen3VLPreprocessing
from framefusion.runtime.families.qwen_vl import QwenVLPreprocessing
from framefusion.runtime.media.preprocess import Preprocessing

# A manifest is read by the rule's name: importing this package makes all of them known.
RULES: Mapping[str, type[Preprocessing]] = {
    kind.rule: kind
    for kind in (
        QwenVLPreprocessing,
        Qwen25VLPreprocessing,
        Qwen3VLPreprocessing,
        LlavaPreprocessing,
        MiniCpmVPreprocessing,
        InternVLPreprocessing,
        NvilaPreprocessing,
    )
}  # fmt: skip
