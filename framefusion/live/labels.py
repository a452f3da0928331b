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
from framefusion.reduction.tracks import TEXT, IntArray

FRAME_NAME = 12
"""InternVL writes `</img>\\nFrame2: <img>` between the frames of a video: at most this many tokens, where the text
before the first frame does not show how they are named."""


@dataclass(frozen=True)
class Preset:
    """Numbers of the reference's scripts; for families that it lacks, those of the nearest one."""

    similarity_lower_bound: float
    importance_rows: int


@dataclass(frozen=True)
class MultimodalInputs:
    """What the multimodal model was called with."""

    ids: Tensor | None  # [B, S]
    given: dict[str, Any]


Labels = Callable[[Any, MultimodalInputs, "dict[str, Any]"], "IntArray | None"]
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


def mrope_labels(
    model: Any, inputs: MultimodalInputs, given: dict[str, Any], *, timed: bool = False
) -> IntArray | None:
    """Qwen's families: rotary positions tell the place in a frame, which grids that generate() encodes first do not.

    A run of visual tokens is a video or an image. With `timed`, text stands between the frames of one video, and its
    number of tokens tells where it ends.

    Raises:
        PromptError: positions without the axes of M-RoPE.
    """
    config = model.config
    positions = given.get("position_ids")
    assert inputs.ids is not None  # the caller refuses embeddings alone
    ids = inputs.ids.cpu().numpy()
    if not np.isin(ids, (config.video_token_id, config.image_token_id)).any():
        return None
    if positions is None or positions.ndim != 3:
        raise PromptError(
            "position_ids without three axes do not tell the places of visual tokens: leave position_ids out and give "
            "mm_token_type_ids and the grids, as the processor does"
        )
    if positions.shape[1] not in (1, len(ids)) or positions.shape[2] != ids.shape[1]:
        raise PromptError(
            f"position_ids of shape {tuple(positions.shape)} do not fit {ids.shape[0]} prompts of {ids.shape[1]} "
            "tokens: transformers before 5.23 cuts them on the wrong axis with prefill_chunk_size; leave it out"
        )
    axes = np.broadcast_to(positions[-3:].cpu().numpy(), (3, *ids.shape))
    tokens_of_videos = iter(_video_lengths(config, inputs.given) if timed else ())
    labels = np.full(ids.shape, TEXT, np.int64)
    for row_labels, row, (time, y, x) in zip(labels, ids, axes.swapaxes(0, 1), strict=True):
        number = 0
        left = 0
        keys = []
        visual = []
        for token, run in _runs(row, (config.video_token_id, config.image_token_id)):
            goes_on = timed and token == config.video_token_id and left > 0
            number += not goes_on
            if timed and token == config.video_token_id:
                left = (left if goes_on else next(tokens_of_videos, 0)) - run.size
            start = time[run] if timed else 0  # a timed frame begins where its time is, on every axis
            keys.append(np.stack([np.full(run.size, number), y[run] - start, x[run] - start], axis=1))
            visual.append(run)
        if keys:
            places = np.unique(np.concatenate(keys), axis=0, return_inverse=True)[1]
            row_labels[np.concatenate(visual)] = places.reshape(-1)
    return labels


