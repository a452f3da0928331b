"""What a user may choose of a build. No torch here: the command line and a manifest's reader need only the names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from framefusion.runtime.bundle import Mode

DType = Literal["float32", "float16", "bfloat16"]
DEFAULT_TEXT = 512


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose; None takes what checkpoint, family or the other options imply.

    Attributes:
        reduction: where tokens are dropped: nowhere, by a built-in schedule, or by thresholds at run time.
        cost: share of the computation over visual tokens that is kept, in (0, 1].
        similarity_lower_bound, ratio_lower_bound: see `framefusion.policy.ReductionSettings`.
        depth: deepest layer whose attention a reduction may follow (adaptive).
        merge_shares, prune_layer: the schedule (fixed).
        dialect: how the graphs say attention over a cache.
        buckets: sizes of a prefill.
        max_input_len, max_kv_cache_capacity, max_text_len: longest prompt; prompt and answer; text of a prompt (fixed).
        dtype: of the graphs: weights, activations and caches. The embedding table stays as it is stored.
        num_decoder_layer: take only the first layers, for a smoke test.
        fps, max_frames, min_pixels, max_pixels: sampling of frames and their size.
        mm_spatial_pool_mode: how the patches of a frame are pooled (LLaVA).
        max_slice_nums: most slices that a frame of a video is cut into (MiniCPM-V).
        max_tiles: most tiles that an image is cut into (InternVL, NVILA, LLaVA).
    """

    reduction: Mode = "adaptive"
    cost: float = 0.3
    similarity_lower_bound: float | None = None
    ratio_lower_bound: float = 0.1
    depth: int | None = None
    merge_shares: tuple[float, ...] | None = None
    prune_layer: int | None = None
    dialect: str = "gqa"
    buckets: tuple[int, ...] | None = None
    max_input_len: int | None = None
    max_kv_cache_capacity: int | None = None
    max_text_len: int = DEFAULT_TEXT
    dtype: DType = "float32"
    num_decoder_layer: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_slice_nums: int | None = None
    max_tiles: int | None = None
    mm_spatial_pool_mode: str | None = None
