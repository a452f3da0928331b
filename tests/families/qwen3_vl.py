"""Qwen3-VL against Qwen3VLForConditionalGeneration, its image processor, and methods of its video processor.

The video processor itself needs torchvision: its functions of sizes, frames and times are called on their own.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from framefusion.runtime.media.video.frames import Video
from tests.families.case import Media
from tests.families.qwen2_5_vl import TEXT, VISION, end_tokens, save_random, visual_ids, write_processors
from tests.families.qwen2_vl import MERGE, Processed, Qwen2VLCase, processed
from tests.random_checkpoint import write_tokenizer

HALF = [0.5, 0.5, 0.5]
VIDEO_PIXELS = 8 * 96 * 128  # of all frames together
IMAGE_PIXELS = 96 * 96
SAMPLING = {"fps": 2, "min_frames": 4, "max_frames": 31}


def video_processing() -> Any:
    """transformers' module; its package hides it where torchvision is not installed."""
    return importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")


class Qwen3VLCase(Qwen2VLCase):
    """Untied and tied heads; the configuration is always nested, the names are always the new ones."""

    family = "qwen3_vl"
    variants = ("untied", "tied-bfloat16-sharded", "float16", "one-processor-file", "three-features", "no-features")
    model = "Qwen3VLForConditionalGeneration"
    system = ""

    def write(self, folder: Path, variant: str) -> None:
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

        ids, tied = write_tokenizer(folder), "tied" in variant.split("-")
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 3, 3], "mrope_interleaved": True}
        inner = {"three-features": [0, 1, 2], "no-features": []}.get(variant, [0, 2])
        config = Qwen3VLConfig(
            # 4 heads of 24 are wider than the hidden state: head_dim is told, not divided
            text_config=TEXT | {"head_dim": 24, "rope_parameters": rope} | end_tokens(ids),
            vision_config=VISION
            | {"depth": 4, "patch_size": 16, "num_position_embeddings": 36, "deepstack_visual_indexes": inner},
            tie_word_embeddings=tied,
            **visual_ids(ids),
        )
        torch.manual_seed(0)
        save_random(Qwen3VLForConditionalGeneration(config), folder, variant)
        common = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "image_mean": HALF, "image_std": HALF}
        video = {"size": {"shortest_edge": VIDEO_PIXELS // 2, "longest_edge": VIDEO_PIXELS}} | SAMPLING
        image = {"size": {"shortest_edge": IMAGE_PIXELS, "longest_edge": IMAGE_PIXELS}}
        write_processors(folder, common | video, common | image, variant)

    def processed(self, media: Media) -> Processed:
        """An image by transformers' processor; a video resized to the size that transformers' formula gives."""
        common = {"patch_size": 16, "image_mean": HALF, "image_std": HALF}
        if not isinstance(media, Video):
            size = {"shortest_edge": IMAGE_PIXELS, "longest_edge": IMAGE_PIXELS}
            return processed(np.stack([media, media]), size=size, **common)
        frames = media.frames if len(media.frames) % 2 == 0 else np.concatenate([media.frames, media.frames[-1:]])
        height, width = video_processing().smart_resize(
            len(media.frames), *media.frames.shape[1:3], 2, 32, VIDEO_PIXELS // 2, VIDEO_PIXELS
        )
        resized = [np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC)) for f in frames]
        return processed(np.stack(resized), do_resize=False, **common)

    def shown(self, kind: str, item: Media) -> str:
        """A time before each temporal grid of a video, by transformers' own formula."""
        if not isinstance(item, Video):
            return super().shown(kind, item)
        from transformers import Qwen3VLProcessor

        grids, *size = self.processed(item)[1]
        nobody: Any = None  # the method reads nothing of its processor
        times = Qwen3VLProcessor._calculate_timestamps(nobody, item.indices.tolist(), item.fps, 2)
        pads = "<|video_pad|>" * (math.prod(size) // MERGE**2)
        assert len(times) == grids
        return "".join(f"<{time:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for time in times)

    def indices(self, total_frames: int, fps: float) -> list[int]:
        """transformers' video processor."""
        from transformers.video_utils import VideoMetadata

        processor = video_processing().Qwen3VLVideoProcessor
        metadata = VideoMetadata(total_num_frames=total_frames, fps=fps)
        return [int(i) for i in processor.sample_frames(SimpleNamespace(**SAMPLING), metadata)]
