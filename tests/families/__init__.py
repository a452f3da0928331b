"""One test case for each row of the table of families."""

from __future__ import annotations

from tests.families.case import FamilyCase
from tests.families.internvl import ChatCase, InternLM2Case, NativeCase
from tests.families.llava_hf import LlavaNextVideoCase, LlavaOnevisionCase
from tests.families.llava_video import LlavaVideoCase
from tests.families.minicpmv import MiniCpmVCase
from tests.families.nvila import NvilaCase
from tests.families.qwen2_5_vl import Qwen25VLCase
from tests.families.qwen2_vl import Qwen2VLCase
from tests.families.qwen3_vl import Qwen3VLCase

CASES: tuple[FamilyCase, ...] = (
    Qwen2VLCase(),
    Qwen25VLCase(),
    Qwen3VLCase(),
    MiniCpmVCase(),
    ChatCase(),
    InternLM2Case(),
    NativeCase(),
    NvilaCase(),
    LlavaVideoCase(),
    LlavaOnevisionCase(),
    LlavaNextVideoCase(),
)  # fmt: skip
