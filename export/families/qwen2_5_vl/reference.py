"""Qwen2.5-VL by transformers' own class, in fp32: what a bundle's dense logits are compared with."""

from __future__ import annotations

from functools import partial

from framefusion.export.families.qwen2_vl.reference import transformers_logits

reference_logits = partial(transformers_logits, "Qwen2_5_VLForConditionalGeneration")
