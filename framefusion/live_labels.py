"""Labels from what a Hugging Face model is given: one small table of what differs between families.

Tokens of one place in the frames of one video share a label; every token of an image has its own; learned separator
rows and text have -1. Knows neither the policy nor the decoder.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from framefusion.errors import PromptError
from framefusion.tracks import TEXT, IntArray

FRAME_NAME = 5
"""InternVL writes `</img>\\nFrame2: <img>` between the frames of a video: at least this many tokens. What stands
between two images that follow each other is shorter."""


@dataclass(frozen=True)
class Preset:
    """Numbers of the reference's scripts; for families that it lacks, those of the nearest one."""

    similarity_lower_bound: float
    importance_rows: int


@dataclass(frozen=True)
class Seen:
    """What the multimodal model was called with."""

    ids: Tensor | None  # [B, S]
    given: dict[str, Any]


Labels = Callable[[Any, Seen, "dict[str, Any]"], "IntArray | None"]
"""(multimodal model, what it was given, what it gives its decoder) -> [B, S], None without visual tokens."""


def labels_behind(given: IntArray, shape: tuple[int, int], past: int) -> IntArray:
    """Labels that the user gave for whole prompts [P, any], for new tokens behind `past`: text where they end.

    Raises:
        PromptError: rows that do not fit the batch.
    """
    whole = np.full((given.shape[0], past + shape[1]), TEXT, np.int64)
    known = min(given.shape[1], whole.shape[1])
    whole[:, :known] = given[:, :known]
    if shape[0] % len(whole):
        raise PromptError(f"{len(whole)} rows of labels do not fit {shape[0]} prompts: give a row per prompt")
    return np.repeat(whole[:, past:], shape[0] // len(whole), axis=0)  # beams of a prompt lie together


def mrope_labels(model: Any, seen: Seen, given: dict[str, Any], *, timed: bool = False) -> IntArray | None:
    """Qwen's families: rotary positions tell the place in a frame, which grids that generate() encodes first do not.

    A run of visual tokens is a video or an image. With `timed`, text stands between the frames of one video, and its
    number of tokens tells where it ends.

    Raises:
        PromptError: positions without the axes of M-RoPE.
    """
    config, positions = model.config, given.get("position_ids")
    assert seen.ids is not None  # the caller refuses embeddings alone
    ids = seen.ids.cpu().numpy()
    if not np.isin(ids, (config.video_token_id, config.image_token_id)).any():
        return None
    if positions is None or positions.ndim != 3:
        raise PromptError(
            "position_ids without three axes do not tell the places of visual tokens: leave position_ids out and give "
            "mm_token_type_ids and the grids, as the processor does"
        )
    axes = np.broadcast_to(positions[-3:].cpu().numpy(), (3, *ids.shape))
    tokens_of_videos = iter(_video_lengths(config, seen.given) if timed else ())
    labels = np.full(ids.shape, TEXT, np.int64)
    for own, row, (time, y, x) in zip(labels, ids, axes.swapaxes(0, 1), strict=True):
        number, left, keys, visual = 0, 0, [], []
        for token, run in _runs(row, (config.video_token_id, config.image_token_id)):
            goes_on = timed and token == config.video_token_id and left > 0
            number += not goes_on
            if timed and token == config.video_token_id:
                left = (left if goes_on else next(tokens_of_videos, 0)) - run.size
            start = time[run] if timed else 0  # a timed frame begins where its time is, on every axis
            keys.append(np.stack([np.full(run.size, number), y[run] - start, x[run] - start], axis=1))
            visual.append(run)
        if keys:
            own[np.concatenate(visual)] = np.unique(np.concatenate(keys), axis=0, return_inverse=True)[1].reshape(-1)
    return labels


def _video_lengths(config: Any, given: dict[str, Any]) -> list[int]:
    """Visual tokens of each video, from the grids or from what generate() encoded."""
    grids = given.get("video_grid_thw")
    if grids is not None:
        return (grids.prod(-1) // config.vision_config.spatial_merge_size**2).tolist()  # type: ignore[no-any-return]
    encoded = (given.get("mm_encoder_outputs") or {}).get("video")
    return [] if encoded is None else [len(rows) for rows in encoded.pooler_output]


def run_labels(model: Any, seen: Seen, given: dict[str, Any]) -> IntArray | None:
    """LLaVA's families: a run of video tokens is a video; rows that equal the learned newline are structure."""
    config = model.config
    assert seen.ids is not None
    ids = seen.ids.cpu().numpy().copy()
    visual = np.isin(ids, (config.video_token_id, config.image_token_id))
    if not visual.any():
        return None
    if getattr(model, "image_newline", None) is not None:
        embeddings = given["inputs_embeds"]
        rows = embeddings[torch.from_numpy(visual).to(embeddings.device)]
        newlines = (rows == model.image_newline.to(rows)).all(-1).cpu().numpy()
        ids[visual] = np.where(newlines, TEXT, ids[visual])
    side = config.vision_config.image_size // config.vision_config.patch_size
    stride = getattr(config, "spatial_pool_stride", None)
    places = math.ceil(side / 2) ** 2 if stride is None else (side // stride) ** 2
    labels = np.full(ids.shape, TEXT, np.int64)
    for own, row in zip(labels, ids, strict=True):
        first = 0
        for token, chosen in _runs(row, (config.video_token_id, config.image_token_id)):
            distinct = places if token == config.video_token_id else chosen.size
            own[chosen] = first + np.arange(chosen.size) % distinct
            first += distinct
    return labels


def tile_labels(model: Any, seen: Seen, given: dict[str, Any]) -> IntArray | None:
    """InternVL: one token stands for frames and images; a run of one tile behind another one's is the next frame.

    Told apart by what is written between them, see FRAME_NAME; the token that ends the name repeats, too.
    """
    config, vision = model.config, model.config.vision_config
    assert seen.ids is not None
    sides = [int(n) // int(p) for n, p in zip(_pair(vision.image_size), _pair(vision.patch_size), strict=True)]
    places = round(math.prod(sides) * config.downsample_ratio**2)
    labels = np.full(seen.ids.shape, TEXT, np.int64)
    for own, ids in zip(labels, seen.ids.cpu().numpy(), strict=True):
        first, before = 0, np.empty(0, np.int64)
        for _, chosen in _runs(ids, (config.image_token_id,)):
            between = chosen[0] - before[-1] - 1 if before.size else 0
            same = before.size == chosen.size == places and between >= FRAME_NAME
            same = same and bool((ids[chosen[0] - 2 : chosen[0]] == ids[before[0] - 2 : before[0]]).all())
            first = first if same else int(own.max()) + 1
            own[chosen] = first + np.arange(chosen.size)
            before = chosen
    return labels if (labels != TEXT).any() else None


def _pair(size: Any) -> tuple[Any, Any]:
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)


def _runs(ids: IntArray, tokens: tuple[int, ...]) -> Iterator[tuple[int, IntArray]]:
    """Every unbroken run of one of the tokens, and its places."""
    at = 0
    for token, run in itertools.groupby(ids.tolist()):
        length = len(list(run))
        if token in tokens:
            yield token, np.arange(at, at + length)
        at += length


FAMILIES: dict[str, tuple[Labels, Preset]] = {
    "qwen2_vl": (mrope_labels, Preset(0.5, 4)),
    "qwen2_5_vl": (mrope_labels, Preset(0.5, 4)),
    "qwen3_vl": (partial(mrope_labels, timed=True), Preset(0.5, 4)),
    "llava_onevision": (run_labels, Preset(0.6, 1)),
    "llava_next_video": (run_labels, Preset(0.6, 1)),
    "internvl": (tile_labels, Preset(0.6, 1)),
}
"""By config.json's model_type."""
