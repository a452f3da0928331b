"""LLaVA-Video composed of transformers' parts: SiglipVisionModel, an MLP, torch's pooling and Qwen2ForCausalLM."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.text.prompt import Prompt, Turn
from tests.families import llava_checkpoints as tiny
from tests.families.case import Array, Media, Reference
from tests.families.llava import LlavaCase, config_of, resized, tokenizer_of


class LlavaVideoCase(LlavaCase):
    """LlavaQwenForCausalLM."""

    family = "llava_video"
    kind = "siglip"
    variants = ("grid", "average_bf16_shards", "frame_fp16", "one_token_tied", "no_token_spare_layer")

    def write(self, folder: Path, variant: str) -> None:
        variants: dict[str, dict[str, Any]] = {
            "grid": {},
            "average_bf16_shards": {"mm_spatial_pool_mode": "average", "dtype": "bfloat16", "shards": 3},
            "frame_fp16": {"mm_newline_position": "frame", "dtype": "float16", "image_aspect_ratio": "anyres"},
            "one_token_tied": {"mm_newline_position": "one_token", "tied": True, "add_time_instruction": None},
            "no_token_spare_layer": {"mm_newline_position": "no_token", "spare": True, "force_sample": False},
        }
        tiny.write_original(folder, **variants[variant])

    def reference(self, folder: Path) -> Reference:
        return LlavaVideoReference(self, folder)

    def image_processor(self) -> Any:
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        half, size = [0.5, 0.5, 0.5], {"height": self.side, "width": self.side}
        tilings = tiny.tilings(self.side)
        return LlavaOnevisionImageProcessorPil(size=size, image_mean=half, image_std=half, image_grid_pinpoints=tilings)

    def frame(self, frame: Array) -> Array:
        return resized(frame, self.side, self.side)

    def normalised(self, pixels: Array) -> Tensor:
        return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255.0 - 0.5) / 0.5

    def pooled(self, folder: Path) -> int:
        return self.patches // 2 if config_of(folder)["mm_spatial_pool_mode"] == "average" else (self.patches + 1) // 2

    def newlines(self, folder: Path) -> str:
        return str(config_of(folder)["mm_newline_position"])

    def max_tiles(self, folder: Path) -> int:
        return int(config_of(folder)["image_aspect_ratio"].removeprefix("anyres").removeprefix("_max_") or 999)

    def is_row(self, folder: Path, index: int) -> bool:
        return index == -1

    def prompt_ids(self, folder: Path, turns: Sequence[Turn], media: Sequence[Media]) -> list[int]:
        """Text is cut at <image> and tokenized piece by piece, as LLaVA's tokenizer_image_token does."""
        waiting = iter(media)
        text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        for turn in turns:
            said = [part if isinstance(part, str) else self.shown(folder, next(waiting)) for part in turn.parts]
            text += f"<|im_start|>{turn.role}\n{''.join(said)}<|im_end|>\n"
        chunks = [
            tokenizer_of(folder)(chunk).input_ids for chunk in (text + "<|im_start|>assistant\n").split("<image>")
        ]
        ids: list[int] = chunks[0]
        for layout, chunk in zip(self.layouts(folder, media), chunks[1:], strict=True):
            ids = [*ids, *(-2 if newline else -1 for newline in layout), *chunk]
        return ids

    def shown(self, folder: Path, media: Media) -> str:
        if not isinstance(media, Video) or not config_of(folder)["add_time_instruction"]:
            return "<image>\n"
        times = ",".join(f"{index / media.fps:.2f}s" for index in media.indices)
        return (
            f"<image>\nThe video lasts for {media.total_frames / media.fps:.2f} seconds, and {len(media.frames)} "
            f"frames are uniformly sampled from it. These frames are located at {times}."
            "Please answer the following questions related to this video.\n"
        )

    def indices(self, total_frames: int, fps: float) -> list[int]:
        return [int(place) for place in np.linspace(0, total_frames - 1, 64)]


