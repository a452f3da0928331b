"""Qwen-VL by transformers' own classes, in fp32: what a bundle's dense logits are compared with."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from framefusion.export.families.reference.transformers_call import TransformersCall


def transformers_logits(name: str, call: TransformersCall) -> NDArray[np.float32]:
    """Logits [keep, V] of the last tokens after videos, by the class of transformers that has this name.

    Positions are passed explicitly: transformers 5 places text after a video by another rule (see positions.py).
    """
    prompt = call.prompt
    model = call.model(name)
    tiles = [tiles for visual in call.visuals for tiles in visual.tiles]
    with torch.inference_mode():
        result = model(
            input_ids=torch.from_numpy(prompt.token_ids)[None],
            position_ids=torch.from_numpy(prompt.positions)[:, None],
            pixel_values_videos=torch.cat([torch.from_numpy(t.values).flatten(0, 1) for t in tiles]),
            video_grid_thw=torch.tensor([list(t.grid) for t in tiles]),
            mm_token_type_ids=torch.where(torch.from_numpy(prompt.labels >= 0), 2, 0)[None].int(),
            logits_to_keep=call.keep,
        )
    logits: NDArray[np.float32] = result.logits[0].numpy()
    return logits


reference_logits = partial(transformers_logits, "Qwen2VLForConditionalGeneration")