def _video_lengths(config: Any, given: dict[str, Any]) -> list[int]:
    """Visual tokens of each video, from the grids or from what generate() encoded."""
    grids = given.get("video_grid_thw")
    if grids is not None:
        return (grids.prod(-1) // config.vision_config.spatial_merge_size**2).tolist()  # type: ignore[no-any-return]
    encoded = (given.get("mm_encoder_outputs") or {}).get("video")
    return [] if encoded is None else [len(rows) for rows in encoded.pooler_output]


def run_labels(model: Any, inputs: MultimodalInputs, given: dict[str, Any]) -> IntArray | None:
    """LLaVA's families: a run of video tokens is a video; rows that equal the learned newline are structure."""
    config = model.config
    assert inputs.ids is not None
    ids = inputs.ids.cpu().numpy().copy()
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
    for row_labels, row in zip(labels, ids, strict=True):
        first = 0
        for token, chosen in _runs(row, (config.video_token_id, config.image_token_id)):
            distinct = places if token == config.video_token_id else chosen.size
            row_labels[chosen] = first + np.arange(chosen.size) % distinct
            first += distinct
    return labels


def tile_labels(model: Any, inputs: MultimodalInputs, given: dict[str, Any]) -> IntArray | None:
    """InternVL: one token stands for frames and images; only the text between them tells frames of one video.

    A run of one tile behind another one's is the next frame where `_names_next_frame` says so. Other runs are pictures:
    each of their tokens has a label of its own, as in a bundle.
    """
    config = model.config
    vision = model.config.vision_config
    assert inputs.ids is not None
    sides = [int(n) // int(p) for n, p in zip(_pair(vision.image_size), _pair(vision.patch_size), strict=True)]
    places = round(math.prod(sides) * config.downsample_ratio**2)
    labels = np.full(inputs.ids.shape, TEXT, np.int64)
    for row_labels, ids in zip(labels, inputs.ids.cpu().numpy(), strict=True):
        runs = [run for _, run in _runs(ids, (config.image_token_id,))]
        gaps = [
            ids[a[-1] + 1 : b[0]] if a.size == b.size == places else ids[:0] for a, b in itertools.pairwise(runs)
        ]  # between a frame and the next; empty where one of the two is no frame
        label = 0
        head = ids[:0]
        before = ids[:0]
        for i, run in enumerate(runs):
            gap = gaps[i - 1] if i else ids[:0]
            if gap.size and _names_next_frame(head, before, gap, gaps[i] if i < len(gaps) else ids[:0]):
                before = gap
            else:
                label = int(row_labels.max()) + 1
                head = ids[: run[0]]
                before = ids[:0]
            row_labels[run] = label + np.arange(run.size)
    return labels if (labels != TEXT).any() else None


def _names_next_frame(head: IntArray, before: IntArray, gap: IntArray, behind: IntArray) -> bool:
    """Whether the text between two tiles is `</img>\\nFrame3: <img>`, whatever tokens these texts have.

    Args:
        head: all text before the video's first frame, which ends in `Frame1: <img>`.
        before: text between the two frames before, empty behind the first one.
        gap: the text in question.
        behind: that behind the next tile, empty if none follows.
    """
    name = gap[2:]
    first = head[max(head.size - gap.size + 2, 0) :]  # without `</img>` and the newline
    if name.size < 3 or np.array_equal(name[1:], head[head.size - name.size + 1 :]):
        return False  # too short, or the name of a first frame: another video
    if before.size:
        return _differ_by_number(before, gap)
    if first.size == name.size and _differ_by_number(first, name, least=1):
        return True
    ends_alike = head.size < 2 or np.array_equal(head[-2:], gap[-2:])  # a chunk of a prompt may begin with a frame
    return ends_alike and gap.size <= FRAME_NAME and behind.size > 0 and _differ_by_number(gap, behind)


def _differ_by_number(text: IntArray, other: IntArray, least: int = 3) -> bool:
    """Whether texts are alike but for a number: `least` tokens before it, one to four of it, two or more behind it."""
    shorter = min(text.size, other.size)
    front = next((i for i in range(shorter) if text[i] != other[i]), shorter)
    back = next((i for i in range(shorter - front) if text[-1 - i] != other[-1 - i]), shorter - front)
    numbers = (text.size - front - back, other.size - front - back)
    return front >= least and back >= 2 and all(1 <= length <= 4 for length in numbers)


def check_labels(config: Any, ids: Tensor, labels: IntArray | None, shape: tuple[int, int]) -> None:
    """Whether every row with visual tokens has labels of them.

    Args:
        config: the whole model's.
        ids: of the new tokens.  [B, S]
        labels: as they were read.  [B, S] or None
        shape: B and S of what the decoder is given.

    Raises:
        PromptError: labels of this family cannot be read, or were not.
    """
    named = (getattr(config, f"{kind}_token_{name}", None) for kind in ("image", "video") for name in ("id", "index"))
    tokens = [token for token in named if isinstance(token, int)]
    if not tokens or tuple(ids.shape) != shape:
        return
    visual = torch.isin(ids, torch.tensor(tokens, device=ids.device)).sum(-1).cpu().numpy()
    unread = visual if labels is None else np.where((labels != TEXT).any(-1), 0, visual)
    if unread.any():
        raise PromptError(
            f"input_ids hold {unread.max()} visual tokens of which no labels can be read from a {config.model_type}: "
            "give them in a block of `with model.framefusion.labels(patch_type):`"
        )


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
