"""Qwen2-VL against Qwen2VLForConditionalGeneration and its own image processor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.text.prompt import Prompt, Turn, Visual
from tests.families.case import Array, FamilyCase, Media, Reference
from tests.random_checkpoint import random_checkpoint

MERGE = 2


Processed = tuple[Array, list[int]]
"""Patches [n, W] of a video or an image, and its grid (T, h, w)."""


def processed(frames: Array, **settings: Any) -> Processed:
    """An even number of frames by transformers' image processor; `settings` are its own."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(**settings)
    patch = processor.patch_size
    result = processor(images=list(frames), return_tensors="np")
    _, height, width = result["image_grid_thw"][0].tolist()
    # It makes a patch of each frame, repeated twice: take each frame's own half.
    halves = result["pixel_values"].reshape(len(frames), -1, 3, 2, patch, patch)[:, :, :, 0]
    pairs = halves.reshape(len(frames) // 2, 2, height * width, 3, patch, patch).transpose(0, 2, 3, 1, 4, 5)
    return pairs.reshape(len(frames) // 2 * height * width, -1), [len(frames) // 2, height, width]


class QwenVLReference(Reference):
    """transformers' model; positions of the rule that the checkpoints were trained with are passed explicitly."""

    def __init__(self, folder: Path, name: str, process: Callable[[Media], Processed]) -> None:
        import transformers

        self.model: Any = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
        self.process = process

    @torch.inference_mode()
    def features(self, media: Sequence[Media]) -> Array:
        return torch.cat([self.tower(item).pooler_output for item in media]).numpy()

    @torch.inference_mode()
    def tower(self, item: Media) -> Any:
        """What transformers' vision model gives."""
        values, grid = self.process(item)
        return self.model.model.visual(torch.from_numpy(values), torch.tensor([grid]), return_dict=True)

    @torch.inference_mode()
    def logits(self, prompt: Prompt, media: Sequence[Media], answer: Sequence[int]) -> Array:
        ids = torch.tensor([[*prompt.token_ids.tolist(), *answer]])
        after = prompt.token_ids.size + prompt.rope_delta + np.arange(len(answer))
        places = np.concatenate([prompt.positions, np.broadcast_to(after, (3, len(answer)))], axis=1)
        given: dict[str, torch.Tensor] = {}
        for values, grids, film in (
            ("pixel_values_videos", "video_grid_thw", True),
            ("pixel_values", "image_grid_thw", False),
        ):
            shown = [self.process(item) for item in media if isinstance(item, Video) == film]
            if shown:
                given[values] = torch.from_numpy(np.concatenate([patches for patches, _ in shown]))
                given[grids] = torch.tensor([grid for _, grid in shown])
        result = self.model(input_ids=ids, position_ids=torch.from_numpy(places)[:, None], **given)
        logits: Array = result.logits[0].numpy()
        return logits


class Qwen2VLCase(FamilyCase):
    """`save_pretrained` writes the names of the hub's files."""

    family = "qwen2_vl"
    variants: ClassVar[tuple[str, ...]] = ("tied", "untied-bfloat16-sharded", "float16")
    model: ClassVar[str] = "Qwen2VLForConditionalGeneration"
    pixel_limit: ClassVar[int] = 56 * 84  # of a frame and of an image
    system: ClassVar[str] = "You are a helpful assistant."

    def write(self, folder: Path, variant: str) -> None:
        dtype = next((name for name in ("bfloat16", "float16") if name in variant), "float32")
        sharded: dict[str, Any] = {"max_shard_size": "60KB"} if "sharded" in variant else {}
        random_checkpoint(folder, pixels=self.pixel_limit, tied="untied" not in variant, dtype=dtype, **sharded)

    def reference(self, folder: Path) -> QwenVLReference:
        return QwenVLReference(folder, self.model, self.processed)

    def processed(self, media: Media) -> Processed:
        """A video or an image by transformers' processor."""
        frames = media.frames if isinstance(media, Video) else np.stack([media, media])
        return processed(frames, min_pixels=self.pixel_limit, max_pixels=self.pixel_limit)

    def pixels(self, folder: Path, media: Media) -> list[Array]:
        values, (grids, height, width) = self.processed(media)
        return [values.reshape(grids, height * width, -1)]

    def prompt_ids(self, folder: Path, turns: Sequence[Turn], media: Sequence[Media]) -> list[int]:
        """The chat template of the published checkpoints, written out."""
        import tokenizers

        rest, text = list(media), ""
        for turn in [Turn("system", (self.system,)), *turns] if self.system else turns:
            text += f"<|im_start|>{turn.role}\n"
            for part in turn.parts:
                if isinstance(part, Visual):
                    text += self.shown(part.value, rest.pop(0))
                else:
                    text += part
            text += "<|im_end|>\n"
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        return list(tokenizer.encode(text + "<|im_start|>assistant\n").ids)

    def shown(self, kind: str, item: Media) -> str:
        """What stands for a video or an image."""
        grid = self.processed(item)[1]
        return "<|vision_start|>" + f"<|{kind}_pad|>" * (math.prod(grid) // MERGE**2) + "<|vision_end|>"

    def labels(self, folder: Path, ids: Sequence[int], media: Sequence[Media]) -> list[int]:
        """families.md 5.4: a place of the merged grid, again for each temporal grid."""
        config = json.loads((folder / "config.json").read_text())
        pads, first = (config["video_token_id"], config["image_token_id"]), 0
        expected: list[int] = []
        for item in media:
            grids, height, width = self.processed(item)[1]
            places = height * width // MERGE**2
            expected += [first + place for _ in range(grids) for place in range(places)]
            first += places
        return [expected.pop(0) if index in pads else -1 for index in ids]

    def indices(self, total_frames: int, fps: float) -> list[int]:
        """qwen_vl_utils: evenly spread, an even number, at least four."""
        wanted = min(max(total_frames / fps * 2, 4), 32, total_frames)
        count = int(wanted) // 2 * 2
        return torch.linspace(0, total_frames - 1, count).round().long().tolist()
