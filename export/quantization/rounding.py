"""Codes by rounding to the nearest: the plain way, which every other one is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from framefusion.export.quantization.blocks import BlockFormat, BlockQuantized


def round_to_nearest(weight: Tensor, form: BlockFormat, dtype: torch.dtype = torch.float32) -> BlockQuantized:
    """Scales that reach from the smallest weight of a block to the largest, and the nearest code for each weight.

    Args:
        weight: floats [out, in].
        form: how it is to be stored.
        dtype: that scales are rounded to before codes are chosen.
    """
    inputs = weight.shape[1]
    count = form.blocks(inputs)
    missing = count * form.block - inputs
    blocked = torch.nn.functional.pad(weight.float(), (0, missing)).reshape(-1, count, form.block)
    # 1. scale and zero point of each block
    if form.symmetric:
        largest = blocked.abs().amax(-1)
        extreme = torch.where(blocked.amax(-1) == largest, largest, -largest)
        scales = (extreme / -form.middle).to(dtype).float()  # the side that reaches further takes the extra code
        zeros = torch.full_like(scales, form.middle)
    else:
        low = blocked.amin(-1).clamp(max=0)
        scales = ((blocked.amax(-1).clamp(min=0) - low) / form.largest).to(dtype).float()
        zeros = torch.where(scales > 0, (-low / scales).round().clamp(0, form.largest), 0)
    # 2. the nearest code
    safe = torch.where(scales == 0, 1, scales)
    codes = (blocked / safe[..., None] + zeros[..., None]).round().clamp(0, form.largest).to(torch.uint8)
    codes = codes.flatten(1)[:, :inputs].contiguous()
    return BlockQuantized(codes, scales, None if form.symmetric else zeros.to(torch.uint8), form.bits, form.block)