class LlavaVideoReference(Reference):
    """SiglipVisionModel, an MLP, torch's pooling and Qwen2ForCausalLM."""

    def __init__(self, case: LlavaVideoCase, folder: Path) -> None:
        from safetensors.torch import load_file

        transformers: Any = importlib.import_module("transformers")
        self.case, self.folder, self.config = case, folder, config_of(folder)
        tensors: dict[str, Tensor] = {}
        for file in folder.glob("*.safetensors"):
            tensors |= {name: tensor.float() for name, tensor in load_file(file).items()}
        vision = transformers.SiglipVisionConfig.from_dict(tiny.vision_config("siglip"))
        self.tower = transformers.SiglipVisionModel(vision).eval()
        inner = "vision_model." * any(name.startswith("vision_model.") for name in self.tower.state_dict())
        self.projector = nn.Sequential(
            nn.Linear(tiny.VISION, tiny.HIDDEN), nn.GELU(), nn.Linear(tiny.HIDDEN, tiny.HIDDEN)
        )
        text = tiny.text_config("qwen2", {"<|im_end|>": 2, "<|endoftext|>": 0}, self.config["tie_word_embeddings"])
        self.llm = transformers.Qwen2ForCausalLM(transformers.Qwen2Config.from_dict(text)).eval()
        prefixes = {
            "model.vision_tower.vision_tower.vision_model.": (self.tower, inner),
            "model.mm_projector.": (self.projector, ""),
        }
        for prefix, (module, inside) in prefixes.items():
            found = {
                inside + name.removeprefix(prefix): tensors.pop(name) for name in [*tensors] if name.startswith(prefix)
            }
            missing = module.load_state_dict(found, strict=False).missing_keys
            assert all("layers.2." in name for name in missing)  # the last layer, which is not run
        self.newline = tensors.pop("model.image_newline")
        loading = self.llm.load_state_dict(tensors, strict=False)
        assert not loading.unexpected_keys
        assert set(loading.missing_keys) <= {"lm_head.weight"}
        self.llm.tie_weights()

    def rows(self, media: Sequence[Media]) -> list[Tensor]:
        inputs = self.case.images(media) if any(not isinstance(item, Video) for item in media) else {"pixel_values": []}
        features = [self.encoded(pictures) for pictures in inputs["pixel_values"]]
        images = iter(self.case.packed(self.folder, features, inputs, None) if features else [])
        return [self.video(item) if isinstance(item, Video) else next(images) for item in media]

    def encoded(self, pictures: Tensor) -> Tensor:
        hidden: Tensor = self.tower(pictures, output_hidden_states=True).hidden_states[-2]
        projected: Tensor = self.projector(hidden)
        return projected

    def video(self, video: Video) -> Tensor:
        rows, side = self.encoded(self.case.video(video)), self.case.patches
        grid = rows.reshape(-1, side, side, tiny.HIDDEN).permute(0, 3, 1, 2)
        if self.config["mm_spatial_pool_mode"] == "average":
            return nn.functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2).flatten(0, 1)
        size = [(side + 1) // 2] * 2
        pooled = nn.functional.interpolate(grid, size=size, mode="bilinear")
        return pooled.flatten(2).transpose(1, 2).flatten(0, 1)

    def features(self, media: Sequence[Media]) -> Array:
        with torch.inference_mode():
            features: Array = torch.cat(self.rows(media)).numpy()
        return features

    def logits(self, prompt: Prompt, media: Sequence[Media], answer: Sequence[int]) -> Array:
        ids = torch.tensor([*prompt.token_ids, *answer])
        with torch.inference_mode():
            embedded = self.llm.get_input_embeddings()(ids.clamp(0))
            embedded[ids == -1] = torch.cat([embedded[:0], *self.rows(media)])
            embedded[ids == -2] = self.newline
            logits: Array = self.llm(inputs_embeds=embedded[None]).logits[0].numpy()
        return logits
