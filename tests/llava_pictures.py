"""Sizes of pictures and the tilings that LLaVA has for them, and of the tiny towers that look at them."""

from __future__ import annotations

TILE = 384
TILINGS = tuple((tall * TILE, wide * TILE) for tall in range(1, 7) for wide in range(1, 7))
SIZES = [
    (100, 100),
    (384, 384),
    (768, 384),
    (480, 640),
    (333, 1777),
    (1777, 333),
    (899, 1024),
    (2000, 2100),
    (60, 2304),
]
SIGLIP_SIDE, CLIP_SIDE, PATCH = 72, 58, 14  # 5 and 4 patches, and two pixels that no patch covers
